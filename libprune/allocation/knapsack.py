"""Search: the level of every block that loses least for a target, from measured divergences."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from libprune.allocation.ladders import Ladders, empties_layer, parts_left, spent
from libprune.engine.architecture import Architecture, Block
from libprune.engine.tables import Columns
from libprune.pipeline.sections import Allocate

CHOICES = 64
"""Depths of a block that the knapsack chooses from, at most."""
BINS = 4096
"""Parts of the target that costs are counted in."""


def divergence_curves(architecture: Architecture, levels: Columns) -> dict[Block, NDArray[np.float64]]:
    """For every block the divergence by the number of units removed, ``[units + 1]``, nats.

    Measured levels are made non-decreasing (what is measured below an earlier level is noise) and
    joined by straight lines from 0 without a removal.
    """
    curves = {}
    for layer, part in architecture.blocks():
        rows = (levels["layer_idx"] == layer) & (levels["group_type"] == part)
        order = np.argsort(levels["removed"][rows])
        removed, measured = levels["removed"][rows][order], levels["divergence"][rows][order]
        rising = np.maximum.accumulate(np.maximum(measured, 0.0))
        counts = np.arange(architecture.units(part) + 1)
        curves[layer, part] = np.interp(counts, [0, *removed], [0.0, *rising])
    return curves


def least_divergence(
    architecture: Architecture,
    ladders: Ladders,
    curves: Mapping[Block, NDArray[np.float64]],
    target: int,
    may_empty: bool,
) -> dict[Block, int]:
    """The depths of least summed divergence that reach the target to within a step between choices.

    A multiple-choice knapsack, solved exactly by dynamic programming over costs in `BINS` parts of the
    target, each rounded up, so that the target is not passed.
    """
    if target <= 0:
        return dict.fromkeys(ladders, 0)
    tables = [
        _layer_choices(architecture, ladders, curves, layer, target, may_empty)
        for layer in range(architecture.layers)
        if parts_left(architecture, ladders, layer)
    ]
    best = np.full(BINS + 1, np.inf)
    best[0] = 0.0
    taken: list[NDArray[np.int64]] = []
    for options in tables:
        better, chosen = np.full(BINS + 1, np.inf), np.zeros(BINS + 1, dtype=np.int64)
        for number, option in enumerate(options):
            total = np.full(BINS + 1, np.inf)
            total[option.bins :] = best[: BINS + 1 - option.bins] + option.loss
            chosen[total < better] = number
            better = np.minimum(better, total)
        best = better
        taken.append(chosen)
    fullest = int(np.flatnonzero(np.isfinite(best))[-1])
    least = max(0, fullest - architecture.layers)  # rounding up may have added a bin a layer
    filled = least + int(np.argmin(best[least : fullest + 1]))
    depth: dict[Block, int] = {}
    for options, chosen in zip(reversed(tables), reversed(taken), strict=True):
        option = options[int(chosen[filled])]
        depth |= option.depth
        filled -= option.bins
    return depth


@dataclass(frozen=True)
class _Choice:
    """One depth for each block of a layer: bins of the target that it takes, and summed divergence."""

    depth: Mapping[Block, int]
    bins: int
    loss: float


def _layer_choices(
    architecture: Architecture,
    ladders: Ladders,
    curves: Mapping[Block, NDArray[np.float64]],
    layer: int,
    target: int,
    may_empty: bool,
) -> list[_Choice]:
    """All joint choices of a layer's blocks; those that would leave nothing of it only where that is allowed."""
    choices = [(_Choice({}, 0, 0.0), 0, True)]
    for part in parts_left(architecture, ladders, layer):
        block = layer, part
        costs = np.cumsum([0, *(step.cost for step in ladders[block])])
        gone = np.cumsum([0, *(len(step.units) for step in ladders[block])])
        depths = np.unique(np.linspace(0, len(ladders[block]), min(len(ladders[block]), CHOICES) + 1).round())
        choices = [
            (
                _Choice({**one.depth, block: depth}, 0, one.loss + float(curves[block][gone[depth]])),
                cost + int(costs[depth]),
                empty and gone[depth] == architecture.units(part),
            )
            for one, cost, empty in choices
            for depth in depths.astype(int).tolist()
        ]
    return [
        replace(one, bins=-(-cost * BINS // target))
        for one, cost, empty in choices
        if cost <= target and (may_empty or not empty)
    ]


def fill(
    architecture: Architecture,
    ladders: Ladders,
    curves: Mapping[Block, NDArray[np.float64]],
    depth: Mapping[Block, int],
    target: int,
    params: Allocate,
) -> dict[Block, int]:
    """Go on step by step where the next one loses least for what it saves, as long as it fits into the target."""
    filled = dict(depth)
    left = target - spent(ladders, filled)
    while True:
        slopes = {
            block: _slope(ladders, curves, block, filled[block])
            for block, steps in ladders.items()
            if filled[block] < len(steps)
            and steps[filled[block]].cost <= left
            and (params.may_empty or not empties_layer(architecture, ladders, filled, block))
        }
        if not slopes:
            return filled
        block = min(slopes, key=lambda block: slopes[block])
        left -= ladders[block][filled[block]].cost
        filled[block] += 1


def _slope(ladders: Ladders, curves: Mapping[Block, NDArray[np.float64]], block: Block, depth: int) -> float:
    step = ladders[block][depth]
    gone = sum(len(step.units) for step in ladders[block][:depth])
    return float(curves[block][gone + len(step.units)] - curves[block][gone]) / step.cost
