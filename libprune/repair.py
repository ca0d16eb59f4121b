"""Repair: refit each consumer's weights on the inputs that are left."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from libprune.architecture import Architecture, Map
from libprune.errors import StatisticsError
from libprune.plan import Plan
from libprune.surgery import input_mask


def least_squares(
    weight: Float[Tensor, "output input"],
    gram: Float[Tensor, "input input"],
    kept: Bool[Tensor, " input"],
    damping: float,
) -> Float[Tensor, "output input"]:
    """The weights on the kept inputs that best reproduce the dense output.

    W_K' = argmin ||W x - W_K' x_K||^2 + lambda ||W_K' - W_K||^2
         = (W C[:, K] + lambda W_K) (C[K, K] + lambda I)^-1,   C = E[x x^T],
    lambda = damping * mean(diag C). Structured optimal brain compression with the ridge pulled
    towards the old weights rather than zero (OBC: Frantar & Alistarh 2022).

    Args:
        weight: W, ``[output, input]``.
        gram: C, ``[input, input]``.
        kept: K, boolean ``[input]``.
        damping: relative ridge, above 0.

    Returns:
        ``[output, input]`` with the refitted columns at the kept positions and zeros elsewhere, in
        the dtype of ``weight``; computed in float64.

    Raises:
        StatisticsError: if the damped Gram matrix is not positive definite.
    """
    w, c = weight.double(), gram.double()
    ridge = damping * float(c.diagonal().mean())
    inner = c[kept][:, kept]
    inner.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(inner)
    if int(info) != 0:
        raise StatisticsError(
            "a Gram matrix is not positive definite; raise slice.damping or use more calibration text"
        )
    right = w @ c[:, kept] + ridge * w[:, kept]
    repaired = torch.zeros_like(w)
    repaired[:, kept] = torch.cholesky_solve(right.T, factor).T
    return repaired.to(weight.dtype)


def repair_local(
    architecture: Architecture,
    plan: Plan,
    weight_of: Callable[[str], Tensor],
    gram_of: Callable[[Map], Tensor],
    damping: float,
) -> dict[str, Tensor]:
    """Closed-form repair of every pruned consumer, against the dense model's own inputs.

    Returns:
        The new weights by parameter name, in storage order and dense shape.
    """
    return {
        consumer.weight: _repair_one(
            consumer, architecture, plan, weight_of(consumer.weight), gram_of(consumer), damping
        )
        for layer, part in architecture.blocks()
        if not plan.gone(layer, part) and not plan.keep[layer, part].all()
        for consumer in architecture.consumers(layer, part)
    }


def _repair_one(
    consumer: Map, architecture: Architecture, plan: Plan, weight: Tensor, gram: Tensor, damping: float
) -> Tensor:
    kept = torch.from_numpy(np.asarray(input_mask(architecture, plan, consumer)))
    oriented = weight.T if consumer.transposed else weight
    repaired = least_squares(oriented, gram, kept, damping)
    return (repaired.T if consumer.transposed else repaired).contiguous()
