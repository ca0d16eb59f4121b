"""TODO"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from libprune.engine.errors import LibpruneError
from libprune.models.samples import Samples


def digest(tensors: Iterable[tuple[str, Tensor]], text: str) -> str:
    """A name for tensors and a text."""
    found = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def told(samples: Samples, network: nn.Module) -> str:
    """What tells one loss function from another: its values on a few samples, to the precision of any machine."""
    with torch.no_grad():
        return " ".join(f"{loss:.3e}" for loss in samples.losses(network).tolist())


def require_precise(network: nn.Module) -> None:
    """Stop at a network that computes in half precision.

    Raises:
        LibpruneError: naming the first parameter of that type.
    """
    for name, parameter in network.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise LibpruneError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, in which statistics and proofs drown in "
                "rounding; give network.float() and inputs of that type, and convert what comes out"
            )
