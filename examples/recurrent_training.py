"""Training of a recurrent language model by truncated backpropagation through time (Williams & Peng 1990), and the
folder that it is kept in.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libprune.engine.errors import ArtifactError, LibpruneError

if TYPE_CHECKING:
    from torch import Tensor

    from libprune.networks.recurrent import RecurrentLM

DROPOUT = 0.1
_LEARNING_RATE = 5e-3
_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Schedule:
    """How a model is trained.

    Attributes:
        batch: streams that the text is cut into, which run in parallel.
        bptt: steps that the gradient goes back.
        epochs: passes over the training part.
    """

    batch: int
    bptt: int
    epochs: int


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training part gave; losses in nats a byte.

    Attributes:
        training_loss: mean over the pass, with the weights of each step.
        validation_loss: with the weights at its end.
        firing: share of the LIF units that fired in the validation part; NaN without LIF units.
        seconds: that training took.
    """

    training_loss: float
    validation_loss: float
    firing: float
    seconds: float


def described(epoch: Epoch) -> str:
    """An epoch in words."""
    training, validation = math.exp(epoch.training_loss), math.exp(epoch.validation_loss)
    firing = "" if math.isnan(epoch.firing) else f", {epoch.firing:.0%} of the LIF units fire"
    return f"perplexity per byte {training:.2f} training, {validation:.2f} validation{firing}, {epoch.seconds:.0f} s"


def epochs_of(model: "RecurrentLM", training: "Tensor", validation: "Tensor", schedule: Schedule) -> Iterator[Epoch]:
    """Train a model in place, and yield after every epoch.

    Adam, whose learning rate falls along a half cosine to 0; gradients are clipped by their norm.

    Args:
        model: to be trained.
        training: streams ``[batch, bytes]``.
        validation: likewise.
        schedule: how.
    """
    import torch

    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    updates = schedule.epochs * math.ceil((training.shape[1] - 1) / schedule.bptt)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)

    def update(loss: "Tensor") -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _LARGEST_GRADIENT)
        optimizer.step()
        decay.step()

    for _ in range(schedule.epochs):
        start = time.perf_counter()
        training_loss = mean_loss(model.train(), training, schedule.bptt, update)
        seconds = time.perf_counter() - start
        with torch.no_grad(), firing(model) as fired:
            validation_loss = mean_loss(model.eval(), validation, schedule.bptt)
        yield Epoch(training_loss, validation_loss, fired(), seconds)


def mean_loss(
    model: "RecurrentLM", text: "Tensor", bptt: int, update: Callable[["Tensor"], None] | None = None
) -> float:
    """The mean loss of the next byte over whole streams, in nats.

    Args:
        model: begins each stream with a state of zeros.
        text: streams ``[batch, bytes]``.
        bptt: bytes at a time; the state goes on, its gradient does not.
        update: is given the mean loss of each piece.
    """
    from torch.nn.functional import cross_entropy

    from libprune.networks.recurrent import detached

    state, total = None, 0.0
    for ids, following in zip(text[:, :-1].split(bptt, 1), text[:, 1:].split(bptt, 1), strict=True):
        logits, state = model.step(ids, state)
        state = detached(state)
        loss = cross_entropy(logits.flatten(0, 1), following.flatten())
        if update:
            update(loss)
        total += loss.item() * ids.shape[1]
    return total / (text.shape[1] - 1)


@contextmanager
def firing(model: "RecurrentLM") -> Iterator[Callable[[], float]]:
    """Inside the context it is watched which LIF units fire; what is given tells their share, NaN if there are none."""
    import torch

    from libprune.networks.recurrent import RecurrentLayer

    def watching(fired: "Tensor") -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: tuple["Tensor", "Tensor"]) -> None:
            fired.logical_or_(output[0].any(0))

        return hook

    layers = [layer for layer in model.layers if isinstance(layer, RecurrentLayer) and layer.spiking]
    fired = [torch.zeros(layer.spiking, dtype=torch.bool) for layer in layers]
    hooks = [layer.neuron.register_forward_hook(watching(seen)) for layer, seen in zip(layers, fired, strict=True)]
    try:
        yield lambda: torch.cat([torch.zeros(0, dtype=torch.bool), *fired]).float().mean().item()
    finally:
        for hook in hooks:
            hook.remove()


def save(model: "RecurrentLM", config: dict[str, Any], folder: Path) -> None:
    """Write `model.safetensors` and `config.json`, the arguments of `RecurrentLM`, as a folder, whole or not at all."""
    from safetensors.torch import save_file

    from libprune.pipeline.atomic import writing_folder

    with writing_folder(folder) as partial:
        save_file(model.state_dict(), partial / "model.safetensors")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path) -> "RecurrentLM":
    """The model of a folder that `save` wrote, ready to be evaluated.

    Raises:
        ArtifactError: if the folder lacks a file, or holds another model.
        NetworkError: if units of it spike and snntorch is not installed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from libprune.networks.recurrent import RecurrentLM

    try:
        model = RecurrentLM(**json.loads((folder / "config.json").read_text()))
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except LibpruneError:
        raise
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder} holds no whole recurrent model ({type(error).__name__}: {error}); write one with "
            f"`python -m examples.recurrent train --out {folder}`"
        ) from error
    return model.eval()
