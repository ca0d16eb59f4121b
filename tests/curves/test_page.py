"""The page of a curve: what it says and shows, with and without measured models."""

import math
from dataclasses import replace

import pytest

from libprune.curves import page
from libprune.curves.page import draw_pictures, explain_curve, write_curve
from libprune.curves.pictures import draw_points
from libprune.engine.errors import LibpruneError
from libprune.report.markdown import Picture
from tests.support.curved import TENTHS, drawn, made_up, measured
from tests.support.page import Page

VALUES = {ratio: math.exp(0.1 * ratio + 3 * ratio**4) for ratio in TENTHS}


def test_the_page_shows_and_says_what_was_planned_and_measured(tmp_path):
    made = drawn({0.2: 1.05, 0.5: 1.4, 0.8: 4.0}, made_up(TENTHS, skipped={0.95: "a|b <i>reason</i>"}))
    printed = write_curve(made, tmp_path / "out")
    assert printed.splitlines()[-1] == f"written: {tmp_path}/out/curve.html, curve.md, curve.csv"
    read = Page((tmp_path / "out/curve.html").read_text())
    assert read.texts["h1"] == ["a <b>model</b>: sizes of one measurement"]
    assert read.texts["h2"] == ["Plans", "Measured"]
    said = " ".join(read.texts["p"])
    for words in explain_curve(made):
        assert words.replace("`", "") in said and words in printed
    assert "Without a plan: 95 %, since a|b <i>reason</i>." in said
    assert "Not evaluated: 0.1, 0.3, 0.4, 0.6, 0.7, 0.9;" in said
    assert {"b", "i"}.isdisjoint(tag for tag, _ in read.tags)
    titles = " ".join(read.texts["title"])
    assert "predicted 30 %" in titles and "50 %: 1.4 ± " in titles and "dense: 1" in titles
    assert len(read.texts["svg"]) == 5
    for name in ("loss_size", "loss_cache", "loss_memory", "loss_prefill", "loss_decode"):
        assert (tmp_path / f"out/pictures/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(pictures/{name}.png)" in (tmp_path / "out/curve.md").read_text()
    assert (tmp_path / "out/curve.csv").read_text().count("\n") == 1 + 1 + len(TENTHS) + 1


@pytest.fixture
def quick(monkeypatch) -> None:
    """Pictures are composed, and not rendered."""
    monkeypatch.setattr(page, "draw_picture", lambda name, figure, alt, caption: Picture(name, alt, caption, b"", ""))


def test_without_a_measured_model_the_predictions_are_shown(quick, tmp_path):
    pictures = draw_pictures(drawn({}))
    assert [one.name for one in pictures] == ["loss_size", "loss_cache", "loss_memory"]
    for one in pictures:
        assert one.caption.startswith("Square: the dense model. Dashed: predicted")
        assert one.caption.endswith("Ring: where the curve bends.")
    write_curve(drawn({}), tmp_path)
    assert "## Measured" not in (tmp_path / "curve.md").read_text()


def test_a_method_that_predicts_nothing_says_so_and_has_no_picture_before_a_model_is_measured(quick, tmp_path):
    made = drawn({}, made_up(predicts=False))
    assert draw_pictures(made) == []
    said = "allocate.method: uniform measures no divergence, so no loss is predicted; the importance that goes is a"
    assert said in write_curve(made, tmp_path)
    assert "Each smaller model is a part" not in " ".join(explain_curve(made))
    assert "Each smaller model is a part of the larger ones." in explain_curve(
        drawn({}, replace(made_up(), nested={0.2: (0.1,)}))
    )
    blind = made_up(predicts=False)
    blind = replace(blind, dense=replace(blind.dense, importance=None))
    assert "no loss is predicted." in " ".join(explain_curve(drawn({}, blind)))
    assert len(draw_pictures(drawn({0.5: 1.4}, made_up(predicts=False)))) == 5


def test_what_does_not_differ_or_is_not_known_has_no_picture(quick):
    curve = made_up((0.5,))
    same = [replace(one, cache=curve.dense.cache) for one in curve.planned]
    made = drawn({}, replace(curve, planned=tuple(same)))
    made = replace(made, measured={0.5: measured(0.5, 1.4, decode_ratio=None)})
    assert [one.name for one in draw_pictures(made)] == ["loss_size", "loss_memory", "loss_prefill"]


def test_the_ring_is_where_the_measured_curve_bends(quick):
    captions = [one.caption for one in draw_pictures(drawn(VALUES))]
    assert ["Ring" in caption for caption in captions] == [True, True, True, False, False]
    noisy = draw_pictures(drawn(VALUES, error=30.0))
    assert not any("Ring" in one.caption for one in noisy)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(LibpruneError, match="is a file; name a folder"):
        write_curve(drawn({}), tmp_path / "out")


def test_the_line_goes_from_ratio_to_ratio_also_where_several_take_the_same(quick, monkeypatch):
    lines = []

    def draw(points, line, *more):
        lines.append((points, line))
        return draw_points(points, line, *more)

    monkeypatch.setattr(page, "draw_points", draw)
    curve = made_up((0.2, 0.5, 0.8))
    same = [replace(one, cache=curve.dense.cache if one.ratio < 0.8 else one.cache) for one in curve.planned]
    draw_pictures(drawn({0.2: 1.1, 0.5: 2.0, 0.8: 9.0}, replace(curve, planned=tuple(same))))
    for points, line in lines[:3]:
        assert line == [(one.x, one.y) for one in points]
        assert [y for _, y in line] == [1.0, 1.1, 2.0, 9.0]
