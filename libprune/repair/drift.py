"""What the repaired layers before a consumer have left in the residual stream, and whether it can be taken back.

The drift is what the pruned stream lacks of the dense one. A consumer takes it back where its layer only adds what the
consumer gives, or a multiple of that: `factors_of` measures the multiples on the dense model.

A few tokens, often the first of a sequence, have states hundreds of times larger than the others, and as much larger a
drift. `capped` cuts each token's drift to a multiple of the median of its sequence.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def capped(drift: Float[Tensor, "batch length model"], cap: float | None) -> Float[Tensor, "batch length model"]:
    """The drift of each token, no longer than `cap` times the median length in its sequence; None: as it is."""
    if cap is None:
        return drift
    norm = drift.norm(dim=-1, keepdim=True)
    limit = cap * norm.median(dim=1, keepdim=True).values
    return drift * torch.where(norm > limit, limit / norm, 1.0)


def factors_of(before: Tensor, after: Tensor, outputs: Sequence[Tensor]) -> tuple[float, ...] | None:
    """What a layer multiplies each consumer's output by before it adds it to the residual stream.

    Factors of 1 are tried first. Others are fitted, each element weighed by what rounding does to it, and must explain
    all elements.

    Returns:
        The factors, none of them 0; None if the layer does more with the outputs.
    """
    stream, given = before.double(), torch.stack([output.cpu().double() for output in outputs])
    ones = torch.ones(len(outputs), dtype=torch.float64)
    if _explained(stream, after, given, ones):
        return tuple(ones.tolist())
    factors = ones
    for _ in range(2):  # the first factors give the weights of the second
        size = _terms(stream, given, factors).abs().sum(0).clamp(min=torch.finfo(torch.float64).tiny)
        columns, change = (given / size).flatten(1), ((after.double() - stream) / size).flatten()
        factors = torch.linalg.lstsq(columns @ columns.T, columns @ change, driver="gelsd").solution
    return tuple(factors.tolist()) if factors.all() and _explained(stream, after, given, factors) else None


def _explained(before: Tensor, after: Tensor, outputs: Tensor, factors: Tensor) -> bool:
    """Whether a layer adds its consumers' outputs times some factors, as far as rounding can tell.

    Every element is asked by itself, against what the rounding of so many additions can do to it: in the norm of all, a
    few large states would hide what a norm behind the consumers does to the others.
    """
    terms = _terms(before, outputs, factors)
    rounding = len(outputs) * torch.finfo(after.dtype).eps
    missed = (terms.sum(0) - after.double()).abs()
    return bool((missed <= rounding * terms.abs().sum(0)).all())


def _terms(before: Tensor, outputs: Tensor, factors: Tensor) -> Tensor:
    return torch.cat([before[None], outputs * factors.view(-1, *[1] * before.ndim)])
