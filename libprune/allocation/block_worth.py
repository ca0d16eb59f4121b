"""The worth of blocks: scaled scores rank units within a block but no longer say how much the block matters.

This puts it back. The worth of a layer or block is divided among its units by how high each ranks and how large it is,

    I_u = B s_u c_u / sum_v s_v c_v,

with s the scaled score, c the parameters and the sum over the units that share B. So scores per parameter, I / c, keep
the order of s wherever B is shared, and compare everywhere.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.allocation.hgsp import HARMLESS
from libprune.allocation.methods import Evidence
from libprune.engine.architecture import Block
from libprune.engine.errors import LibpruneError
from libprune.engine.tables import Columns, split_blocks
from libprune.pipeline.artifacts import Scores
from libprune.pipeline.methods import METHODS
from libprune.pipeline.sections import Allocate
from libprune.statistics.sensitivity import block_increase


def with_worth(scores: Scores, params: Allocate, evidence: Evidence) -> Scores:
    """The scores with the worth of each block or layer divided among its units; unchanged for `allocate.worth: none`.

    Raises:
        LibpruneError: if the scores are no ranks, or the method settles what blocks are worth by itself.
    """
    require_meaningful(params, scores.meta["scaling"])
    if params.worth == "none":
        return scores
    if params.worth == "functional":
        return scores.with_columns(shared_out(scores, evidence["activations"], by_layer=True))
    increases = evidence["sensitivity"]
    blocks = np.array([block_increase(increases, *block) for block in scores.architecture.blocks()])
    return scores.with_columns(shared_out(scores, blocks, by_layer=False))


def require_meaningful(params: Allocate, scaling: str) -> None:
    """Stop where a worth would mean nothing.

    Raises:
        LibpruneError: if the scores are no ranks, or the method settles what blocks are worth by itself.
    """
    if params.worth == "none":
        return
    if scaling != "rank":
        raise LibpruneError(
            f"allocate.worth: {params.worth} is shared out by rank, but score.scaling is {scaling}; set it to rank, "
            "or allocate.worth to none"
        )
    if METHODS[params.method].weighs:
        raise LibpruneError(
            f"allocate.method: {params.method} weighs blocks by what it measures, so allocate.worth: {params.worth} "
            "would count twice or do nothing; set it to none"
        )


def require_comparable(meta: Mapping[str, Any], params: Allocate) -> None:
    """Stop where a method would rank unlike things.

    Raises:
        LibpruneError: saying what to set.
    """
    method, scaling, record = params.method, meta["scaling"], METHODS[params.method]
    if record.splits and params.split == "importance" and not meta["comparable"] and scaling == "none":
        raise LibpruneError(
            f"{meta['criterion']} compares only within a layer and part, so allocate.split: importance would add up "
            "unlike things; set it to auto or proportional"
        )
    if not record.between:
        return
    if not meta["comparable"] and scaling == "none":
        *others, last = record.scalings
        raise LibpruneError(
            f"{meta['criterion']} compares only within a layer and part, so allocate.method: {method} would rank "
            f"unlike things; set score.scaling to {' or '.join([', '.join(others), last] if others else [last])}, "
            "or allocate.method to uniform"
        )
    weighed = record.weighs or params.worth != "none"
    if not weighed and scaling != "none" and meta["fusion"] not in {"none", "best"}:
        raise LibpruneError(
            f"{meta['criterion']} is fused from criteria with one scale in every layer, which leaves no layer a level "
            f"of its own for allocate.method: {method}; with score.scaling: rank set allocate.worth to sensitivity or "
            "functional, or allocate.method to hgsp; with another choose uniform or functional"
        )
    if scaling not in {"none", *record.scalings}:
        raise LibpruneError(
            f"allocate.method: {method} multiplies scores by what their block is worth, so they must be positive, but "
            f"score.scaling: {scaling} makes the lowest of every block 0 or less; set it to rank"
        )


def shared_out(scores: Scores, worth: NDArray[np.float64], by_layer: bool) -> Columns:
    """`importance` and `score` with every layer's or block's worth shared out among its units.

    Args:
        scores: positive ones, as ranks are.
        worth: ``[layers]`` or ``[blocks]``; below `libprune.allocation.hgsp.HARMLESS` that counts, so that a harmless
            block keeps its units' order.
        by_layer: whether a layer's blocks share one worth.
    """
    architecture, cost = scores.architecture, scores.table["cost"]
    size = scores.table["score"] * cost
    blocks: list[Block] = list(architecture.blocks())
    place = [layer if by_layer else number for number, (layer, _) in enumerate(blocks)]
    own = np.array([float(values.sum()) for _, values in split_blocks(architecture, size)])
    totals = np.bincount(place, weights=own)
    factors = (np.maximum(worth, HARMLESS) / totals)[place]
    by_unit = np.repeat(factors, [architecture.units(part) for _, part in blocks])
    importance = size * by_unit
    return {"importance": importance, "score": importance / cost}
