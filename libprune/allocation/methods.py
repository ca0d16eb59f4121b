"""Allocation methods: how far down its ladder each block goes, for a target in what the objective counts."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.allocation.hgsp import block_factors, weighted
from libprune.allocation.ladders import Ladders, Step, empties_layer, forced_cost, free_steps, parts_left
from libprune.allocation.programme import least_divergence
from libprune.allocation.retention import by_progress, wanted_removals
from libprune.engine import cost
from libprune.engine.architecture import Architecture, Block
from libprune.pipeline.sections import Allocate

Evidence = Mapping[str, Any]
"""What allocation reads beside the scores' order, by the artifact that it comes from.

`scores` is the importance table; `activations` 1 - cosine between each layer's input and output, ``[layers]``;
`sensitivity` the loss increases of removing layers and blocks, by what is removed, ``[layers]`` each, nats; `levels`
for every block the divergence by the number of units removed, ``[units + 1]``, nats; `latency` the lines fitted to
measured times; `depth` the order of whole removals, each with what is gone by then and the divergence in nats, from
nothing on. The scores are always there, the others where `libprune.pipeline.methods.allocation_reads` names them.
"""
Order = Sequence[tuple[frozenset[Block], float]]
"""Whole removals one after the other: the blocks that are gone by then, and the divergence without them, nats per
token. It begins with nothing gone and 0.
"""
Depth = dict[Block, int]
"""How many steps of its ladder each block goes."""
Allocation = Callable[[Architecture, Ladders, int, Allocate, Evidence], Depth]
"""From the model's description, its ladders, the target in what the objective counts, the params and the evidence to
the depths."""


def allocate_global(
    architecture: Architecture, ladders: Ladders, target: int, params: Allocate, evidence: Evidence
) -> Depth:
    """The lowest ranks over all blocks first; ties break by layer, then part, then unit.

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
        if fits and (params.may_empty or not empties_layer(architecture, ladders, depth, block)):
            depth[block] += 1
            removed += step.cost
    return depth


def allocate_uniform(
    architecture: Architecture, ladders: Ladders, target: int, params: Allocate, evidence: Evidence
) -> Depth:
    """Every layer that is not frozen loses the same number of units of each part.

    Of all splits between the parts, those that come nearest to the target (within one removal of
    the cheapest part in every layer) are considered; `split` chooses among them.
    """
    layers = _cuttable(architecture, ladders)
    if not layers:
        return dict.fromkeys(ladders, 0)
    having = {part: [layer for layer in layers if (layer, part) in ladders] for part in architecture.parts}
    first = {part: ladders[own[0], part] for part, own in having.items() if own}
    options = {part: _options(architecture, first[part], part, params) for part in first}
    spent = {part: _totals([[step.cost for step in ladders[layer, part]] for layer in having[part]]) for part in first}
    lost = {
        part: _totals([[step.importance for step in ladders[layer, part]] for layer in having[part]]) for part in first
    }
    gone = {part: _totals([[len(step.units) for step in first[part]]]) / architecture.units(part) for part in first}
    kinds = {tuple(parts_left(architecture, ladders, layer)) for layer in layers}
    may_empty = params.may_empty and len(layers) < architecture.layers

    def allowed(split: Split) -> bool:
        return may_empty or all(any(gone[part][split[part]] < 1 for part in kind) for kind in kinds)

    splits = _splits(options, spent, target, allowed)

    def miss(split: Split) -> float:
        return abs(target - float(sum(spent[part][i] for part, i in split.items())))

    def preference(split: Split) -> float:
        if params.split == "importance":
            return float(sum(lost[part][i] for part, i in split.items()))
        shares = [float(gone[part][i]) for part, i in split.items()]
        return max(shares) - min(shares)

    nexts = ((len(having[part]), step) for part, steps in first.items() for step in free_steps(steps)[:1])
    cheapest = min((number * step.cost for number, step in nexts), default=0)
    reach = max(cheapest, min(map(miss, splits)))
    best = min((split for split in splits if miss(split) <= reach), key=lambda split: (preference(split), miss(split)))
    return {(layer, part): best[part] if layer in layers else 0 for layer, part in ladders}


def _cuttable(architecture: Architecture, ladders: Ladders) -> list[int]:
    """The layers that something can be removed from."""
    layers = range(architecture.layers)
    return [layer for layer in layers if any(ladders[layer, p] for p in parts_left(architecture, ladders, layer))]


Split = Mapping[str, int]
"""For each part the number of removals in every layer."""


def _totals(values: list[list[Any]]) -> NDArray[np.float64]:
    """Sums over layers of the first 0, 1, 2, ... steps; ``[steps + 1]``."""
    return np.concatenate([[0.0], np.cumsum(np.sum(np.array(values, dtype=np.float64), axis=0))])


def _options(architecture: Architecture, ladder: tuple[Step, ...], part: str, params: Allocate) -> list[int]:
    """How many removals leave a count that the result's shape can hold."""
    shape, any_count = architecture.parts[part], params.shape == "per_layer"
    left = shape.left_after(architecture.units(part), [step.units for step in ladder])
    said = [any_count or (kept > 0 and shape.says(kept, groups)) for kept, groups in left]
    first = len(ladder) - len(free_steps(ladder))
    return [i for i, fits in enumerate(said) if i == first or (i > first and fits)]


def _splits(
    options: Mapping[str, list[int]],
    spent: Mapping[str, NDArray[np.float64]],
    target: int,
    allowed: Callable[[Split], bool],
) -> list[Split]:
    """For every choice in the other parts the allowed one nearest to the target in the part of finest steps."""
    finest = min(options, key=lambda part: min(np.diff(spent[part]), default=np.inf))
    others = [part for part in options if part != finest]
    choices = np.array(options[finest])
    splits: list[Split] = []
    for chosen in product(*(options[part] for part in others)):
        rest = target - sum(spent[part][i] for part, i in zip(others, chosen, strict=True))
        order = np.argsort(np.abs(spent[finest][choices] - rest), kind="stable")
        fills = (dict(zip(others, chosen, strict=True)) | {finest: int(fill)} for fill in choices[order])
        splits.extend(islice(filter(allowed, fills), 1))
    return splits


def allocate_functional(
    architecture: Architecture, ladders: Ladders, target: int, params: Allocate, evidence: Evidence
) -> Depth:
    """Each layer loses a share that falls as the layer changes its input more, within half and one and a half
    times the mean share.

    With c_l = 1 - cosine(input, output) of layer l scaled to 0...1 over the layers, the share is
    r (1.5 - c_l), moved by a constant and cut to [0.5 r, 1.5 r] so that the shares meet the target (FANG's
    functional allocation). In a layer the lowest ranks go first, or the same share of each part, as `split` says.
    """
    layers = _cuttable(architecture, ladders)
    depth = dict.fromkeys(ladders, 0)
    if not layers:
        return depth
    left = {layer: [(layer, part) for part in parts_left(architecture, ladders, layer)] for layer in layers}
    sizes = np.array([_removable(ladders, left[layer]) for layer in layers])
    shares = functional_shares(evidence["activations"][layers], sizes, target / max(1, int(sizes.sum())))
    owed = 0.0  # what the layers before could not remove in whole units is passed on
    for layer, budget in zip(layers, shares * sizes, strict=True):
        blocks = left[layer]
        groups = [blocks] if params.split == "importance" else [[block] for block in blocks]
        whole = _removable(ladders, blocks)
        for group in groups:
            owed += float(budget) * _removable(ladders, group) / whole
            own = {block: ladders[block] if block in group else () for block in ladders}
            if not params.may_empty and len(group) < len(blocks):
                own |= {block: _without_the_last(architecture, ladders, depth, block) for block in group}
            room = max(round(owed), forced_cost(own))
            taken = allocate_global(architecture, own, room, params, evidence)
            depth |= {block: taken[block] for block in group}
            owed -= sum(step.cost for block in group for step in ladders[block][: taken[block]])
    return depth


def _without_the_last(
    architecture: Architecture, ladders: Ladders, depth: Mapping[Block, int], block: Block
) -> tuple[Step, ...]:
    """A block's ladder, less the step that would leave its layer with nothing."""
    steps = ladders[block]
    last = {**depth, block: len(steps) - 1}
    return steps[:-1] if steps and empties_layer(architecture, ladders, last, block) else steps


def functional_shares(change: NDArray[np.float64], sizes: NDArray[np.int64], mean: float) -> NDArray[np.float64]:
    """The share that each layer loses, so that their mean, weighted by the layers' sizes, is the given one."""
    spread = np.ptp(change)
    scaled = (change - change.min()) / spread if spread > 0 else np.full(len(change), 0.5)
    low, high = -mean, mean
    for _ in range(60):  # the mean grows with the constant: bisection
        middle = (low + high) / 2
        shares = np.clip(mean * (1.5 - scaled) + middle, 0.5 * mean, min(1.0, 1.5 * mean))
        low, high = (middle, high) if (shares * sizes).sum() < mean * sizes.sum() else (low, middle)
    return shares


def _removable(ladders: Ladders, blocks: Sequence[Block]) -> int:
    return sum(step.cost for block in blocks for step in ladders[block])


def allocate_search(
    architecture: Architecture, ladders: Ladders, target: int, params: Allocate, evidence: Evidence
) -> Depth:
    """Least summed divergence of the blocks' levels for the target, by an integer programme.

    The divergences of single blocks add up only roughly; `libprune.allocation.search` goes on from here with whole
    plans. A `uniform` shape takes the same level in every layer.
    """
    prices = cost.prices(architecture, params.objective, evidence.get("latency"), params.columns)
    return least_divergence(architecture, ladders, evidence["levels"], target, prices, params).depth


def allocate_hgsp(
    architecture: Architecture, ladders: Ladders, target: int, params: Allocate, evidence: Evidence
) -> Depth:
    """The lowest ranks over all blocks first, each rank times the factor of its block (`libprune.allocation.hgsp`)."""
    ranked = weighted(ladders, block_factors(architecture, evidence["sensitivity"], params))
    return allocate_global(architecture, ranked, target, params, evidence)


def allocate_retention(
    architecture: Architecture, ladders: Ladders, target: int, params: Allocate, evidence: Evidence
) -> Depth:
    """Every block loses the same multiple of what its importance lets it lose (`libprune.allocation.retention`)."""
    wanted = wanted_removals(architecture, evidence["scores"], params.network_type)
    return allocate_global(architecture, by_progress(ladders, wanted), target, params, evidence)
