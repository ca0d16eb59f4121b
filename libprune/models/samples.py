"""Samples of a network: its inputs and targets, and the loss of each; and digests by which artifacts name both."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from libprune.engine.errors import LibpruneError
from libprune.models.sequences import NO_TARGET

Loss = Callable[[Any, Tensor], Tensor]
"""A loss function: from the network's outputs and the targets of some samples to their losses, ``[samples]``."""


def cross_entropy(outputs: Float[Tensor, "samples ..."], targets: Tensor) -> Float[Tensor, " samples"]:
    """Mean negative log-likelihood of each sample's targets, in nats.

    Args:
        outputs: logits ``[samples, classes]``, or ``[samples, positions, classes]``.
        targets: classes ``[samples]``, or ``[samples, positions]`` with `NO_TARGET` at positions without a target.
    """
    precise = torch.promote_types(outputs.dtype, torch.float32)
    losses = nn.functional.cross_entropy(
        outputs.flatten(0, -2).to(precise), targets.flatten(), ignore_index=NO_TARGET, reduction="none"
    ).view(len(targets), -1)
    return losses.sum(1) / (targets.view(len(targets), -1) != NO_TARGET).sum(1)


@dataclass(frozen=True)
class Samples:
    """Calibration or evaluation samples.

    Attributes:
        inputs: inputs of the network, ``[samples, ...]``.
        targets: its targets, ``[samples]`` or ``[samples, positions]``.
        loss: the loss function; the cross-entropy of classes if none is given.

    Raises:
        LibpruneError: if there are no samples, or not one input and one target for each.
    """

    inputs: Tensor
    targets: Tensor
    loss: Loss = field(default=cross_entropy, compare=False)

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets) or not len(self.inputs):
            raise LibpruneError(
                f"there are {len(self.inputs)} inputs and {len(self.targets)} targets; a sample needs one of each, and "
                "there must be at least one"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, chosen: slice | Tensor) -> "Samples":
        return Samples(self.inputs[chosen], self.targets[chosen], self.loss)

    def to(self, device: torch.device) -> "Samples":
        """The samples on a device."""
        return Samples(self.inputs.to(device), self.targets.to(device), self.loss)

    def passes(self, at_once: int) -> Iterator["Samples"]:
        """All samples in their order, at most `at_once` together."""
        return (self[start : start + at_once] for start in range(0, len(self), at_once))

    @property
    def length(self) -> int:
        """Length in the progress bar, 1: each sample counts as one."""
        return 1

    @property
    def lengths(self) -> None:
        """Lengths of single samples; always None, since all have one shape."""
        return None

    @property
    def counted(self) -> int:
        """Number of targets that the loss of a sample is the mean over; where samples differ, their mean, rounded."""
        return 1 if self.targets.ndim == 1 else round(int((self.targets != NO_TARGET).sum()) / len(self))

    def losses(self, network: nn.Module) -> Float[Tensor, " samples"]:
        """The loss of each sample, ``[samples]``.

        Raises:
            LibpruneError: if the loss function does not give one number for each sample.
        """
        losses = self.loss(network(self.inputs), self.targets)
        if losses.shape != (len(self),):
            raise LibpruneError(
                f"the loss of {len(self)} samples has shape {list(losses.shape)}; it must give one number a sample "
                "(reduction='none', then the mean over a sample's own positions)"
            )
        return losses


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
