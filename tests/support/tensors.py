"""Random tensors and their Gram matrices."""

import torch
from torch import Tensor


def random_tensors(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors of standard normal numbers in float64, one of each shape."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def gram(x: Tensor) -> Tensor:
    """E[x x^T] over the rows of x."""
    return x.T @ x / len(x)
