"""Curves, the knapsack and the fill of `search`, against trying all choices one by one."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from libprune.allocation.knapsack import BINS, divergence_curves, fill, least_divergence
from libprune.allocation.ladders import Ladders, empties_layer, plan_of
from libprune.engine.architecture import Block
from libprune.engine.tables import Columns
from libprune.pipeline.sections import Allocate
from tests.support.shapes import Shape, ladders_of, removed_parameters

Curves = dict[Block, np.ndarray]


@st.composite
def problems(draw):
    """A small shape, params without floors, a target between one channel and the whole decoder, and curves."""
    shape = Shape(
        layers=draw(st.integers(1, 3)),
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


def choices(shape: Shape, params: Allocate, layer: int) -> list[tuple[int, int]]:
    """Numbers of groups and channels that one layer may lose."""
    if layer not in shape.unfrozen(params):
        return [(0, 0)]
    groups, channels = range(shape.kv - params.min_groups + 1), range(shape.ffn - params.min_channels + 1)
    whole = (shape.kv, shape.ffn)
    return [pair for pair in product(groups, channels) if params.may_empty or pair != whole]


def parameters(shape: Shape, groups: int, channels: int) -> int:
    emptied = (groups == shape.kv) + (channels == shape.ffn)
    return groups * shape.group_cost + channels * shape.channel_cost + emptied * shape.overhead


def sums(values: list[np.ndarray]) -> np.ndarray:
    """Of one value of every layer, in all combinations."""
    total = np.zeros(1)
    for value in values:
        total = np.add.outer(total, value).ravel()
    return total


def lost(ladders: Ladders, curves: Curves, depth: dict[Block, int]) -> float:
    return sum(float(curves[b][sum(len(step.units) for step in ladders[b][:n])]) for b, n in depth.items())


def spent(ladders: Ladders, depth: dict[Block, int]) -> int:
    return sum(step.cost for block, steps in ladders.items() for step in steps[: depth[block]])


# The knapsack


@given(problems())
def test_the_knapsack_finds_what_trying_all_choices_finds(problem):
    """Of all choices whose layers' costs, rounded up to `BINS`-ths of the target, fit, none that fills as much of it
    loses less.
    """
    shape, params, target, curves = problem
    architecture, ladders = shape.architecture(), all_ladders(shape, params)
    depth = least_divergence(architecture, ladders, curves, target, params.may_empty)
    bins, losses = [], []
    for layer in range(shape.layers):
        pairs = choices(shape, params, layer)
        bins.append(np.array([-(-parameters(shape, *pair) * BINS // target) for pair in pairs]))
        losses.append(np.array([curves[layer, "attention"][g] + curves[layer, "mlp"][c] for g, c in pairs]))
    filled, divergence = sums(bins), sums(losses)
    own = [parameters(shape, depth[layer, "attention"], depth[layer, "mlp"]) for layer in range(shape.layers)]
    found = sum(-(-cost * BINS // target) for cost in own)
    assert found <= BINS
    least = divergence[(filled >= found) & (filled <= BINS)].min()
    assert lost(ladders, curves, depth) == pytest.approx(least, rel=1e-9, abs=1e-12)


def test_of_two_ways_to_remove_the_same_the_one_of_less_divergence_is_taken():
    """39 channels from a layer that hardly needs them, or 36 from it and 3 from one that does."""
    shape = Shape(layers=2, kv=1, q=1, d=1, ffn=40)
    params = Allocate(method="search")
    architecture, ladders = shape.architecture(), all_ladders(shape, params)
    cheap, dear = 0.001 * np.arange(41), 10.0 * np.arange(41)
    curves = {(0, "mlp"): cheap, (1, "mlp"): dear} | {(layer, "attention"): np.zeros(2) for layer in range(2)}
    target = 39 * shape.channel_cost + 7
    depth = least_divergence(architecture, ladders, curves, target, False)
    depth = fill(architecture, ladders, curves, depth, target, params)
    assert spent(ladders, depth) == 39 * shape.channel_cost
    assert lost(ladders, curves, depth) == pytest.approx(0.039)


@given(problems())
def test_the_target_is_never_passed_and_layers_go_only_where_that_is_allowed(problem):
    shape, params, target, curves = problem
    architecture, ladders = shape.architecture(), all_ladders(shape, params)
    start = least_divergence(architecture, ladders, curves, target, params.may_empty)
    for depth in (start, fill(architecture, ladders, curves, start, target, params)):
        plan = plan_of(architecture, ladders, depth)
        assert spent(ladders, depth) == removed_parameters(shape, plan) <= target
        assert params.may_empty or plan.layers == tuple(range(shape.layers))


@given(problems())
def test_the_target_is_reached_to_within_a_step_and_the_rounding_of_every_layer(problem):
    shape, params, target, curves = problem
    architecture, ladders = shape.architecture(), all_ladders(shape, params)
    depth = least_divergence(architecture, ladders, curves, target, params.may_empty)
    left = target - spent(ladders, depth)
    for block, steps in ladders.items():
        last = depth[block] == len(steps)
        if not last and (params.may_empty or not empties_layer(architecture, ladders, depth, block)):
            assert left < steps[depth[block]].cost + (shape.layers + 1) * (1 + target / BINS)


def test_a_block_of_many_steps_has_the_whole_of_it_among_its_choices(monkeypatch):
    monkeypatch.setattr("libprune.allocation.knapsack.CHOICES", 3)
    shape = Shape(layers=2, ffn=13)
    params = Allocate(method="search", min_groups=4, min_channels=0)
    curves = shape.curves(np.random.default_rng(0))
    ladders = all_ladders(shape, params)
    found = least_divergence(shape.architecture(), ladders, curves, shape.decoder, False)
    assert found == {(0, "attention"): 0, (0, "mlp"): 13, (1, "attention"): 0, (1, "mlp"): 13}
    half = least_divergence(shape.architecture(), ladders, curves, 13 * shape.channel_cost, False)
    assert {half[layer, "mlp"] for layer in range(2)} <= {0, 4, 9, 13}


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


# Curves


@st.composite
def measured(draw):
    """A shape, and for every block some levels with their divergences, in any order of rows."""
    shape = Shape(layers=draw(st.integers(1, 3)), kv=draw(st.integers(1, 4)), ffn=draw(st.integers(1, 9)))
    value = st.integers(-4, 40).map(lambda k: k / 8)
    rows = [
        (layer, part, removed, draw(value))
        for layer in range(shape.layers)
        for part, units in shape.units.items()
        for removed in draw(st.sets(st.integers(1, units), min_size=1))
    ]
    return shape, draw(st.permutations(rows))


def table_of(rows: list[tuple[int, str, int, float]]) -> Columns:
    layers, parts, removed, divergence = zip(*rows, strict=True)
    return {
        "layer_idx": np.array(layers),
        "group_type": np.array(parts, dtype=object),
        "removed": np.array(removed),
        "divergence": np.array(divergence),
    }


@given(measured())
def test_a_curve_starts_at_0_never_falls_and_is_the_highest_so_far_at_every_measured_level(problem):
    shape, rows = problem
    curves = divergence_curves(shape.architecture(), table_of(rows))
    assert list(curves) == list(shape.architecture().blocks())
    for (layer, part), curve in curves.items():
        own = {removed: value for i, name, removed, value in rows if (i, name) == (layer, part)}
        assert curve.shape == (shape.architecture().units(part) + 1,)
        assert curve[0] == 0
        assert (np.diff(curve) >= -1e-12).all()
        for removed in own:
            highest = max(0.0, *(value for other, value in own.items() if other <= removed))
            assert curve[removed] == pytest.approx(highest, abs=1e-12)


@given(measured())
def test_between_measured_levels_a_curve_is_a_straight_line(problem):
    shape, rows = problem
    for (layer, part), curve in divergence_curves(shape.architecture(), table_of(rows)).items():
        knots = sorted({0} | {removed for i, name, removed, _ in rows if (i, name) == (layer, part)})
        for one, two in pairwise(knots):
            np.testing.assert_allclose(np.diff(curve[one : two + 1], 2), 0, atol=1e-12)
        assert (curve[knots[-1] :] == curve[knots[-1]]).all()


def test_levels_that_rise_are_passed_through_and_a_fall_is_levelled():
    shape = Shape(layers=1, kv=2, ffn=6)
    rows = [(0, "attention", 1, 0.5), (0, "attention", 2, 2.0)]
    rows += [(0, "mlp", 2, 1.0), (0, "mlp", 4, 0.6), (0, "mlp", 6, 3.0)]
    curves = divergence_curves(shape.architecture(), table_of(rows))
    assert curves[0, "attention"].tolist() == [0, 0.5, 2]
    assert curves[0, "mlp"].tolist() == [0, 0.5, 1, 1, 1, 2, 3]
