"""The graph of correlations between the units of a block, from the Gram matrix at a consumer's input.

With S the covariance of the inputs x, S_uv its block between the positions of units u and v:

    r_uv = |S_uv| / sqrt(|S_uu| |S_vv|)   (Frobenius norms), 0 to 1.

Where units own one position each, it is the absolute correlation; where they own several, it is the square root of the
RV coefficient (Robert & Escoufier 1976), which is 1 exactly if both units carry the same up to a rotation and a factor.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from libprune.scoring.obs import positions_of

_ROWS = 32
"""Rows of the Gram matrix that are worked on at a time, so that no table of units by units is ever made."""
_ROUNDINGS = 16
"""Roundings of the mean square below which a variance counts as 0."""


@dataclass(frozen=True)
class UnitGraph:
    """The place of each unit in the graph; ``[units]`` each, float64, 0 to 1.

    Attributes:
        connection: mean of r_uv over the other units.
        uniqueness: 1 less the largest r_uv.
        centrality: share of the other units with r_uv above the threshold (degree centrality, Freeman 1978).
        cooperation: mean of r_uv over the other units, each weighted by the root mean square of its centred
            contribution to the consumer's output, |W_v (x_v - E[x_v])|.
    """

    connection: NDArray[np.float64]
    uniqueness: NDArray[np.float64]
    centrality: NDArray[np.float64]
    cooperation: NDArray[np.float64]


def unit_graph(
    gram: Float[Tensor, "input input"],
    mean: Float[Tensor, " input"],
    weight: Float[Tensor, "output input"],
    units: Int[np.ndarray, " input"],
    threshold: float,
) -> UnitGraph:
    """The graph of correlations between a consumer's units.

    A unit whose inputs do not vary, up to the rounding of the Gram matrix, has no connections and is not unique: a
    bias replaces it. A unit without others is unique. The time grows with the square of the inputs; the memory, beside
    the Gram matrix, with their number.

    Args:
        gram: E[x x^T].
        mean: E[x] over the same tokens.
        weight: W.
        units: the unit of each input position, or -1; every unit owns equally many.
        threshold: above which two units count as connected.
    """
    count = int(units.max()) + 1
    positions, m = positions_of(units), mean.double()
    order = positions.flatten()
    step = max(1, _ROWS // positions.shape[1])
    alone = (_alone(gram, m, weight, some) for some in positions.split(step))
    scale, output = (torch.cat(parts) for parts in zip(*alone, strict=True))
    # The results are made first: small ones between large scratch fragment the heap.
    total, largest, above, cooperation = torch.empty(4, count, dtype=torch.float64)
    for start in range(0, count, step):
        own = slice(start, start + step)
        at = positions[own].flatten()
        rows = gram[at][:, order].double() - torch.outer(m[at], m[order])
        norms = rows.view(-1, positions.shape[1], *positions.shape).square().sum((1, 3)).sqrt()
        r = (norms * scale[own, None] * scale).clamp(max=1)
        r.diagonal(start).zero_()
        total[own], largest[own] = r.sum(1), r.amax(1)
        above[own] = (r > threshold).sum(1)
        cooperation[own] = _quotient(r @ output, output.sum() - output[own])
    others = max(1, count - 1)
    unique = torch.where(scale > 0, 1 - largest, 0.0)
    return UnitGraph(*(v.numpy() for v in (total / others, unique, above / others, cooperation)))


def _alone(gram: Tensor, mean: Tensor, weight: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """1 / sqrt(|S_uu|) and sqrt(tr(W_u S_uu W_u^T)) of some units, both 0 for a unit that does not vary."""
    second = gram[positions[:, :, None], positions[:, None, :]].double()
    m = mean[positions]
    covariance = second - m[:, :, None] * m[:, None, :]
    rounding = _ROUNDINGS * torch.finfo(gram.dtype).eps
    varies = _trace(covariance) > rounding * _trace(second)
    norm = covariance.square().sum((1, 2)).sqrt()
    w = weight[:, positions].double().movedim(0, -1)
    output = ((w @ w.mT) * covariance).sum((1, 2)).clamp(min=0).sqrt()
    zero = torch.zeros_like(norm)
    return torch.where(varies, norm.rsqrt(), zero), torch.where(varies, output, zero)


def _trace(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=1, dim2=2).sum(1)


def _quotient(one: Tensor, two: Tensor) -> Tensor:
    """One over two, 0 where the second is not above 0."""
    return torch.where(two > 0, one / two.clamp(min=torch.finfo(two.dtype).tiny), 0.0)
