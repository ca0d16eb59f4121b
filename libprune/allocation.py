"""Allocation: which units go, so that a given share of the parameters is removed.

In every block the units go in ascending order of rank, in steps: one unit, or as many channels as
keep their count a multiple. What differs between methods is how far each block goes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune import cost
from libprune.architecture import Architecture
from libprune.artifacts import Columns
from libprune.errors import BudgetError, LibpruneError
from libprune.params import Allocate
from libprune.plan import Plan

Block = tuple[int, str]
_FLOORS = {"attention": "min_groups", "mlp": "min_channels"}


@dataclass(frozen=True)
class Step:
    """The next removal in a block: which units, what they cost, their rank and summed importance."""

    units: tuple[int, ...]
    cost: int
    rank: float
    importance: float


Ladders = Mapping[Block, tuple[Step, ...]]
"""For every block the removals that are allowed, in the order in which they happen."""


def target_parameters(architecture: Architecture, params: Allocate) -> int:
    """How many parameters are to go."""
    base = architecture.decoder_parameters if params.ratio_of == "decoder" else architecture.total_parameters
    return round(params.ratio * base)


def allocate(architecture: Architecture, scores: Columns, params: Allocate) -> Plan:
    """Decide which units stay.

    Args:
        architecture: the model's description.
        scores: the importance table, rows in the order of `libprune.artifacts.unit_index`.
        params: budget, method and limits.

    Raises:
        BudgetError: if the target cannot be reached under the floors, or not in the asked shape.
    """
    ladders = build_ladders(architecture, scores, params)
    target = target_parameters(architecture, params)
    depth = METHODS[params.method](architecture, ladders, target, params)
    plan = _plan(architecture, ladders, depth)
    _check_reached(architecture, ladders, plan, target, params)
    return plan


def result_shape(architecture: Architecture, plan: Plan, params: Allocate) -> str:
    """`uniform` or `per_layer`, as asked for or as the plan allows.

    Raises:
        BudgetError: if `uniform` is asked for and the plan is not.
    """
    reason = _not_uniform(architecture, plan)
    if params.shape == "uniform" and reason:
        raise BudgetError(
            f"allocate.shape is uniform, but {reason}; choose allocate.method: uniform without frozen layers, "
            "or allocate.shape: per_layer"
        )
    return "per_layer" if reason or params.shape == "per_layer" else "uniform"


def _not_uniform(architecture: Architecture, plan: Plan) -> str | None:
    if not plan.uniform:
        return "the layers of this plan differ in width"
    layer = plan.layers[0]
    for part, shape in architecture.parts.items():
        if not shape.says(plan.kept(layer, part)):
            return f"the stock config of this family cannot say {plan.kept(layer, part)} {part} units"
    return None


@dataclass(frozen=True)
class Decision:
    """A plan, the shape it is to be saved in, how it split the budget, and its overlap with the plans of
    the criterion's components.
    """

    plan: Plan
    shape: str
    split: str
    overlap: Mapping[str, float]

    @property
    def keep_column(self) -> NDArray[np.bool_]:
        """The plan as a column of the importance table."""
        return np.concatenate(list(self.plan.keep.values()))


def decide(architecture: Architecture, scores: Columns, meta: Mapping[str, Any], params: Allocate) -> Decision:
    """Check that the scores may be used as asked, allocate, and settle the shape.

    Raises:
        LibpruneError: if the scores do not compare across layers and the method needs that, or the
            budget or shape cannot be had.
    """
    comparable = meta["comparable"] and meta["scaling"] == "none"
    _require_comparable(meta, params)
    if params.split == "auto":
        params = params.model_copy(update={"split": "importance" if comparable else "proportional"})
    plan = allocate(architecture, scores, params)
    components = [name for name in scores if name in COMPARED_COMPONENTS and meta["scaling"] == "none"]
    overlap = {}
    for name in components if len(components) > 1 else []:
        alone = scores | {"importance": scores[name], "score": scores[name] / scores["cost"]}
        overlap[name] = jaccard(plan, allocate(architecture, alone, params))
    return Decision(plan, result_shape(architecture, plan, params), params.split, overlap)


COMPARED_COMPONENTS = ("taylor", "fisher")
"""Parts of a second-order criterion: a kept set equal to the first's says that the second did nothing."""


def _require_comparable(meta: Mapping[str, Any], params: Allocate) -> None:
    if params.method == "global" and not meta["comparable"] and meta["scaling"] == "none":
        raise LibpruneError(
            f"{meta['criterion']} compares only within a layer and type, so allocate.method: global would rank "
            "unlike things; set score.scaling to zscore, minmax or rank, or allocate.method to uniform"
        )


def summary(architecture: Architecture, decision: Decision, params: Allocate) -> dict[str, Any]:
    """The content of `metrics/allocation.json`."""
    removed = _removed(architecture, decision.plan)
    return {
        "target_parameters": target_parameters(architecture, params),
        "removed_parameters": removed,
        "decoder_share_removed": removed / architecture.decoder_parameters,
        "total_share_removed": removed / architecture.total_parameters,
        "kept_set_overlap": dict(decision.overlap),
    }


def build_ladders(architecture: Architecture, scores: Columns, params: Allocate) -> Ladders:
    """The allowed removals of every block; ties break by unit."""
    ladders: dict[Block, tuple[Step, ...]] = {}
    start = 0
    for layer, part in architecture.blocks():
        rows = slice(start, start + architecture.units(part))
        start = rows.stop
        frozen = layer < params.freeze_first or layer >= architecture.layers - params.freeze_last
        rank, importance = scores[params.rank_by][rows], scores["importance"][rows]
        ladders[layer, part] = () if frozen else _ladder(architecture, layer, part, rank, importance, params)
    return ladders


def _ladder(
    architecture: Architecture,
    layer: int,
    part: str,
    rank: NDArray[np.float64],
    importance: NDArray[np.float64],
    params: Allocate,
) -> tuple[Step, ...]:
    multiple = params.channel_multiple if part == "mlp" else 1
    floor = getattr(params, _FLOORS[part])
    unit_cost = cost.unit_parameters(architecture, layer, part)
    order = np.argsort(rank, kind="stable")
    steps: list[Step] = []
    gone = 0
    while gone < len(order):
        size = (len(order) - gone) % multiple or multiple
        left = len(order) - gone - size
        if left < floor:
            break
        units = order[gone : gone + size]
        overhead = cost.part_overhead(architecture, layer, part) if left == 0 else 0
        total = size * unit_cost + overhead
        # The mean of equal ranks may round down; ranks that descend would let a later step sort first.
        mean = max(float(rank[units].mean()), steps[-1].rank if steps else -np.inf)
        steps.append(Step(tuple(units.tolist()), total, mean, float(importance[units].sum())))
        gone += size
    return tuple(steps)


def _global(architecture: Architecture, ladders: Ladders, target: int, params: Allocate) -> dict[Block, int]:
    """The lowest ranks over all blocks first; ties break by layer, then type, then unit.

    A removal that no longer fits is passed over, so that the target is missed by less than the
    cheapest removal that is left.
    """
    order = sorted(
        (step.rank, layer, list(architecture.parts).index(part), position)
        for (layer, part), steps in ladders.items()
        for position, step in enumerate(steps)
    )
    depth = dict.fromkeys(ladders, 0)
    removed = 0
    for _, layer, part_index, position in order:
        block = (layer, list(architecture.parts)[part_index])
        step = ladders[block][position]
        fits = removed + step.cost <= target and depth[block] == position
        if fits and (params.allow_layer_removal or not _empties_layer(architecture, ladders, depth, block)):
            depth[block] += 1
            removed += step.cost
    return depth


def _empties_layer(architecture: Architecture, ladders: Ladders, depth: Mapping[Block, int], block: Block) -> bool:
    """Whether one more removal in a block would leave its layer with nothing."""
    layer, _ = block
    if depth[block] + 1 < len(ladders[block]):
        return False
    left = 0
    for part in architecture.parts:
        other = (layer, part)
        taken = depth[other] + (1 if other == block else 0)
        left += architecture.units(part) - sum(len(step.units) for step in ladders[other][:taken])
    return left == 0


def _uniform(architecture: Architecture, ladders: Ladders, target: int, params: Allocate) -> dict[Block, int]:
    """The same number of removals in every layer that is not frozen.

    Of all splits between the parts, those that come nearest to the target (within one removal of
    the cheapest part in every layer) are considered; `split` chooses among them.
    """
    layers = [layer for layer in range(architecture.layers) if any(ladders[layer, p] for p in architecture.parts)]
    if not layers:
        return dict.fromkeys(ladders, 0)
    first = {part: ladders[layers[0], part] for part in architecture.parts}
    options = {part: _options(architecture, first[part], part, params) for part in first}
    spent = {part: _totals([[step.cost for step in ladders[layer, part]] for layer in layers]) for part in first}
    lost = {part: _totals([[step.importance for step in ladders[layer, part]] for layer in layers]) for part in first}
    gone = {part: _totals([[len(step.units) for step in first[part]]]) / architecture.units(part) for part in first}
    may_empty = params.allow_layer_removal and len(layers) < architecture.layers

    def allowed(split: Split) -> bool:
        return may_empty or any(gone[part][i] < 1 for part, i in split.items())

    splits = _splits(options, spent, target, allowed)

    def miss(split: Split) -> float:
        return abs(target - float(sum(spent[part][i] for part, i in split.items())))

    def preference(split: Split) -> float:
        if params.split == "importance":
            return float(sum(lost[part][i] for part, i in split.items()))
        shares = [float(gone[part][i]) for part, i in split.items()]
        return max(shares) - min(shares)

    cheapest = min((len(layers) * steps[0].cost for steps in first.values() if steps), default=0)
    reach = max(cheapest, min(map(miss, splits)))
    best = min((split for split in splits if miss(split) <= reach), key=lambda split: (preference(split), miss(split)))
    return {(layer, part): best[part] if layer in layers else 0 for layer, part in ladders}


Split = Mapping[str, int]
"""For each part the number of removals in every layer."""


def _totals(values: list[list[Any]]) -> NDArray[np.float64]:
    """Sums over layers of the first 0, 1, 2, ... steps; ``[steps + 1]``."""
    return np.concatenate([[0.0], np.cumsum(np.sum(np.array(values, dtype=np.float64), axis=0))])


def _options(architecture: Architecture, ladder: tuple[Step, ...], part: str, params: Allocate) -> list[int]:
    """How many removals leave a count that the result's shape can hold."""
    kept = architecture.units(part) - np.cumsum([0, *(len(step.units) for step in ladder)])
    any_count = params.shape == "per_layer"
    shape = architecture.parts[part]
    return [i for i, count in enumerate(kept) if i == 0 or any_count or (count > 0 and shape.says(int(count)))]


def _splits(
    options: Mapping[str, list[int]],
    spent: Mapping[str, NDArray[np.float64]],
    target: int,
    allowed: Callable[[Split], bool],
) -> list[Split]:
    """For every choice in the other parts the allowed one nearest to the target in the part of finest steps."""
    finest = min(options, key=lambda part: spent[part][1] if len(spent[part]) > 1 else np.inf)
    others = [part for part in options if part != finest]
    choices = np.array(options[finest])
    splits: list[Split] = []
    for chosen in product(*(options[part] for part in others)):
        rest = target - sum(spent[part][i] for part, i in zip(others, chosen, strict=True))
        order = np.argsort(np.abs(spent[finest][choices] - rest), kind="stable")
        fills = (dict(zip(others, chosen, strict=True)) | {finest: int(fill)} for fill in choices[order])
        splits.extend(islice(filter(allowed, fills), 1))
    return splits


METHODS = {"uniform": _uniform, "global": _global}


def _plan(architecture: Architecture, ladders: Ladders, depth: Mapping[Block, int]) -> Plan:
    keep = {block: np.ones(architecture.units(block[1]), dtype=bool) for block in ladders}
    for block, steps in depth.items():
        for step in ladders[block][:steps]:
            keep[block][list(step.units)] = False
    return Plan(keep)


def _check_reached(architecture: Architecture, ladders: Ladders, plan: Plan, target: int, params: Allocate) -> None:
    """Stop when more is asked for than the method can remove at all; coarse steps alone are no error."""
    removed = _removed(architecture, plan)
    cheapest = min((step.cost for steps in ladders.values() for step in steps), default=0)
    if target - removed <= cheapest:
        return
    everything = METHODS[params.method](architecture, ladders, architecture.total_parameters, params)
    most = _removed(architecture, _plan(architecture, ladders, everything))
    if most < target:
        base = target / params.ratio
        raise BudgetError(
            f"allocate.ratio = {params.ratio} of the {params.ratio_of} parameters cannot be removed: under the floors, "
            f"frozen layers and shape {params.method} removes at most {most / base:.3f} ({most:,} parameters of "
            f"{target:,} asked for). Lower the ratio, min_groups, min_channels or the number of frozen layers"
        )


def _removed(architecture: Architecture, plan: Plan) -> int:
    return architecture.decoder_parameters - cost.size(architecture, plan).decoder


def jaccard(one: Plan, two: Plan) -> float:
    """Overlap of the kept sets of two plans: kept in both over kept in either."""
    both = sum(int((one.keep[block] & two.keep[block]).sum()) for block in one.keep)
    either = sum(int((one.keep[block] | two.keep[block]).sum()) for block in one.keep)
    return both / either
