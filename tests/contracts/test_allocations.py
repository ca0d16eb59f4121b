"""The contract that every allocation passes, on made-up architectures and scores; no model is needed.

An allocation joins by its entry in `METHODS`, and by made-up evidence in `tests.support.shapes` if it needs any.
"""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libprune.allocation.allocate import allocate
from libprune.allocation.decide import Decision, decide, summary
from libprune.engine import cost
from libprune.engine.errors import BudgetError
from libprune.engine.plan import Plan, jaccard
from libprune.engine.tables import split_blocks
from libprune.pipeline.artifacts import Scores
from libprune.pipeline.methods import METHODS
from libprune.pipeline.sections import Allocate
from tests.support.shapes import META, Shape, drawn, every_method, ladders_of, removed_parameters

WITHIN_ONE = [method for method in METHODS if method != "uniform"]
"""All but `uniform`, which goes in steps of one removal in every layer, and to either side of the target."""


@every_method
@given(st.data())
def test_what_is_asked_for_goes_within_the_limits_in_the_order_of_rank_and_the_same_again(method, data):
    shape, scores, params, evidence = drawn(data, method)
    architecture = shape.architecture()
    decision = decide(Scores(architecture, scores, META), params, evidence)
    assert_removed_as_asked(shape, decision, params)
    assert_within_limits(shape, decision.plan, params)
    for block, rank in split_blocks(architecture, scores[params.rank_by]):
        keep = decision.plan.keep[block]
        assert keep.all() or rank[~keep].max() < rank[keep].min()
    again = allocate(architecture, {k: v.copy() for k, v in scores.items()}, params, evidence)
    assert jaccard(decision.plan.column, again.column) == 1
    assert list(again.keep) == list(architecture.blocks())


def assert_removed_as_asked(shape: Shape, decision: Decision, params: Allocate) -> None:
    """Within one removal, in every layer for uniform; counted by hand, by the cost module and in the summary alike."""
    architecture = shape.architecture()
    assert architecture.decoder_parameters == shape.decoder
    removed = removed_parameters(shape, decision.plan)
    assert removed == shape.decoder - cost.size(architecture, decision.plan).decoder
    told = summary(architecture, decision)
    assert told["removed"] == told["removed_parameters"] == removed
    assert told["decoder_share_removed"] == pytest.approx(removed / shape.decoder)
    assert told["target"] == round(params.ratio * shape.decoder)
    one = max(shape.group_cost, params.channel_multiple * shape.channel_cost)
    grain = one * (1 if params.method in WITHIN_ONE else len(shape.unfrozen(params)))
    assert abs(removed - told["target"]) <= grain
    assert params.method not in WITHIN_ONE or removed <= told["target"]


def assert_within_limits(shape: Shape, plan: Plan, params: Allocate) -> None:
    """Floors and multiples are respected, and frozen layers are whole."""
    for (layer, part), keep in plan.keep.items():
        kept = int(keep.sum())
        if layer not in shape.unfrozen(params):
            assert keep.all()
        if part == "attention":
            assert kept >= min(params.min_groups, shape.kv)
        else:
            assert kept >= min(params.min_channels, shape.ffn)
            assert keep.all() or kept % params.channel_multiple == 0


@every_method
@given(st.integers(1, 3), st.floats(0.1, 1.0), st.floats(0.05, 0.6))
def test_ties_break_by_unit_and_global_ones_by_layer_and_type_first(method, layers, value, ratio):
    shape = Shape(layers=layers, q=1, d=1, gates=3)
    params = Allocate(method=method, shape="per_layer", ratio=ratio)
    scores = shape.table(np.full(len(shape.unit_costs()), value))
    plan = allocate(shape.architecture(), scores, params, shape.evidence(method))
    for keep in plan.keep.values():
        assert (np.diff(keep.astype(int)) >= 0).all()
    if method == "global":
        state = [(keep.sum() == 1) - float(keep.all()) for keep in plan.keep.values()]
        assert state == sorted(state, reverse=True), "blocks are emptied one after the other"
        assert sum(value == 0 for value in state) <= 1


# Not `functional`: what its last layer leaves over may still fit into a layer before, whose share is settled.
@pytest.mark.parametrize("method", ["global", "search"])
@given(st.data())
def test_it_stops_only_when_nothing_more_fits(method, data):
    shape, scores, params, evidence = drawn(data, method)
    architecture = shape.architecture()
    plan = allocate(architecture, scores, params, evidence)
    left = round(params.ratio * shape.decoder) - removed_parameters(shape, plan)
    assert left >= 0
    for block, steps in ladders_of(architecture, scores, params).items():
        gone = int((~plan.keep[block]).sum())
        following = [step for i, step in enumerate(steps) if sum(len(s.units) for s in steps[:i]) >= gone]
        assert all(step.cost > left for step in following[:1])


LAYER_REMOVAL = list(product(METHODS, (True, False), ("importance", "proportional")))


@pytest.mark.parametrize(("method", "allowed", "split"), LAYER_REMOVAL)
@settings(max_examples=20)
@given(st.permutations(range(18)), st.floats(0.5, 0.99))
def test_a_layer_goes_only_where_that_is_allowed(method, allowed, split, order, ratio):
    shape = Shape(kv=2, ffn=4)
    limits = {"min_groups": 0, "min_channels": 0, "depth": "units" if allowed else "none", "shape": "per_layer"}
    params = Allocate(method=method, ratio=ratio, split=split, **limits)
    evidence = shape.evidence(method, order[0])
    try:
        plan = allocate(shape.architecture(), shape.table(1.0 + np.array(order)), params, evidence)
    except BudgetError:
        assert not allowed or method == "uniform"
        return
    assert allowed or plan.layers == tuple(range(shape.layers))
    assert method == "uniform" or removed_parameters(shape, plan) <= round(ratio * shape.decoder)


def test_jaccard_is_kept_in_both_over_kept_in_either():
    one, two = (Plan({(0, "mlp"): np.array(keep, dtype=bool)}) for keep in ([1, 1, 0, 0], [1, 0, 1, 0]))
    assert jaccard(one.column, two.column) == jaccard(two.column, one.column) == pytest.approx(1 / 3)
    assert jaccard(one.column, one.column) == 1
