"""The residual streams of the dense and of the pruned model, side by side, layer by layer.

Repairs layer by layer take both streams of a whole text through the model. Between two layers the streams wait on the
host, or on disk where the weights lie there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.collection.calibration import held_out
from libprune.engine.architecture import Architecture
from libprune.models.layers import first_output, layers_of, run_layer
from libprune.models.memory import Keep, in_memory
from libprune.models.sequences import Sequences


@dataclass(frozen=True)
class Batch:
    """Calibration sequences that go through the model together; all of them held out, or none."""

    ids: Int[Tensor, "batch length"]
    held_out: bool


def split_batches(sequences: Sequences, at_once: int) -> list[Batch]:
    """All sequences in batches, every eighth sequence among the held-out ones."""
    kept_out = held_out(0, len(sequences))
    chosen = ((sequences[~kept_out], False), (sequences[kept_out], True))
    return [Batch(part.ids, flag) for group, flag in chosen for part in group.passes(at_once)]


class Streams:
    """What a text makes of the dense and of the pruned model before one layer.

    Attributes:
        model: the model whose layers are run; dense, or pruned by a mask and with other weights, as it is when it runs.
        architecture: the description of the model.
        batches: the text.
        dense: the states of the dense model before the layer by batch, ``[sequences, length, width]``, on the host.
        pruned: those of the pruned model.
    """

    def __init__(
        self, model: PreTrainedModel, architecture: Architecture, batches: Sequence[Batch], keep: Keep = in_memory
    ) -> None:
        """Begin before the first layer, where both streams are one.

        Args:
            model: as the attribute.
            architecture: as the attribute.
            batches: as the attribute, on the device of the model.
            keep: puts what waits on the host where it takes no memory.
        """
        self.model, self.architecture, self.batches, self._keep = model, architecture, batches, keep
        self._layers = layers_of(model, architecture)
        start = self._layers[0]
        self.dense = self.pruned = [
            self.wait(run_layer(model, self._layers, 0, batch.ids, None, until=start)[0]) for batch in batches
        ]
        self._read: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def begin(self, layer: int) -> None:
        """Keep the streams before a layer if later layers read them; each layer in turn."""
        if any(layer in self.architecture.read(part) for part in self.architecture.parts):
            self._read[layer] = self.dense, self.pruned

    def go_on(self, dense: list[Tensor], pruned: list[Tensor]) -> None:
        """Take the streams behind a layer as those before the next one."""
        self.dense, self.pruned = dense, pruned

    def run(
        self,
        layer: int,
        number: int,
        watched: Sequence[nn.Module] = (),
        until: nn.Module | None = None,
        differentiable: bool = False,
        dense: bool = False,
        state: Tensor | None = None,
    ) -> tuple[Any, list[Tensor]]:
        """Run a layer on a batch.

        Args:
            layer: which.
            number: of the batch.
            watched: modules whose outputs are asked for.
            until: as in `libprune.models.layers.run_layer`.
            differentiable: whether gradients can be taken.
            dense: run it on the dense stream; otherwise on the pruned one.
            state: the states before the layer in place of those that wait.

        Returns:
            What `libprune.models.layers.run_layer` returns.
        """
        ids = self.batches[number].ids
        state = (self.dense if dense else self.pruned)[number] if state is None else state
        owners = {owner for owner, _ in self.architecture.uses(layer)} - {layer}
        earlier = {owner: self._read[owner][0 if dense else 1][number] for owner in owners}
        return run_layer(self.model, self._layers, layer, ids, state, watched, until, differentiable, earlier)

    def behind(self, layer: int, dense: bool = False) -> list[Tensor]:
        """The states behind a layer, by batch, on the host."""
        return [self.wait(first_output(self.run(layer, n, dense=dense)[0])) for n in range(len(self.batches))]

    def gives(self, layer: int, state: Tensor) -> bool:
        """Whether a layer gives this state for the first batch, bit by bit."""
        return torch.equal(first_output(self.run(layer, 0)[0]).cpu(), state.cpu())

    def wait(self, tensor: Tensor) -> Tensor:
        """Put what is needed later on the host, or on disk where weights lie there."""
        return self._keep(tensor.cpu())
