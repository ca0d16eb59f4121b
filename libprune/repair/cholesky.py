"""Cholesky factors of Gram matrices, which rounding may leave just not positive definite."""

import torch
from jaxtyping import Float
from torch import Tensor


def cholesky(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"] | None:
    """The lower Cholesky factor of a symmetric matrix.

    The square of a pivot is what is left of its diagonal element. Where that is no more than what n roundings of this
    element come to, the factor says nothing, and whether it can be computed at all depends on the machine.

    Returns:
        The factor; None if the matrix is not positive definite beyond rounding, or has elements that are not finite.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps * matrix.diagonal()
    return factor if bool((info == 0) & (factor.diagonal().square() > rounding).all()) else None
