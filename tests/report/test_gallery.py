"""The pictures: every kind of table is drawn, what is drawn is what the table says, and the bytes depend on it only."""

import hashlib
import os
import subprocess
import sys
from itertools import pairwise
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libprune.engine.tables import Columns
from libprune.report.canvas import Figure, png
from libprune.report.cut_pictures import kept_share, scores, sensitivity
from libprune.report.gallery import cut_gallery, gradient_gallery, sensitivity_gallery
from libprune.report.gradient_pictures import grad_comparison, grad_dist, grad_heatmap, layer_variance
from libprune.report.gradient_text import gradient_report, layer_summary
from libprune.statistics.gradient_health import gradient_by_layer, gradient_ratio
from tests.support.closure import ROOT
from tests.support.tables import KINDS, gradient_rows, sensitivity_rows

META = {"ratio": 0.3, "ratio_of": "decoder", "objective": "parameters", "criterion": "taylor_2nd", "rank_by": "score"}


def without_layer(rows: Columns, layer: int = 0) -> Columns:
    """A layer without any gradient."""
    here = rows["layer_idx"] == layer
    return rows | {name: np.where(here, 0.0, rows[name]) for name in ("mean_abs", "std", "norm")}


def shortened(rows: Columns) -> Columns:
    """Without the last parameter of the last layer."""
    gone = (rows["layer_idx"] == rows["layer_idx"].max()) & (rows["parameter"] == KINDS[-1])
    return {name: values[~gone] for name, values in rows.items()}


def plan_rows(layers: int, values: np.ndarray, removed: float = 0.3) -> Columns:
    """A plan that removes the lowest of the scores, three attention groups a layer; ``values`` repeat as needed."""
    parts = ["attention"] * 3 + ["mlp"] * 7
    score = np.resize(values.astype(float), layers * len(parts))
    keep = np.argsort(np.argsort(score, kind="stable")) >= removed * len(score)
    layer = np.repeat(np.arange(layers), len(parts))
    return {"layer_idx": layer, "group_type": np.array(parts * layers, dtype=object), "score": score, "keep": keep}


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def legend(figure: Figure) -> list[str]:
    found = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    return [text.get_text() for one in found if one is not None for text in one.get_texts()]


# Drawing


GRADIENTS = {
    "one layer, one batch": gradient_rows(1, batches=1),
    "a layer without gradient and a missing parameter": shortened(without_layer(gradient_rows(3))),
    "no gradient at all": without_layer(gradient_rows(1)),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_every_table_of_gradients_is_drawn(kind):
    found = gradient_gallery(GRADIENTS[kind])
    assert [picture.name for picture in found] == ["grad_dist", "grad_heatmap", "grad_comparison", "layer_variance"]
    assert all(picture.png.startswith(b"\x89PNG") and picture.caption for picture in found)


SCORES = {
    "all zero": (np.zeros(1), 1),
    "negative, zero and positive": (np.array([-3.0, 0.0, 1e-9, 2.0, np.nan]), 3),
}


@pytest.mark.parametrize("kind", SCORES)
def test_every_table_of_scores_is_drawn(kind):
    values, layers = SCORES[kind]
    assert [picture.name for picture in cut_gallery(plan_rows(layers, values), META)] == ["kept_share", "scores"]


def test_a_sensitivity_without_standard_errors_is_drawn():
    rows = sensitivity_rows(1)
    (picture,) = sensitivity_gallery(rows | {"standard_error": np.full(3, np.nan)})
    assert picture.png.startswith(b"\x89PNG")


def test_tables_without_rows_give_no_picture_and_a_report_that_says_so():
    gradients, plan, measured = gradient_rows(1), plan_rows(1, np.ones(1)), sensitivity_rows(1)
    empty = [{name: values[:0] for name, values in table.items()} for table in (gradients, plan, measured)]
    assert gradient_gallery(empty[0]) == cut_gallery(empty[1], META) == sensitivity_gallery(empty[2]) == []
    assert "No gradients" in gradient_report(empty[0], {})


def test_eighty_layers_have_room_for_their_numbers():
    for figure in (grad_comparison(gradient_rows(80)), kept_share(plan_rows(80, np.arange(9.0)), META)):
        png(figure)
        for axes in figure.axes:
            labels = [tick for tick in axes.get_xticklabels() if tick.get_text()]
            boxes = [label.get_window_extent() for label in labels]
            assert len(boxes) >= 8
            assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_the_bytes_depend_on_the_table_alone_not_on_home_rc_files_or_backends(tmp_path):
    """The same picture in a process with a home that is not there, a broken matplotlibrc and an unknown backend."""
    lines = ("font.family: Nowhere", "lines.linewidth: wide", "no.such.key: 1", "text.usetex: True")
    (tmp_path / "matplotlibrc").write_text("\n".join(lines))
    program = (
        "import hashlib; from libprune.report.canvas import png; from libprune.report.cut_pictures import sensitivity; "
        "from tests.support.tables import sensitivity_rows; "
        "print(hashlib.sha256(png(sensitivity(sensitivity_rows(2)))).hexdigest())"
    )
    odd = {"HOME": "/dev/null/home", "MPLCONFIGDIR": "/dev/null/config", "MPLBACKEND": "none such"}
    settings = os.environ | odd | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.strip() == hashlib.sha256(png(sensitivity(sensitivity_rows(2)))).hexdigest()


# What is drawn


@pytest.mark.parametrize(("layers", "batches"), [(1, 1), (3, 1), (4, 6)])
def test_the_summary_of_layers_follows_its_definitions(layers, batches):
    rows, found = gradient_rows(layers, batches), layer_summary(gradient_rows(layers, batches))
    for i in range(layers):
        here = [k for k in range(len(rows["batch"])) if rows["layer_idx"][k] == i]
        by_batch = [fmean(rows["mean_abs"][k] for k in here if rows["batch"][k] == b) for b in range(batches)]
        assert found["mean_abs"][i] == pytest.approx(fmean(by_batch))
        assert found["std"][i] == pytest.approx(fmean(rows["std"][k] ** 2 for k in here) ** 0.5)
        variation = stdev(by_batch) / fmean(by_batch) if batches > 1 else float("nan")
        assert found["variation"][i] == pytest.approx(variation, nan_ok=True)


def test_the_text_has_every_layers_figures_the_ratio_and_the_advice():
    rows = gradient_rows(3)
    rows["mean_abs"] *= np.array([3.0, 1.0, 50.0])[rows["layer_idx"]]
    advice = {"fix": "adaptive", "gradient_ratio_after_fix": None, "advice": ["do\nthis"]}
    text = gradient_report(rows, advice)
    for layer, mean in enumerate(gradient_by_layer(rows)["mean_abs"]):
        assert f"{layer:>5}{mean:>13.3e}" in text
    assert f"{gradient_ratio(rows):.1f} (fine)" in text
    assert "smallest mean |g|: layer 1; largest: layer 2" in text
    assert "adaptive; the ratio after it: infinite" in text
    assert "advice: do this\n" in text
    assert "fix" not in gradient_report(rows, {"fix": "none"})


def test_titles_say_ratio_and_verdict_and_zeros_are_marked():
    rows = gradient_rows(3)
    assert f"{gradient_ratio(rows):.1f} times" in titles(grad_dist(rows))[0]
    assert "(fine)" in titles(grad_dist(rows))[0]
    broken = shortened(without_layer(rows))
    assert "infinite (severe vanishing)" in titles(grad_dist(broken))[0]
    assert "some parameter has no gradient" in legend(grad_dist(broken))
    assert "some parameter has no gradient" not in legend(grad_dist(rows))
    assert legend(grad_heatmap(broken)) == ["zero", "not in the table"]
    assert legend(grad_heatmap(rows)) == []


@pytest.mark.parametrize(("batches", "shown"), [(1, 1), (9, 5)])
def test_the_comparison_shows_the_first_five_batches(batches, shown):
    rows = gradient_rows(4, batches)
    figure = grad_comparison(rows)
    assert f"first {shown} of {batches} batches" in titles(figure)[0]
    for number, line in enumerate(figure.axes[0].lines):
        here = rows["batch"] == number
        expected = [rows["mean_abs"][here & (rows["layer_idx"] == layer)].mean() for layer in range(4)]
        np.testing.assert_allclose(line.get_ydata(), expected)
    assert len(figure.axes[0].lines) == shown


def test_one_batch_has_no_variation_to_show():
    assert "none to show" in titles(layer_variance(gradient_rows(2, batches=1)))[1]


def test_the_bars_of_the_kept_share_are_the_plans():
    plan = plan_rows(3, np.random.default_rng(0).normal(size=30))
    figure = kept_share(plan, META)
    for axes, part in zip(figure.axes, ("attention", "mlp"), strict=True):
        for layer, (kept, removed) in enumerate(zip(*axes.containers, strict=True)):
            share = 100 * plan["keep"][(plan["layer_idx"] == layer) & (plan["group_type"] == part)].mean()
            assert kept.get_height() == pytest.approx(share)
            assert removed.get_height() == pytest.approx(100 - share)
            assert removed.get_y() == pytest.approx(share)
        assert axes.lines[0].get_ydata() == pytest.approx([70, 70])
    assert "asked for: 70.0 % of the decoder parameters" in legend(figure)


SIZES = st.one_of(st.just(0.0), st.floats(1e-20, 1e20))


@settings(max_examples=8)
@given(st.lists(st.builds(lambda size, sign: sign * size, SIZES, st.sampled_from([-1, 1])), min_size=1, max_size=40))
def test_every_unit_is_in_the_histogram_of_its_part_and_fate_whatever_its_score(values):
    plan = plan_rows(2, np.array(values))
    for axes, part in zip(scores(plan, META).axes, ("attention", "mlp"), strict=True):
        kept, removed = (round(sum(bar.get_height() for bar in bars)) for bars in axes.containers)
        here = plan["group_type"] == part
        assert (kept, removed) == ((plan["keep"] & here).sum(), (~plan["keep"] & here).sum())


def test_the_cut_is_the_highest_removed_score_of_a_layer():
    plan = plan_rows(2, np.arange(1.0, 21.0), removed=0.0)
    plan["keep"] = ~np.isin(plan["score"], [4.0, 6.0, 15.0])
    panels = scores(plan, META).axes
    assert titles(panels[0].figure) == [
        "0 of 6 attention groups removed",
        "3 of 14 MLP channels removed, layers cut at 6 to 15",
    ]
    assert [line.get_xdata()[0] for line in panels[1].lines] == [6.0, 15.0]


def test_the_sensitivity_names_the_layers_that_matter_most_and_least():
    rows = sensitivity_rows(3)
    rows["loss_increase"][::3] = [0.5, 0.01, 0.2]
    figure = sensitivity(rows)
    assert "most for layer 0 (0.5), least for layer 1 (0.01)" in titles(figure)[0]
    assert sorted(legend(figure)) == ["MLP only", "attention only", "whole layer"]
