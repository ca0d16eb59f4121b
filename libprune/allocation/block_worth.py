"""What ranks are given back: scaled scores say which unit of a block comes first, not what the block is worth.

The worth of a layer or block is shared out among its units by how high each stands and how large it is,

    I_u = B s_u c_u / sum_v s_v c_v,

with s the scaled score, c the parameters and the sum over the units that share B. So scores per parameter, I / c, keep
the order of s wherever B is shared, and compare everywhere.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.allocation.evidence import origin_of, read_change, read_increases
from libprune.allocation.hgsp import HARMLESS
from libprune.engine.architecture import Architecture, Block
from libprune.engine.errors import LibpruneError
from libprune.engine.tables import Columns, split_blocks
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Allocate


def with_worth(
    layout: Layout, architecture: Architecture, scores: Columns, meta: Mapping[str, Any], params: Allocate
) -> Columns:
    """The importance table with what `allocate.worth` gives back; as it is for `none`.

    Raises:
        LibpruneError: if the scores are no ranks, the method would count the worth twice or not at all, or the
            artifact that it is read from is missing or foreign.
    """
    if params.worth == "none":
        return scores
    require_meaningful(params, meta["scaling"])
    origin = origin_of(meta)
    if params.worth == "functional":
        change = read_change(layout, architecture, origin)
        return shared_out(architecture, scores, change, by_layer=True)
    increases = read_increases(layout, architecture, origin)
    blocks = np.array([increases[part][layer] for layer, part in architecture.blocks()])
    return shared_out(architecture, scores, blocks, by_layer=False)


def require_meaningful(params: Allocate, scaling: str) -> None:
    """Stop where a worth would mean nothing.

    Raises:
        LibpruneError: if the scores are no ranks, or the method settles what blocks are worth by itself.
    """
    if scaling != "rank":
        raise LibpruneError(
            f"allocate.worth: {params.worth} is shared out by rank, but score.scaling is {scaling}; set it to rank, "
            "or allocate.worth to none"
        )
    if params.method in {"hgsp", "search"}:
        raise LibpruneError(
            f"allocate.method: {params.method} weighs blocks by what it measures, so allocate.worth: {params.worth} "
            "would count twice or do nothing; set it to none"
        )


def shared_out(architecture: Architecture, scores: Columns, worth: NDArray[np.float64], by_layer: bool) -> Columns:
    """The importance table with every layer's or block's worth shared out among its units.

    Args:
        architecture: the model's description.
        scores: the importance table; scaled scores are positive.
        worth: ``[layers]`` or ``[blocks]``; below `libprune.allocation.hgsp.HARMLESS` that counts, so that a harmless
            block keeps its units' order.
        by_layer: whether a layer's blocks share one worth.
    """
    size = scores["score"] * scores["cost"]
    blocks: list[Block] = list(architecture.blocks())
    place = [layer if by_layer else number for number, (layer, _) in enumerate(blocks)]
    own = np.array([float(values.sum()) for _, values in split_blocks(architecture, size)])
    totals = np.bincount(place, weights=own)
    factors = (np.maximum(worth, HARMLESS) / totals)[place]
    by_unit = np.repeat(factors, [architecture.units(part) for _, part in blocks])
    importance = size * by_unit
    return scores | {"importance": importance, "score": importance / scores["cost"]}
