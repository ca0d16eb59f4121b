"""The allocation methods one by one; what all have in common is in tests/contracts/test_allocations.py."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from libprune.allocation.allocate import allocate, target_of
from libprune.allocation.decide import decide
from libprune.allocation.methods import functional_shares
from libprune.engine.architecture import Architecture
from libprune.engine.cost import prices
from libprune.engine.errors import BudgetError
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns, split_blocks
from libprune.pipeline.artifacts import Scores
from libprune.pipeline.sections import Allocate
from tests.support.shapes import EQUAL_COSTS, Shape, drawn, ladders_of, removed_parameters


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


@st.composite
def changes(draw):
    """The change and the removable parameters of some layers, some of them alike, and a mean share."""
    layers = draw(st.integers(1, 8))
    change = [k / 8 for k in draw(st.lists(st.integers(0, 8), min_size=layers, max_size=layers))]
    sizes = draw(st.lists(st.integers(1, 10**6), min_size=layers, max_size=layers))
    return np.array(change), np.array(sizes), draw(st.floats(0.01, 1.0))


@given(changes())
def test_the_shares_meet_the_mean_within_half_and_one_and_a_half_times_it(problem):
    change, sizes, mean = problem
    shares = functional_shares(change, sizes, mean)
    assert (shares * sizes).sum() == pytest.approx(mean * sizes.sum(), rel=1e-9)
    assert (shares >= 0.5 * mean * (1 - 1e-9)).all()
    assert (shares <= min(1.0, 1.5 * mean * (1 + 1e-9))).all()


@given(changes())
def test_a_layer_that_changes_its_input_more_never_loses_more_and_equals_lose_alike(problem):
    change, sizes, mean = problem
    shares = functional_shares(change, sizes, mean)
    order = np.argsort(change)
    assert (np.diff(shares[order]) <= 1e-12).all()
    for value in set(change):
        assert np.ptp(shares[change == value]) == 0
    if len(set(change)) == 1:
        np.testing.assert_allclose(shares, mean, rtol=1e-9)


def test_between_the_bounds_the_shares_fall_in_proportion_to_the_change():
    """Layers of one size whose scaled changes are 0, 0.25, 0.75 and 1: r (1.5 - c) has the mean r as it is."""
    shares = functional_shares(np.array([0.2, 0.3, 0.5, 0.6]), np.full(4, 100), 0.2)
    np.testing.assert_allclose(shares, [0.3, 0.25, 0.15, 0.1], rtol=1e-9)


@given(st.integers(1, 3), st.integers(2, 4), st.integers(2, 9), st.integers(0, 2**32 - 1), st.floats(0.05, 0.6))
def test_a_uniform_search_takes_the_split_of_least_summed_divergence(layers, kv, ffn, seed, ratio):
    """Against every split that removes no more than the target, and as near to it as a step in every layer."""
    shape, rng = Shape(layers=layers, kv=kv, ffn=ffn), np.random.default_rng(seed)
    params = Allocate(method="search", shape="uniform", ratio=ratio)
    curves, scores = shape.curves(rng), shape.table(1.0 + rng.permutation(len(shape.unit_costs())))
    assume(ratio < shape.reachable(params) / shape.decoder)
    architecture, target = shape.architecture(), target_of(prices(shape.architecture(), "parameters"), params)
    plan = allocate(architecture, scores, params, {"levels": curves})
    assert plan.uniform

    def removed(groups: int, channels: int) -> int:
        return layers * (groups * shape.group_cost + channels * shape.channel_cost)

    def divergence(groups: int, channels: int) -> float:
        gone = {"attention": groups, "mlp": channels}
        return float(sum(curves[layer, part][count] for layer in range(layers) for part, count in gone.items()))

    step = layers * shape.channel_cost
    found = kv - plan.kept(0, "attention"), ffn - plan.kept(0, "mlp")
    assert removed(*found) <= target
    splits = [(g, c) for g in range(kv) for c in range(ffn) if target - step < removed(g, c) <= target]
    if splits:
        assert found in splits
        least = min(divergence(*split) for split in splits)
        assert divergence(*found) == pytest.approx(least, rel=1e-5, abs=1e-12)


def test_the_result_of_a_uniform_search_has_the_stock_shape():
    params = Allocate(method="search", shape="uniform", ratio=0.3)
    meta = {"criterion": "random", "comparable": True, "scaling": "none"}
    scores = EQUAL_COSTS.table(np.arange(48.0))
    decision = decide(Scores(EQUAL_COSTS.architecture(), scores, meta), params, EQUAL_COSTS.evidence("search"))
    assert decision.shape == "uniform"


def test_a_target_of_no_parameter_at_all_removes_nothing():
    shape = Shape()
    params = Allocate(method="search", shape="per_layer", ratio=1e-9)
    plan = allocate(shape.architecture(), shape.table(np.arange(48.0)), params, shape.evidence("search"))
    assert removed_parameters(shape, plan) == 0
