"""The integer programme and the fill of `search`, against trying all choices one by one."""

from collections.abc import Iterator, Mapping
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from libprune.allocation import programme
from libprune.allocation.ladders import Ladders, empties_layer, plan_of
from libprune.allocation.programme import Limit, Programme, fill, least_divergence, lost
from libprune.engine.architecture import WITH_LAYER, Block
from libprune.engine.cost import Prices, prices
from libprune.pipeline.sections import Allocate
from tests.support.shapes import Shape, ladders_of, removed_parameters

Curves = dict[Block, np.ndarray]
CLOSE = {"rel": 1e-5, "abs": 1e-12}


@st.composite
def problems(draw, layers: int = 3):
    """A small shape, params without floors, a target between one channel and the whole decoder, and curves."""
    shape = Shape(
        layers=draw(st.integers(1, layers)),
        kv=draw(st.integers(1, 2)),
        q=draw(st.integers(1, 2)),
        ffn=draw(st.integers(1, 4)),
        model=draw(st.integers(1, 40)),
        bias=draw(st.booleans()),
    )
    params = Allocate(
        method="search",
        shape="per_layer",
        min_groups=draw(st.integers(0, 1)),
        min_channels=draw(st.integers(0, 1)),
        freeze_first=draw(st.integers(0, 1)),
        depth=draw(st.sampled_from(["none", "units"])),
    )
    target = draw(st.integers(shape.channel_cost, shape.decoder))
    return shape, params, target, shape.curves(np.random.default_rng(draw(st.integers(0, 2**32 - 1))))


def all_ladders(shape: Shape, params: Allocate) -> Ladders:
    return ladders_of(shape.architecture(), shape.table(np.ones(len(shape.unit_costs()))), params)


def found_for(problem) -> dict[Block, int]:
    shape, params, target, curves = problem
    ladders, costs = all_ladders(shape, params), prices(shape.architecture(), "parameters")
    return least_divergence(shape.architecture(), ladders, curves, target, costs, params).depth


def choices(shape: Shape, ladders: Ladders, may_empty: bool) -> Iterator[dict[Block, int]]:
    """Every choice of depths that leaves each layer something, or at least one layer."""
    for depths in product(*(range(len(steps) + 1) for steps in ladders.values())):
        chosen = dict(zip(ladders, depths, strict=True))
        layers = plan_of(shape.architecture(), ladders, chosen).layers
        if len(layers) == shape.layers or (may_empty and layers):
            yield chosen


def spent(ladders: Ladders, depth: Mapping[Block, int]) -> int:
    return sum(step.cost for block, steps in ladders.items() for step in steps[: depth[block]])


# One budget


@settings(max_examples=60)
@given(problems(layers=2))
def test_no_choice_that_comes_as_near_to_the_target_loses_less(problem):
    """Against all choices within the cheapest step of the target, if there are any."""
    shape, params, target, curves = problem
    ladders, depth = all_ladders(shape, params), found_for(problem)
    cheapest = min((step.cost for steps in ladders.values() for step in steps), default=1)
    near = [d for d in choices(shape, ladders, params.may_empty) if 0 <= target - spent(ladders, d) < cheapest]
    if near:
        assert 0 <= target - spent(ladders, depth) < cheapest
        assert lost(ladders, curves, depth) == pytest.approx(min(lost(ladders, curves, d) for d in near), **CLOSE)


def test_of_two_ways_to_remove_the_same_the_one_of_less_divergence_is_taken():
    """39 channels from a layer that hardly needs them, or 36 from it and 3 from one that does."""
    shape = Shape(layers=2, kv=1, q=1, d=1, ffn=40)
    params = Allocate(method="search")
    ladders = all_ladders(shape, params)
    cheap, dear = 0.001 * np.arange(41), 10.0 * np.arange(41)
    curves = {(0, "mlp"): cheap, (1, "mlp"): dear} | {(layer, "attention"): np.zeros(2) for layer in range(2)}
    depth = found_for((shape, params, 39 * shape.channel_cost + 7, curves))
    assert spent(ladders, depth) == 39 * shape.channel_cost
    assert lost(ladders, curves, depth) == pytest.approx(0.039)


@given(problems())
def test_the_target_is_never_passed_layers_go_only_where_that_is_allowed_and_no_step_still_fits(problem):
    shape, params, target, curves = problem
    architecture, ladders = shape.architecture(), all_ladders(shape, params)
    depth = found_for(problem)
    plan = plan_of(architecture, ladders, depth)
    assert spent(ladders, depth) == removed_parameters(shape, plan) <= target
    assert params.may_empty or plan.layers == tuple(range(shape.layers))
    assert fill(architecture, ladders, curves, depth, target, params) == depth or params.may_empty
    assert found_for(problem) == depth, "the same again"


# Several budgets


@st.composite
def budgets(draw):
    """A small problem with two or three made-up prices, some of them of whole parts and layers, and what is to go."""
    shape, params, _, curves = draw(problems(layers=2))
    blocks = list(shape.architecture().blocks())
    price = st.integers(0, 9)
    limits = []
    for name in draw(st.sampled_from(["ab", "abc"])):
        unit = {block: draw(price) for block in blocks}
        rest = {block: draw(price) for block in blocks}
        rest |= {(layer, WITH_LAYER): draw(price) for layer in range(shape.layers) if draw(st.booleans())}
        dense = sum(unit[layer, part] * shape.units[part] + rest[layer, part] for layer, part in blocks)
        limits.append(Limit(name, Prices(unit, rest, dense, dense), draw(st.integers(0, max(1, dense * 2 // 3)))))
    return shape, params, curves, limits


def met(shape: Shape, ladders: Ladders, depth: Mapping[Block, int], limits: list[Limit]) -> bool:
    plan = plan_of(shape.architecture(), ladders, depth)
    return all(limit.prices.removed(plan) >= limit.least for limit in limits)


@settings(max_examples=80)
@given(budgets(), st.booleans())
def test_several_limits_are_met_at_the_least_loss_and_only_as_far_as_needed(problem, in_two_steps):
    shape, params, curves, limits = problem
    ladders, may_empty = all_ladders(shape, params), params.may_empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programme, "FEW", 0 if in_two_steps else 10**9)
        found = Programme(shape.architecture(), ladders, curves, limits, may_empty).solve()
    meeting = [depth for depth in choices(shape, ladders, may_empty) if met(shape, ladders, depth, limits)]
    if found is None:
        assert not meeting
        return
    assert met(shape, ladders, found.depth, limits)
    least = min(lost(ladders, curves, depth) for depth in meeting)
    assert found.divergence == pytest.approx(lost(ladders, curves, found.depth))
    assert found.bound <= least * (1 + 1e-9) + 1e-12
    assert least <= found.divergence * (1 + 1e-9) + 1e-12
    assert found.divergence - least <= programme.NEAR * found.divergence + 1e-12
    assert found.gap <= programme.NEAR
    for block, depth in found.depth.items():
        assert not depth or not met(shape, ladders, {**found.depth, block: depth - 1}, limits)


@settings(max_examples=40)
@given(budgets())
def test_all_layers_alike_are_met_at_the_least_loss_too(problem):
    """Of the same count of each part in every layer that is not frozen, none of them 0."""
    shape, params, curves, limits = problem
    params = params.model_copy(update={"min_groups": 0, "min_channels": 0})
    ladders = all_ladders(shape, params)
    found = Programme(shape.architecture(), ladders, curves, limits, False, alike=True).solve()
    layers = shape.unfrozen(params)
    meeting = []
    for groups, channels in product(range(shape.kv), range(shape.ffn)):
        gone = {"attention": groups, "mlp": channels}
        depth = {(layer, part): gone[part] if layer in layers else 0 for layer, part in ladders}
        if met(shape, ladders, depth, limits):
            meeting.append(lost(ladders, curves, depth))
    if found is None:
        assert not meeting
    else:
        assert met(shape, ladders, found.depth, limits)
        assert found.divergence == pytest.approx(min(meeting), **CLOSE)
        assert len({found.depth[layer, "mlp"] for layer in layers}) <= 1


@settings(max_examples=30)
@given(budgets())
def test_the_bound_lies_below_and_the_most_is_the_most(problem):
    shape, params, curves, limits = problem
    ladders, may_empty = all_ladders(shape, params), params.may_empty
    whole = Programme(shape.architecture(), ladders, curves, limits, may_empty)
    found = whole.solve()
    assert whole.bound() <= (np.inf if found is None else found.divergence * (1 + 1e-9) + 1e-12)
    plans = [plan_of(shape.architecture(), ladders, depth) for depth in choices(shape, ladders, may_empty)]
    for number, limit in enumerate(limits):
        options = whole.most(number)
        assert whole.removed(options)[number] == max(limit.prices.removed(plan) for plan in plans)


def test_what_is_missed_by_the_rounding_of_the_solver_is_asked_for_again():
    """A price of 10^15 with a tolerance of 10^-6 of a row of 10^6."""
    shape = Shape(layers=2, kv=1, ffn=3)
    params = Allocate(method="search", shape="per_layer", min_groups=1)
    ladders = all_ladders(shape, params)
    unit = {block: 10**15 + 3 * block[0] + 1 for block in shape.architecture().blocks()}
    limit = Limit("x", Prices(unit, {}, 0, 0), 10**15 + 2)
    curves = {block: float(1 + block[0]) * np.arange(4.0) for block in ladders}
    found = Programme(shape.architecture(), ladders, curves, [limit], False).solve()
    assert found.depth[1, "mlp"] == 1
    assert found.depth[0, "mlp"] == 0


# The fill


@given(problems(), st.integers(0, 2**32 - 1))
def test_the_fill_goes_on_from_any_depths_until_no_step_fits(problem, seed):
    shape, params, target, curves = problem
    architecture, ladders, rng = shape.architecture(), all_ladders(shape, params), np.random.default_rng(seed)
    start = {block: int(rng.integers(len(steps) + 1)) for block, steps in ladders.items()}
    assume(spent(ladders, start) <= target)
    assume(params.may_empty or plan_of(architecture, ladders, start).layers == tuple(range(shape.layers)))
    found = fill(architecture, ladders, curves, start, target, params)
    assert all(found[block] >= depth for block, depth in start.items())
    left = target - spent(ladders, found)
    assert left >= 0
    for block, steps in ladders.items():
        if found[block] < len(steps) and steps[found[block]].cost <= left:
            assert not params.may_empty
            assert empties_layer(architecture, ladders, found, block)


@pytest.mark.parametrize(
    ("steps", "groups", "channels"), [(1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 1, 3), (5, 2, 3), (9, 2, 3)]
)
def test_the_least_slope_is_taken_first(steps, groups, channels):
    """A group and a channel cost the same; rises of 5, 6 for groups and 1, 4, 1 for channels, seen one at a time."""
    shape = Shape(layers=1, kv=3, q=1, d=1, ffn=4, gates=3)
    curves = {(0, "attention"): np.array([0.0, 5, 11, 99]), (0, "mlp"): np.array([0.0, 1, 5, 6, 99])}
    params = Allocate(method="search")
    ladders = all_ladders(shape, params)
    target = steps * shape.channel_cost + shape.channel_cost // 2
    found = fill(shape.architecture(), ladders, curves, dict.fromkeys(ladders, 0), target, params)
    assert found == {(0, "attention"): groups, (0, "mlp"): channels}


def test_the_slope_is_the_rise_over_the_cost():
    """A group rises twice as high as a channel, but takes more than twice the parameters with it."""
    shape = Shape(layers=1, kv=2, ffn=2)
    assert shape.group_cost > 2 * shape.channel_cost
    curves = {(0, "attention"): np.array([0.0, 2, 4]), (0, "mlp"): np.array([0.0, 1, 2])}
    params = Allocate(method="search")
    ladders = all_ladders(shape, params)
    found = fill(shape.architecture(), ladders, curves, dict.fromkeys(ladders, 0), shape.group_cost, params)
    assert found == {(0, "attention"): 1, (0, "mlp"): 0}
