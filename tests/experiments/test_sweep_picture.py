"""Sweep pictures: every row is drawn, in the panel of every param that differs."""

import pytest

from libprune.experiments.sweep_picture import COLOURS, PANELS, draw_sweep, write_picture
from tests.support.swept import row, swept


@pytest.mark.parametrize("numbers", [1, 4, PANELS, PANELS + 2])
def test_every_numeric_param_that_differs_has_a_panel_with_every_row(numbers):
    panels = draw_sweep(swept(numbers, words=1)).axes
    assert [axes.get_xlabel() for axes in panels] == [f"n.{j}" for j in range(min(numbers, PANELS))]
    for axes in panels:
        points = [point for part in axes.containers for point in zip(*part.lines[0].get_data(), strict=True)]
        assert sorted(y for _, y in points) == pytest.approx([1, 1.1, 1.2])


def test_colours_tell_other_settings_apart_and_a_line_joins_what_differs_in_one_param():
    rows = [row(f"{c}{r}", r, allocate__ratio=r, score__criterion=c) for c in ("fisher", "taylor") for r in (1.1, 1.3)]
    (axes,) = draw_sweep(rows).axes
    lines = [part.lines[0] for part in axes.containers]
    assert [line.get_color() for line in lines] == list(COLOURS[:2])
    assert [list(line.get_xdata()) for line in lines] == [[1.1, 1.3]] * 2
    assert {line.get_linestyle() for line in lines} == {"-"}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["fisher", "taylor"]


def test_a_row_without_a_number_is_a_line_across_the_panel_and_how_it_is_measured_has_none():
    rows = [row(f"t{t}", 1.2 + t / 10, s__t=t, evaluate__rounds=t) for t in (1, 2)]
    (axes,) = draw_sweep([*rows, row("plain", 1.1, s__t="auto", evaluate__rounds=3)]).axes
    assert axes.get_xlabel() == "s.t"
    assert [text.get_text() for text in axes.texts] == ["plain"]
    assert [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == ":"] == [[1.1, 1.1]]


def test_too_many_other_settings_are_not_joined_or_coloured():
    rows = [row(f"e{i}", 1.0 + i, s__x=i % 3, s__y=i) for i in range(len(COLOURS) + 2)]
    first, _ = draw_sweep(rows).axes
    assert len(first.containers) == 1
    assert first.containers[0].lines[0].get_linestyle() == "None"
    assert first.get_legend() is None


def test_named_params_alone_give_a_bar_a_row():
    (axes,) = draw_sweep(swept(0, words=2)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["e0: a, a", "e1: b, b", "e2: c, c"]
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == pytest.approx([1, 1.1, 1.2])


def test_ratios_over_a_decade_have_a_logarithmic_axis():
    (axes,) = draw_sweep([row("a", 1.2, s__x=0.1), row("b", 400.0, s__x=10)]).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    (axes,) = draw_sweep([row("a", 1.2, s__x="p"), row("b", 400.0, s__x="q")]).axes
    assert axes.get_xscale() == "log"


def test_the_same_rows_give_the_same_picture(tmp_path):
    for name in ("one", "two"):
        write_picture(tmp_path / f"{name}.png", swept(2))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_the_ratio_after_recovery_is_a_hollow_mark_or_bar():
    rows = [row("a", 1.3, after=1.1, s__x=1), row("b", 1.5, s__x=2)]
    (axes,) = draw_sweep(rows).axes
    hollow = [part.lines[0] for part in axes.containers if part.lines[0].get_markerfacecolor() == "white"]
    assert [tuple(line.get_ydata()) for line in hollow] == [(1.1,)]
    assert "hollow: after recovery" in axes.get_ylabel()
    (axes,) = draw_sweep([row("a", 1.3, after=1.1, s__x="p"), row("b", 1.5, s__x="q")]).axes
    ends = {(bar.get_x() + bar.get_width(), bar.get_fill()) for bar in axes.patches}
    assert ends == {(1.3, True), (1.5, True), (1.1, False)}
    assert "hollow: after recovery" in axes.get_xlabel()
    assert "recovery" not in draw_sweep(swept(0, words=1)).axes[0].get_xlabel()
