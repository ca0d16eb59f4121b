"""Digests by which the artifacts of a network name it and its samples."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from libprune.models.samples import Samples


def digest(tensors: Iterable[tuple[str, Tensor]], text: str) -> str:
    """A digest of named tensors and a text: it changes with every value, type, shape, name and letter."""
    sha = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def loss_signature(samples: Samples, network: nn.Module) -> str:
    """A text that differs between loss functions: the losses of a few samples, to the precision of any machine."""
    with torch.no_grad():
        return " ".join(f"{loss:.3e}" for loss in samples.losses(network).tolist())
