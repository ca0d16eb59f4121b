"""The pictures of the decision show what the tables say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libprune.report.cut_pictures import draw_kept_share, draw_scores, draw_sensitivity
from tests.support.figures import legend, titles
from tests.support.tables import PLAN_META, plan_rows, sensitivity_rows


def test_the_bars_of_the_kept_share_are_the_plans():
    plan = plan_rows(3, np.random.default_rng(0).normal(size=30), removed=0.5)
    figure = draw_kept_share(plan, PLAN_META)
    for axes, part in zip(figure.axes, ("attention", "mlp"), strict=True):
        for layer, (kept, removed) in enumerate(zip(*axes.containers, strict=True)):
            share = 100 * plan["keep"][(plan["layer_idx"] == layer) & (plan["group_type"] == part)].mean()
            assert kept.get_height() == pytest.approx(share)
            assert removed.get_height() == pytest.approx(100 - share)
            assert removed.get_y() == pytest.approx(share)
        assert axes.lines[0].get_ydata() == pytest.approx([70, 70])
    assert "asked for: 70.0 % of the decoder parameters" in legend(figure)


def test_panels_name_query_heads_where_these_are_the_units():
    plan = plan_rows(3, np.random.default_rng(0).normal(size=30), removed=0.5)
    for heads, name in ({}, "attention groups"), ({"attention": 3}, "query heads"):
        for draw in (draw_kept_share, draw_scores):
            axes = draw(plan, {**PLAN_META, "heads": heads}).axes[0]
            assert axes.get_ylabel().startswith(name)
            assert name in axes.get_title(loc="left")


SIZES = st.one_of(st.just(0.0), st.floats(1e-20, 1e20))


@settings(max_examples=8)
@given(st.lists(st.builds(lambda size, sign: sign * size, SIZES, st.sampled_from([-1, 1])), min_size=1, max_size=40))
def test_every_unit_is_in_the_histogram_of_its_part_and_fate_whatever_its_score(values):
    plan = plan_rows(2, np.array(values))
    for axes, part in zip(draw_scores(plan, PLAN_META).axes, ("attention", "mlp"), strict=True):
        kept, removed = (round(sum(bar.get_height() for bar in bars)) for bars in axes.containers)
        here = plan["group_type"] == part
        assert (kept, removed) == ((plan["keep"] & here).sum(), (~plan["keep"] & here).sum())


def test_the_cut_is_the_highest_removed_score_of_a_layer():
    plan = plan_rows(2, np.arange(1.0, 21.0), removed=0.0)
    plan["keep"] = ~np.isin(plan["score"], [4.0, 6.0, 15.0])
    panels = draw_scores(plan, PLAN_META).axes
    assert titles(panels[0].figure) == [
        "0 of 6 attention groups removed",
        "3 of 14 MLP channels removed, layers cut at 6 to 15",
    ]
    assert [line.get_xdata()[0] for line in panels[1].lines] == [6.0, 15.0]


def test_the_sensitivity_names_the_layers_that_matter_most_and_least():
    rows = sensitivity_rows(3)
    rows["loss_increase"][::3] = [0.5, 0.01, 0.2]
    figure = draw_sensitivity(rows)
    assert "most for layer 0 (0.5), least for layer 1 (0.01)" in titles(figure)[0]
    assert sorted(legend(figure)) == ["MLP only", "attention only", "whole layer"]
    rows["removed"][2::3] = ["mamba", "mlp", "mamba"]
    assert legend(draw_sensitivity(rows)) == ["whole layer", "attention only", "mamba only", "MLP only"]
