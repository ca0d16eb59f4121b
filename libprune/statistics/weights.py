"""Per-unit columns of the weights alone: cost, norms, spread, and how evenly and independently they carry a unit."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from libprune.engine.architecture import Architecture
from libprune.engine.cost import unit_parameters
from libprune.statistics.unit_sums import unit_sums

_AT_ONCE = 1 << 22
"""Elements of the matrices whose singular values are computed together, in float64."""


def weight_columns(
    architecture: Architecture, weights: Mapping[str, Tensor], layer: int, part: str
) -> dict[str, NDArray[Any]]:
    """Per-unit columns of a block, over the n weights w of each unit; biases count as weights.

    `cost`: n. `magnitude_l1`, `magnitude_l2`: sums of |w| and of w^2. `weight_variance`: mean of (w - mean)^2.
    `weight_nonzero`: share that is not exactly 0. `weight_entropy`: entropy of the shares w_i^2 / sum w^2 over ln n.
    `weight_effective_rank`: of the unit's vectors, without biases, over the largest possible rank. The last three are
    0 to 1, and 0 where all weights are 0.
    """

    def sums(of: Callable[[Tensor], Tensor]) -> NDArray[np.float64]:
        return unit_sums(architecture, layer, part, weights, of=lambda _, weight, __: of(weight.detach().double()))

    cost = np.full(architecture.units(part), unit_parameters(architecture, layer, part))
    squares = sums(torch.square)
    return {
        "cost": cost,
        "magnitude_l1": sums(torch.abs),
        "magnitude_l2": squares,
        "weight_variance": (squares / cost - (sums(torch.clone) / cost) ** 2).clip(min=0),
        "weight_nonzero": sums(lambda w: (w != 0).double()) / cost,
        "weight_entropy": _evenness(squares, sums(_times_own_logarithm), cost),
        "weight_effective_rank": _rank_share(unit_vectors(architecture, weights, layer, part)).cpu().numpy(),
    }


def _times_own_logarithm(weight: Tensor) -> Tensor:
    """w^2 ln w^2, element by element."""
    square = weight.square()
    return torch.xlogy(square, square)


def _evenness(
    squares: NDArray[np.float64], logs: NDArray[np.float64], number: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Entropy of w_i^2 / S over ln n, from S = sum w^2 and sum w^2 ln w^2: (ln S - logs / S) / ln n."""
    entropy = np.zeros_like(squares)
    some = (squares > 0) & (number > 1)
    entropy[some] = (np.log(squares[some]) - logs[some] / squares[some]) / np.log(number[some])
    return entropy.clip(0, 1)


def unit_vectors(architecture: Architecture, weights: Mapping[str, Tensor], layer: int, part: str) -> list[Tensor]:
    """The rows and columns of a block's matrices that carry each unit's index.

    Returns:
        One tensor ``[units, vectors of a unit, length]`` for each length that the vectors have; only one where all maps
        of the block read and write the same space.
    """
    units, by_length = architecture.units(part), dict[int, list[Tensor]]()
    for parameter, dim, owners in architecture.carriers(layer, part):
        if len(parameter.dims) > 1:
            rows = weights[parameter.name].detach().movedim(dim, 0).flatten(1)
            owned = np.argsort(owners, kind="stable")[int((owners < 0).sum()) :]
            by_length.setdefault(rows.shape[1], []).append(rows[torch.from_numpy(owned)].view(units, -1, rows.shape[1]))
    return [torch.cat(vectors, 1) for vectors in by_length.values()]


def _rank_share(spaces: list[Tensor]) -> Float[Tensor, " units"]:
    """Effective rank of each unit's vectors over the largest rank that their number and length allow.

    Vectors of different lengths lie in different spaces; the singular values of all spaces enter one rank.
    """
    values = torch.cat([singular_values(vectors) for vectors in spaces], 1)
    return effective_rank(values) / values.shape[1]


def singular_values(matrices: Float[Tensor, "units rows columns"]) -> Float[Tensor, "units values"]:
    """Singular values of each matrix, ascending, float64, through the smaller of its two Gram matrices."""
    rows, columns = matrices.shape[1:]
    values = []
    with _one_thread():
        for some in matrices.split(max(1, _AT_ONCE // (rows * columns))):
            tall = some.double() if rows <= columns else some.double().mT
            values.append(torch.linalg.eigvalsh(tall @ tall.mT).clamp(min=0).sqrt())
    return torch.cat(values)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one thread: matrices are small, and threads that wait for each other are slow beside other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def effective_rank(values: Float[Tensor, "units values"]) -> Float[Tensor, " units"]:
    """The exponential of the entropy of the shares s_k / sum s of singular values s_k (Roy & Vetterli 2007).

    It is 0 where all are 0, 1 where only one is not 0, and their number where all are equal.
    """
    total = values.sum(1, keepdim=True)
    shares = values / total.clamp(min=torch.finfo(values.dtype).tiny)
    return torch.where(total[:, 0] > 0, torch.special.entr(shares).sum(1).exp(), 0.0)
