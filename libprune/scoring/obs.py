"""Optimal-brain-surgeon selection: units in the order in which a consumer misses them least once it is refitted.

Removing the input positions u of a consumer W and refitting the rest by least squares costs

    err(u) = tr(F W_u ((C + lambda I)^-1_uu)^-1 W_u^T),   C = E[x x^T],

the squared output error that no refit can take back; F is the identity or a diagonal weight of the
outputs. After a removal both W and the inverse change in closed form, so that the next units are
chosen for the consumer without the first ones:

    W <- W - W_u (P_uu)^-1 P_u,    P <- P - P_:u (P_uu)^-1 P_u,    P = (C + lambda I)^-1

Hassibi & Stork 1993; Frantar & Alistarh 2022 (OBC); by whole units as in Kurtic et al. 2023 (ZipLM).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from libprune.engine.errors import StatisticsError


@dataclass(frozen=True)
class RemovalCost:
    """The cost of every unit of a block when its turn comes; ``[units]`` each, float64.

    Attributes:
        error: squared output error that the removal of the unit adds, after the refit of the remaining units. Where it
            would be below that of the unit before, it is raised to it, so that its order is the order of removal.
        share: this error over tr(F W_u C_uu W_u^T), the error without a refit, both in the dense model: 0 for a unit
            that the others replace wholly, 1 for one that they cannot replace at all.
    """

    error: NDArray[np.float64]
    share: NDArray[np.float64]


def obs_removal(
    weight: Float[Tensor, "output input"],
    gram: Float[Tensor, "input input"],
    units: Int[np.ndarray, " input"],
    rounds: int,
    damping: float,
    output_weights: Float[Tensor, " output"] | None = None,
) -> RemovalCost:
    """The cost of removing all units of a consumer in rounds, the cheapest first.

    Args:
        weight: W.
        gram: C, per token.
        units: the unit of each input position, or -1; every unit owns equally many.
        rounds: how often the remaining units are compared; each time an equal number is removed. At most the number
            of units. With 1 all units are judged in the dense model.
        damping: lambda relative to the mean diagonal of C, above 0.
        output_weights: the diagonal of F; None for the identity.

    Raises:
        StatisticsError: if the damped Gram matrix is not positive definite.
    """
    count = int(units.max()) + 1
    positions = positions_of(units)
    w, c = weight.double().clone(), gram.double()
    if not c.any():  # nothing is read, and nothing lost
        return RemovalCost(np.zeros(count), np.zeros(count))
    if output_weights is not None:
        w *= output_weights.double().sqrt()[:, None]  # each output's error is its own, so that F goes into W
    inverse = _inverse(c, damping)
    alone = _by_unit(w.T @ w, positions, c)
    errors, share, highest = np.zeros(count), np.zeros(count), 0.0
    left, step = np.arange(count), -(-count // rounds)
    while len(left):
        added = _errors(w, inverse, positions[left])
        if len(left) == count:
            share = np.divide(added, alone, out=np.zeros(count), where=alone > 0).clip(0, 1)
        chosen = np.argsort(added, kind="stable")[:step]
        for unit, error in zip(left[chosen], added[chosen], strict=True):
            highest = errors[unit] = max(highest, error)
        _remove(w, inverse, positions[left[chosen]].flatten())
        left = np.delete(left, chosen)
    return RemovalCost(errors, share)


def stack_removal(
    weight: Float[Tensor, "output input"],
    grams: Float[Tensor, "copies each each"],
    frequency: Float[Tensor, " copies"],
    units: Int[np.ndarray, " input"],
    rounds: int,
    damping: float,
    output_weights: Float[Tensor, " output"] | None = None,
) -> RemovalCost:
    """The cost of removing units of a stack of maps, such as experts, whose inputs are not read together.

    Each copy is refitted by itself: a unit that is a whole copy costs all that it adds, and one that has inputs in
    every copy costs the sum over the copies.

    Args:
        weight: the weights of all copies side by side, ``[output, copies * each]``.
        grams: E[x x^T] over the rows of each copy.
        frequency: the share of tokens that go through each copy.
        units: the unit of each input position.
        rounds: as in `obs_removal`.
        damping: as in `obs_removal`.
        output_weights: as in `obs_removal`.

    Raises:
        StatisticsError: if a damped Gram matrix is not positive definite.
    """
    copies, each = grams.shape[:2]
    of_copy, count = units.reshape(copies, each), int(units.max()) + 1
    error, alone = np.zeros(count), np.zeros(count)
    for copy in range(copies):
        if not frequency[copy] or not grams[copy].any():  # no token of the fit went through it
            continue
        gram = grams[copy].double() * float(frequency[copy])
        own, inputs = of_copy[copy], weight[:, copy * each : (copy + 1) * each]
        w = inputs.double() if output_weights is None else inputs.double() * output_weights.double().sqrt()[:, None]
        added = ((w @ gram) * w).sum(0).numpy()
        alone += np.bincount(own, added, count)
        whole = (own == own[0]).all()
        if whole:
            error[own[0]] += added.sum()
        else:
            error += obs_removal(inputs, gram, own, rounds, damping, output_weights).error
    return RemovalCost(error, np.divide(error, alone, out=np.zeros(count), where=alone > 0).clip(0, 1))


def positions_of(units: Int[np.ndarray, " input"]) -> Int[Tensor, "units positions"]:
    """The input positions of each unit; all units own equally many."""
    order = np.argsort(units, kind="stable")[int((units < 0).sum()) :]
    return torch.from_numpy(order).view(int(units.max()) + 1, -1)


def _inverse(gram: Tensor, damping: float) -> Tensor:
    """(C + lambda I)^-1, with lambda relative to the mean diagonal of C."""
    damped = gram.clone()
    damped.diagonal().add_(damping * float(gram.diagonal().mean()))
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        raise StatisticsError(
            "a Gram matrix is not positive definite; raise score.obs_damping or use more calibration text"
        )
    return torch.cholesky_inverse(factor)


def _by_unit(one: Tensor, positions: Tensor, two: Tensor) -> NDArray[np.float64]:
    """tr(A_uu B_uu) of every unit, for symmetric A and B."""
    rows, columns = positions[:, :, None], positions[:, None, :]
    return np.asarray((one[rows, columns] * two[rows, columns]).sum((1, 2)).numpy())


def _errors(w: Tensor, inverse: Tensor, positions: Tensor) -> NDArray[np.float64]:
    """tr(W_u (P_uu)^-1 W_u^T) of every unit, given the positions of each."""
    rows, columns = positions[:, :, None], positions[:, None, :]
    own = w[:, positions].movedim(0, -1)  # [units, positions of a unit, outputs]
    solved = torch.linalg.solve(inverse[rows, columns], own)
    return np.asarray((own * solved).sum((1, 2)).clamp(min=0).numpy())


def _remove(w: Tensor, inverse: Tensor, gone: Tensor) -> None:
    """Refit the weights of the other positions, and take the given ones out of the inverse, in place."""
    taken = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    w -= w[:, gone] @ taken
    inverse -= inverse[:, gone] @ taken
    w[:, gone] = 0
