"""The contract that every allocation passes, on made-up architectures and scores; no model is needed.

An allocation joins by its entry in `METHODS`, and by made-up evidence in `tests.support.shapes` if it needs any.
"""

import re
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from libprune.allocation.allocate import allocate
from libprune.allocation.decide import Decision, decide, result_shape, summary
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.errors import BudgetError, LibpruneError
from libprune.engine.plan import Plan, jaccard
from libprune.engine.tables import Columns, split_blocks, unit_index
from libprune.pipeline.methods import METHODS
from libprune.pipeline.scores import Scores
from libprune.pipeline.sections import Allocate
from tests.support.shapes import EQUAL_COSTS, Shape, drawn, ladders_of, removed_parameters, shapes

META = {"criterion": "wanda", "fusion": "none", "comparable": True, "scaling": "none"}

every_method = pytest.mark.parametrize("method", METHODS)
WITHIN_ONE = [method for method in METHODS if method != "uniform"]
"""All but `uniform`, which goes in steps of one removal in every layer, and to either side of the target."""


# The contract


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
    told = summary(architecture, decision, params)
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


@pytest.mark.parametrize("multiple", [3, 5, 6])
def test_the_ranks_of_a_ladder_never_descend_even_where_steps_differ_in_size(multiple):
    shape = Shape(ffn=13)
    params = Allocate(method="global", channel_multiple=multiple)
    for value in np.linspace(0.1, 1, 50):
        ladders = ladders_of(shape.architecture(), shape.table(np.full(len(shape.unit_costs()), value)), params)
        for steps in ladders.values():
            assert (np.diff([step.rank for step in steps]) >= 0).all()


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
    limits = {"min_groups": 0, "min_channels": 0, "allow_layer_removal": allowed, "shape": "per_layer"}
    params = Allocate(method=method, ratio=ratio, split=split, **limits)
    evidence = shape.evidence(method, order[0])
    try:
        plan = allocate(shape.architecture(), shape.table(1.0 + np.array(order)), params, evidence)
    except BudgetError:
        assert not allowed or method == "uniform"
        return
    assert allowed or plan.layers == tuple(range(shape.layers))
    assert method == "uniform" or removed_parameters(shape, plan) <= round(ratio * shape.decoder)


# Global


@given(st.permutations(range(48)), st.floats(0.02, 0.6))
def test_global_takes_the_lowest_scores_that_the_floors_allow(order, ratio):
    shape = EQUAL_COSTS
    scores = shape.table(np.array(order) / 4)
    params = Allocate(method="global", ratio=ratio)
    plan = allocate(shape.architecture(), scores, params)
    may_go, floors = [], {"attention": 1, "mlp": 1}
    for (_, part), score in split_blocks(shape.architecture(), scores["score"]):
        may_go += sorted(score)[: len(score) - floors[part]]
    count = round(ratio * shape.decoder) // shape.group_cost
    removed = {s for block, s in split_blocks(shape.architecture(), scores["score"]) for s in s[~plan.keep[block]]}
    assert removed == set(sorted(may_go)[:count])


@given(st.permutations(range(48)), st.floats(0.02, 0.6), st.floats(0.02, 0.6))
def test_a_larger_ratio_never_keeps_a_unit_that_a_smaller_removes(order, one, two):
    shape, scores = EQUAL_COSTS, EQUAL_COSTS.table(np.array(order) / 4)
    plans = [allocate(shape.architecture(), scores, Allocate(method="global", ratio=r)) for r in sorted([one, two])]
    for block, keep in plans[1].keep.items():
        assert not (keep & ~plans[0].keep[block]).any()


# Uniform


@given(st.data())
def test_uniform_removes_the_same_count_in_every_layer_and_only_what_a_stock_config_can_say(data):
    shape, scores, params, _ = drawn(data, "uniform")
    params = params.model_copy(update={"shape": data.draw(st.sampled_from(["auto", "per_layer"]))})
    architecture = shape.architecture()
    try:
        plan = allocate(architecture, scores, params)
    except BudgetError:
        assert shape.expressible is not None
        return
    layers = shape.unfrozen(params)
    for part in ("attention", "mlp"):
        assert len({plan.kept(layer, part) for layer in layers}) == 1
        if params.shape == "auto":
            assert architecture.parts[part].says(plan.kept(layers[0], part))


@given(st.data())
def test_uniform_comes_as_near_as_any_split_or_within_the_cheapest_removal_in_every_layer(data):
    """Against all splits tried one by one; among those so near, `split` takes what it says."""
    shape, scores, params, _ = drawn(data, "uniform")
    architecture, layers = shape.architecture(), shape.unfrozen(params)
    importance, proportional = (
        allocate(architecture, scores, params.model_copy(update={"split": split}))
        for split in ("importance", "proportional")
    )
    sizes = [len(step.units) for step in ladders_of(architecture, scores, params)[layers[0], "mlp"]]
    groups = shape.removable(params)["attention"]
    spent = np.add.outer(np.arange(groups + 1) * shape.group_cost, np.cumsum([0, *sizes]) * shape.channel_cost)
    target = round(params.ratio * shape.decoder)
    nearest = np.abs(len(layers) * spent - target).min()
    cheapest = len(layers) * min([size * shape.channel_cost for size in sizes[:1]] + [shape.group_cost] * (groups > 0))
    for plan in (importance, proportional):
        assert abs(removed_parameters(shape, plan) - target) <= max(nearest, cheapest)
    lost = [importance_lost(architecture, scores, plan) for plan in (importance, proportional)]
    assert lost[0] <= lost[1] * (1 + 1e-12)
    gaps = [share_gap(shape, plan, layers[0]) for plan in (importance, proportional)]
    assert gaps[1] <= gaps[0] + 1e-12


def importance_lost(architecture: Architecture, scores: Columns, plan: Plan) -> float:
    blocks = split_blocks(architecture, scores["importance"])
    return sum(float(values[~plan.keep[block]].sum()) for block, values in blocks)


def share_gap(shape: Shape, plan: Plan, layer: int) -> float:
    return abs(plan.kept(layer, "attention") / shape.kv - plan.kept(layer, "mlp") / shape.ffn)


def test_uniform_does_not_remove_every_layer():
    params = Allocate(method="uniform", ratio=0.999, shape="per_layer", min_groups=0, min_channels=0)
    with pytest.raises(BudgetError):
        allocate(Shape().architecture(), Shape().table(np.arange(48.0)), params)


# What cannot be had


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


@pytest.mark.parametrize(
    ("expressible", "groups", "message"),
    [
        (None, (3, 4, 4), "the layers of this plan differ in width"),
        ((2, 4), (3, 3, 3), "the stock config of this family cannot say 3 attention units"),
    ],
)
def test_the_uniform_shape_is_refused_where_a_plan_does_not_have_it(expressible, groups, message):
    architecture = Shape(expressible=expressible).architecture()
    fewer = {(layer, "attention"): np.arange(4) < kept for layer, kept in enumerate(groups)}
    plan = Plan({**Plan.dense(architecture).keep, **fewer})
    assert result_shape(architecture, plan, Allocate(shape="auto")) == "per_layer"
    with pytest.raises(BudgetError, match=rf"allocate\.shape is uniform, but {message}; choose"):
        result_shape(architecture, plan, Allocate(shape="uniform"))


@pytest.mark.parametrize("shape", ["auto", "uniform", "per_layer"])
def test_an_even_plan_has_the_shape_that_is_asked_for(shape):
    architecture = Shape(expressible=(2, 4)).architecture()
    asked = result_shape(architecture, Plan.dense(architecture), Allocate(shape=shape))
    assert asked == ("per_layer" if shape == "per_layer" else "uniform")


def test_scores_that_do_not_compare_are_refused_in_global_unless_scaled():
    shape, meta = Shape(), META | {"comparable": False}
    architecture, scores = shape.architecture(), shape.table(np.arange(48.0))
    with pytest.raises(LibpruneError, match=r"^wanda compares only within a layer and part.*score\.scaling"):
        decide(Scores(architecture, scores, meta), Allocate(method="global"))
    scaled = decide(Scores(architecture, scores, meta | {"scaling": "zscore"}), Allocate(method="global"))
    plain = decide(Scores(architecture, scores, META), Allocate(method="global"))
    assert jaccard(scaled.plan.column, plain.plan.column) == 1
    assert decide(Scores(architecture, scores, meta), Allocate(method="uniform")).plan.uniform


@pytest.mark.parametrize(
    ("meta", "split"),
    [({}, "importance"), ({"comparable": False}, "proportional"), ({"scaling": "rank"}, "proportional")],
)
def test_the_budget_is_split_by_importance_only_where_scores_compare(meta, split):
    shape = Shape()
    decision = decide(Scores(shape.architecture(), shape.table(np.arange(48.0)), META | meta), Allocate())
    assert decision.split == split
    plan = allocate(shape.architecture(), shape.table(np.arange(48.0)), Allocate(split=split))
    assert jaccard(decision.plan.column, plan.column) == 1


@every_method
@pytest.mark.parametrize("ratio_of", ["decoder", "total"])
def test_the_ratio_counts_what_it_says(method, ratio_of):
    shape = Shape()
    architecture = shape.architecture()
    params = Allocate(method=method, ratio=0.25, ratio_of=ratio_of)
    decision = decide(Scores(architecture, shape.table(np.arange(48.0)), META), params, shape.evidence(method))
    told = summary(architecture, decision, params)
    total = shape.decoder + 7 * shape.model
    assert told["target"] == round(0.25 * {"decoder": shape.decoder, "total": total}[ratio_of])
    assert told["decoder_share_removed"] == pytest.approx(told["removed_parameters"] / shape.decoder)
    assert told["total_share_removed"] == pytest.approx(told["removed_parameters"] / total)


@every_method
def test_a_budget_of_the_cache_is_met_by_groups_alone(method):
    """A group holds a key and a value of d elements for each token, a channel nothing: a quarter is 3 of 12 groups."""
    shape = Shape()
    architecture = shape.architecture()
    params = Allocate(method=method, ratio=0.25, objective="cache", shape="per_layer")
    decision = decide(Scores(architecture, shape.table(np.arange(48.0)), META), params, shape.evidence(method))
    told = summary(architecture, decision, params)
    assert told["objective"] == "cache"
    assert told["target"] == told["removed"] == 3 * 2 * shape.d
    assert told["removed_parameters"] == 3 * shape.group_cost == removed_parameters(shape, decision.plan)


# Overlap


def test_jaccard_is_kept_in_both_over_kept_in_either():
    one, two = (Plan({(0, "mlp"): np.array(keep, dtype=bool)}) for keep in ([1, 1, 0, 0], [1, 0, 1, 0]))
    assert jaccard(one.column, two.column) == jaccard(two.column, one.column) == pytest.approx(1 / 3)
    assert jaccard(one.column, one.column) == 1


@every_method
@settings(max_examples=10)
@given(st.permutations(range(48)), st.permutations(range(48)))
def test_a_second_order_criterion_reports_how_far_each_part_alone_would_agree(method, first, second):
    shape, params = Shape(), Allocate(method=method, ratio=0.4, split="importance")
    architecture, costs, evidence = shape.architecture(), shape.unit_costs(), shape.evidence(method)
    parts = {"taylor": np.array(first) * costs / 4, "fisher": np.array(second) * costs / 4}

    def table(components: dict[str, np.ndarray]) -> Columns:
        importance = np.sum(list(components.values()), axis=0)
        return unit_index(architecture) | {"importance": importance, "cost": costs, "score": importance / costs}

    def overlap(components: dict[str, np.ndarray]) -> dict[str, float]:
        return dict(decide(Scores(architecture, table(components) | components, META), params, evidence).overlap)

    both, one = overlap(parts), allocate(architecture, table(parts), params, evidence)
    for name, values in parts.items():
        alone = allocate(architecture, table({name: values}), params, evidence)
        assert both[name] == jaccard(one.column, alone.column)
    assert overlap(parts | {"fisher": np.zeros(48)})["taylor"] == 1, "a second order of nothing changes nothing"
    assert overlap({"taylor": parts["taylor"]}) == {}
