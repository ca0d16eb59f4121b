"""Ladders: the removals that are allowed in each block, in the order in which they happen.

In every block the units go in ascending order of rank, in steps: one unit, as many channels as keep
their count a multiple, or all units at once where a norm couples them. What differs between allocation
methods is how far each block goes.

Query heads go in steps of two kinds: the lowest head of every group that is left, or the lowest group
(`libprune.engine.cost.removals_of_heads`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from libprune.engine.architecture import Architecture, Block
from libprune.engine.cost import Prices, Removals, removals_of_heads
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns
from libprune.pipeline.methods import METHODS, allocation_reads
from libprune.pipeline.sections import Allocate


@dataclass(frozen=True)
class Step:
    """The next removal in a block.

    Attributes:
        units: which go.
        cost: what that saves.
        rank: of the step among those of all blocks.
        importance: of the units together.
        forced: whether it happens in any case, as the first of its ladder.
    """

    units: tuple[int, ...]
    cost: int
    rank: float
    importance: float
    forced: bool = False


Ladders = Mapping[Block, tuple[Step, ...]]
"""For every block the removals that are allowed, in the order in which they happen.

A block that may lose nothing has an empty ladder; a block that is gone as a whole already has none.
"""


def build_ladders(architecture: Architecture, scores: Columns, params: Allocate, prices: Prices) -> Ladders:
    """The allowed removals of every block; ties break by unit. The multiple of channels is settled."""
    assert params.channel_multiple != "auto"
    ladders: dict[Block, tuple[Step, ...]] = {}
    heads = _removals_of_heads(architecture, scores, params, prices)
    start = 0
    for layer, part in architecture.blocks():
        rows = slice(start, start + architecture.units(part))
        start = rows.stop
        frozen = layer < params.freeze_first or layer >= architecture.layers - params.freeze_last
        rank, importance = scores[params.rank_by][rows], scores["importance"][rows]
        if (layer, part) in heads:
            steps = _of_heads((layer, part), heads[layer, part], rank, importance, prices, params)
            ladders[layer, part] = () if frozen else within_floor(architecture, part, steps, params.min_groups)
            continue
        unit, rest = prices.unit[layer, part], prices.rest[layer, part]
        multiple = 1 if architecture.grouped(part) else params.channel_multiple
        multiple = math.lcm(multiple, architecture.multiple(part)) * architecture.parts[part].groups
        multiple = len(rank) if architecture.parts[part].coupled else multiple
        floor, order = floor_of(architecture, part, params), _order(rank, architecture.parts[part].groups)
        ladders[layer, part] = () if frozen else _ladder(rank, importance, order, unit, rest, multiple, floor)
    return ladders


def _removals_of_heads(
    architecture: Architecture, scores: Columns, params: Allocate, prices: Prices
) -> Mapping[Block, Removals]:
    """By block the removals of query heads, where these are the units.

    All blocks go through the same numbers of heads and groups where the plan must, or was measured so.

    Raises:
        LibpruneError: if nothing is gained by single heads, but levels were measured with them.
    """
    if architecture.heads == "groups":
        return {}
    measured = "levels" in allocation_reads(params.method)
    alike = measured or METHODS[params.method].alike or params.shape == "uniform" or architecture.alike
    free = [part for (_, part), unit in prices.unit.items() if architecture.parts[part].outer and unit == 0]
    if measured and free:
        raise LibpruneError(
            f"allocate.objective: {params.objective} gains nothing by single query heads, but allocate.method: "
            f"{params.method} measures the model without them; set prepare.heads to groups, or choose another method"
        )
    floor = 1 if measured else params.min_groups
    return removals_of_heads(architecture, scores["importance"], alike, whole=bool(free), floor=floor)


def _of_heads(
    block: Block,
    removals: Removals,
    rank: NDArray[np.float64],
    importance: NDArray[np.float64],
    prices: Prices,
    params: Allocate,
) -> tuple[Step, ...]:
    """The steps of a block whose units are query heads.

    A rank that is importance over price is that of a step: with a group goes more than its heads.
    """
    unit, groups = prices.unit[block], prices.groups[block]
    keep, steps = np.ones(len(rank), dtype=bool), list[Step]()
    before = 0
    for removed in removals:
        units = list(removed)
        keep[units] = False
        heads, gone = len(units) * unit, groups.removed(keep)
        total = heads + gone - before
        before = gone
        if total == 0:  # nothing to gain for this objective
            return ()
        mean = float(rank[units].mean())
        if params.rank_by == "score":
            mean *= len(units) * max(unit, 1) / total
        rest = prices.rest[block] if not keep.any() else 0
        mean = max(mean, steps[-1].rank if steps else -np.inf)
        steps.append(Step(tuple(units), total + rest, mean, float(importance[units].sum())))
    return tuple(steps)


def within_floor(architecture: Architecture, part: str, steps: tuple[Step, ...], floor: int) -> tuple[Step, ...]:
    """The steps that leave a floor: of units, or of groups where the units are query heads."""
    left = architecture.parts[part].left_after(architecture.units(part), [step.units for step in steps])
    return steps[: sum((kept if groups is None else groups) >= floor for kept, groups in left[1:])]


def _order(rank: NDArray[np.float64], groups: int) -> NDArray[np.int64]:
    """The units in ascending rank; with several groups the lowest of each, then the second of each, and so on."""
    within = np.argsort(rank.reshape(groups, -1), axis=1, kind="stable")
    return (within + within.shape[1] * np.arange(groups)[:, None]).T.flatten()


def _ladder(
    rank: NDArray[np.float64],
    importance: NDArray[np.float64],
    order: NDArray[np.int64],
    unit_price: int,
    rest: int,
    multiple: int,
    floor: int,
) -> tuple[Step, ...]:
    if unit_price == 0:  # nothing to gain for this objective
        return ()
    steps: list[Step] = []
    gone = 0
    while gone < len(order):
        size = (len(order) - gone) % multiple or multiple
        left = len(order) - gone - size
        if left < floor:
            break
        units = order[gone : gone + size]
        total = size * unit_price + (rest if left == 0 else 0)
        # The mean of equal ranks may round down; ranks that descend would let a later step sort first.
        mean = max(float(rank[units].mean()), steps[-1].rank if steps else -np.inf)
        steps.append(Step(tuple(units.tolist()), total, mean, float(importance[units].sum())))
        gone += size
    return tuple(steps)


def floor_of(architecture: Architecture, part: str, params: Allocate) -> int:
    """Units that every block of a part keeps, or groups of query heads; of experts as many as the router needs."""
    asked = {"groups": params.min_groups, "heads": params.min_groups, "channels": params.min_channels, "experts": 0}
    return max(asked[architecture.parts[part].units], architecture.parts[part].least)


def parts_left(architecture: Architecture, ladders: Ladders, layer: int) -> list[str]:
    """The parts of a layer that are not gone already."""
    return [part for part in architecture.parts_of(layer) if (layer, part) in ladders]


def empties_layer(architecture: Architecture, ladders: Ladders, depth: Mapping[Block, int], block: Block) -> bool:
    """Whether one more removal in a block would leave its layer with nothing."""
    layer, _ = block
    if depth[block] + 1 < len(ladders[block]):
        return False
    left = 0
    for part in parts_left(architecture, ladders, layer):
        other = (layer, part)
        taken = depth[other] + (1 if other == block else 0)
        left += architecture.units(part) - sum(len(step.units) for step in ladders[other][:taken])
    return left == 0


def forced_by(ladders: Ladders, plan: Plan) -> Ladders:
    """The ladders whose first steps, as far as a plan has taken them, happen in any case: as one, before all others.

    Args:
        plan: made from these ladders, or without some of their blocks.
    """
    forced: dict[Block, tuple[Step, ...]] = {}
    for block, steps in ladders.items():
        gone = int((~plan.keep[block]).sum())
        counts = np.cumsum([0, *(len(step.units) for step in steps)])
        taken = int(np.searchsorted(counts, gone))
        first = steps[:taken]
        units = tuple(unit for step in first for unit in step.units)
        both = sum(step.cost for step in first), -np.inf, sum(step.importance for step in first)
        forced[block] = (Step(units, *both, forced=True), *steps[taken:]) if units else steps
    return forced


def free_steps(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps of a ladder that do not happen in any case."""
    return steps[1:] if steps and steps[0].forced else steps


def forced_cost(ladders: Ladders) -> int:
    """What the forced steps save."""
    return sum(step.cost for steps in ladders.values() for step in steps if step.forced)


def spent(ladders: Ladders, depth: Mapping[Block, int]) -> int:
    """How much of the objective the given depths remove."""
    return sum(step.cost for block, steps in ladders.items() for step in steps[: depth[block]])


def plan_of(architecture: Architecture, ladders: Ladders, depth: Mapping[Block, int]) -> Plan:
    """The plan of the given depths: each block loses the first steps of its ladder, and all without a ladder."""
    keep = {block: np.full(architecture.units(block[1]), block in ladders) for block in architecture.blocks()}
    for block, steps in depth.items():
        for step in ladders[block][:steps]:
            keep[block][list(step.units)] = False
    return Plan(keep)
