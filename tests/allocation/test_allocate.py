"""Budgets: what is refused, and what a ratio is of."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from libprune.allocation.allocate import allocate
from libprune.allocation.decide import decide, summary
from libprune.engine.architecture import Trimmed
from libprune.engine.errors import BudgetError
from libprune.pipeline.artifacts import Scores
from libprune.pipeline.sections import Allocate
from tests.support.shapes import META, Shape, every_method, removed_parameters, shapes


@every_method
@given(shapes(), st.integers(1, 4), st.integers(1, 12), st.integers(0, 4), st.integers(0, 4))
def test_a_ratio_out_of_reach_is_refused_with_the_share_in_reach(method, shape, groups, channels, first, last):
    limits = {"min_groups": groups, "min_channels": channels, "freeze_first": first, "freeze_last": last}
    params = Allocate(method=method, ratio=0.999, shape="per_layer", **limits)
    reachable = shape.reachable(params)
    assume(reachable + max(shape.group_cost, shape.channel_cost) * shape.layers < 0.99 * shape.decoder)
    told = re.escape(f"({reachable:,} of {round(0.999 * shape.decoder):,} parameters asked for)")
    with pytest.raises(BudgetError, match=rf"allocate\.ratio = 0\.999 of the decoder .* removes at most .* {told}"):
        scores = shape.table(np.arange(float(len(shape.unit_costs()))))
        allocate(shape.architecture(), scores, params, shape.evidence(method))


@every_method
def test_a_miss_is_refused_when_nothing_more_can_be_removed(method):
    shape = Shape(layers=2, ffn=4)
    params = Allocate(method=method, shape="per_layer", min_groups=3, min_channels=4, ratio=0.33)
    assert 0.19 < shape.reachable(params) / shape.decoder < 0.2
    with pytest.raises(BudgetError, match=r"removes at most 0\.19. \(120 of 205 parameters asked for\)"):
        allocate(shape.architecture(), shape.table(np.arange(16.0)), params, shape.evidence(method))


def test_the_share_in_reach_is_that_of_the_asked_shape():
    shape = Shape(expressible=(3, 4))
    params = Allocate(method="uniform", ratio=0.9, min_channels=12, shape="uniform")
    with pytest.raises(BudgetError, match=rf"at most .* \({shape.layers * shape.group_cost} of "):
        allocate(shape.architecture(), shape.table(np.arange(48.0)), params)


@every_method
@pytest.mark.parametrize("ratio_of", ["decoder", "total"])
def test_the_ratio_counts_what_it_says(method, ratio_of):
    shape = Shape()
    architecture = shape.architecture()
    params = Allocate(method=method, ratio=0.25, ratio_of=ratio_of)
    decision = decide(Scores(architecture, shape.table(np.arange(48.0)), META), params, shape.evidence(method))
    told = summary(architecture, decision)
    total = shape.decoder + 7 * shape.model
    assert told["target"] == round(0.25 * {"decoder": shape.decoder, "total": total}[ratio_of])
    assert told["decoder_share_removed"] == pytest.approx(told["removed_parameters"] / shape.decoder)
    assert told["total_share_removed"] == pytest.approx(told["removed_parameters"] / total)


@every_method
def test_what_went_with_the_vocabulary_counts_toward_a_ratio_of_the_whole_model(method):
    """Of a model with twice its rows."""
    shape = Shape()
    total = shape.decoder + 7 * shape.model
    gone = round(0.1 * total)
    architecture = replace(shape.architecture(), trimmed=Trimmed(tokens=14, rows=14, parameters=gone, macs=gone))
    params = Allocate(method=method, ratio=0.25, ratio_of="total")
    told = {}
    for of in ("decoder", "total"):
        asked = params.model_copy(update={"ratio_of": of})
        decision = decide(Scores(architecture, shape.table(np.arange(48.0)), META), asked, shape.evidence(method))
        told[of] = summary(architecture, decision)
    assert told["total"]["target"] == round(0.25 * (total + gone)) - gone
    assert told["decoder"]["target"] == round(0.25 * shape.decoder)
    for one in told.values():
        assert one["total_share_removed"] == pytest.approx((one["removed_parameters"] + gone) / (total + gone))
    assert told["total"]["share_removed"] == pytest.approx(told["total"]["total_share_removed"])
    assert told["decoder"]["share_removed"] == pytest.approx(told["decoder"]["decoder_share_removed"])


@every_method
@pytest.mark.parametrize(
    ("rows", "width", "said"),
    [
        (0.0, 3, r"allocate\.width = 3 alone takes 0\.[0-9]+ of the total parameters"),
        (0.5, None, r"prepare\.vocabulary alone takes 0\.333 of the total"),
        (0.5, 3, r"allocate\.width = 3 and prepare\.vocabulary alone take 0\.[0-9]+ of the total"),
    ],
)
def test_what_alone_is_more_than_the_ratio_is_refused(method, rows, width, said):
    shape = Shape()
    gone = round(rows * (shape.decoder + 7 * shape.model))
    trimmed = Trimmed(tokens=14, rows=14, parameters=gone, macs=gone) if rows else None
    architecture = replace(shape.architecture(), trimmed=trimmed)
    params = Allocate(method=method, ratio=0.25, ratio_of="total", width=width)
    evidence = shape.evidence(method) | {"width": {shape.model: 0.0, 3: 0.1}}
    with pytest.raises(BudgetError, match=rf"{said}.* more than allocate\.ratio = 0\.25; raise the ratio"):
        allocate(architecture, shape.table(np.arange(48.0)), params, evidence)


@every_method
def test_a_budget_of_the_cache_is_met_by_groups_alone(method):
    """A group holds a key and a value of d elements for each token, a channel nothing: a quarter is 3 of 12 groups."""
    shape = Shape()
    architecture = shape.architecture()
    params = Allocate(method=method, ratio=0.25, objective="cache", shape="per_layer")
    decision = decide(Scores(architecture, shape.table(np.arange(48.0)), META), params, shape.evidence(method))
    told = summary(architecture, decision)
    assert told["objective"] == "cache"
    assert told["target"] == told["removed"] == 3 * 2 * shape.d
    assert told["removed_parameters"] == 3 * shape.group_cost == removed_parameters(shape, decision.plan)
