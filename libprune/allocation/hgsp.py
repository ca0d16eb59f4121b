"""H-GSP, hierarchical global structured pruning: units compete over all layers, weighed by what their layer and
block are worth as a whole.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from libprune.allocation.ladders import Ladders, spent
from libprune.engine.architecture import Architecture, Block
from libprune.pipeline.sections import Allocate
from libprune.statistics.sensitivity import LAYER, block_increase

HARMLESS = 1e-6
"""The least loss increase that counts, nats, so that a block whose removal helps keeps its units' order."""

Increases = Mapping[str, NDArray[np.float64]]
"""Loss increases ``[layers]`` in nats per token, by what is removed: `layer`, or a part."""


def threshold_of(threshold: float | str, layers: NDArray[np.float64]) -> float:
    """The loss increase up to which a layer counts as a whole, nats.

    Args:
        threshold: as in `allocate.threshold`.
        layers: loss increases of removing whole layers, ``[layers]``.
    """
    if isinstance(threshold, str):
        kind, _, share = threshold.partition(":")
        return (
            float(np.percentile(layers, float(share))) if share else {"blockwise": -np.inf, "layerwise": np.inf}[kind]
        )
    return threshold if threshold > 0 else -np.inf


def block_factors(architecture: Architecture, increases: Increases, params: Allocate) -> dict[Block, float]:
    """B^T for every block: B = ln(1 + max(x, HARMLESS)) of the loss increase x of the block or its layer.

    That is the increase of removing its whole layer where this does not exceed the threshold, and of
    removing the block alone elsewhere. T is `allocate.temperature`; 0 makes all factors 1.
    """
    layers = increases[LAYER]
    limit = threshold_of(params.threshold, layers)

    def increase(layer: int, part: str) -> float:
        return float(layers[layer]) if layers[layer] <= limit else block_increase(increases, layer, part)

    return {
        block: float(np.log1p(max(increase(*block), HARMLESS)) ** params.temperature) for block in architecture.blocks()
    }


def weighted(ladders: Ladders, factors: Mapping[Block, float]) -> Ladders:
    """Ladders with every rank multiplied by the factor of its block."""
    return {
        block: tuple(replace(step, rank=step.rank * factors[block]) for step in steps)
        for block, steps in ladders.items()
    }


def collapsing(
    architecture: Architecture, ladders: Ladders, depth: Mapping[Block, int], target: int, below: float
) -> tuple[int, ...]:
    """The layers to remove whole: the weakest first, those that keep less than a share, as far as the budget goes.

    A layer's kept share is the mean over its parts of kept units over all. Frozen layers stay, and so does the
    last layer of all.
    """
    parts = {layer: architecture.parts_of(layer) for layer in range(architecture.layers)}
    kept = {
        layer: np.mean(
            [
                1
                - sum(len(step.units) for step in ladders[layer, part][: depth[layer, part]]) / architecture.units(part)
                for part in parts[layer]
            ]
        )
        for layer in parts
        if all(sum(len(s.units) for s in ladders[layer, part]) == architecture.units(part) for part in parts[layer])
    }
    gone: list[int] = []
    cost = 0
    for layer in sorted(kept, key=lambda layer: (kept[layer], layer)):
        whole = {block: len(ladders[block]) for block in ladders if block[0] == layer}
        price = spent({block: ladders[block] for block in whole}, whole)
        if kept[layer] < below and cost + price <= target and len(gone) + 1 < architecture.layers:
            gone.append(layer)
            cost += price
    return tuple(sorted(gone))
