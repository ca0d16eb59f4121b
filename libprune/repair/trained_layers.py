"""Layers of a transformer, trained as a whole after their fits: what `libprune.repair.blocks` trains, and towards what.

A layer gets the pruned stream and is trained to give the dense one behind it. With a look ahead, the next layer runs
behind it, with the weights of its own fits, and the dense stream behind that one is what is to be met as well.

Memory on the host: with a look ahead, the states of the whole text twice more than without a training.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.models.layers import first_output, set_parameters, values_of
from libprune.models.memory import Keep, in_memory
from libprune.repair.blocks import Epochs, train_layer, trained_fits
from libprune.repair.least_squares import Fit, new_parameters
from libprune.repair.streams import Streams


@dataclass(frozen=True)
class Training:
    """How whole layers are trained.

    Attributes:
        epochs: how often, and at which rate.
        look_ahead: train a layer for the output of the next one too, where all fits of that one are given and the
            stream stays as wide as it is.
        given: fits of consumers where the training begins, by module.
    """

    epochs: Epochs
    look_ahead: bool = False
    given: Mapping[str, Fit] = field(default_factory=dict)


class LayerTraining:
    """The training of one layer after the other, on the streams before it."""

    def __init__(
        self, streams: Streams, plan: Plan, training: Training, fitted: Collection[str], keep: Keep = in_memory
    ) -> None:
        """Prepare.

        Args:
            streams: what the layers get, and what they are to give.
            plan: what is removed.
            training: how layers are trained.
            fitted: the modules of all consumers that get new weights.
            keep: puts new weights where they take no memory.

        Raises:
            LibpruneError: if no sequence is held out to judge the layers by.
        """
        if len({batch.held_out for batch in streams.batches}) < 2:
            raise LibpruneError(
                "slice.repair: block judges by every eighth sequence, and there are fewer than 8; use more sequences"
            )
        self._streams, self._model, self._architecture = streams, streams.model, streams.architecture
        self._plan, self._training, self._fitted, self._keep = plan, training, fitted, keep

    def ahead(self, layer: int, after: Sequence[Tensor]) -> list[Tensor] | None:
        """What a layer is to give with the next one behind it; the model is dense.

        Args:
            layer: which; it is going to be trained.
            after: the dense stream behind it, by batch.

        Returns:
            The dense streams behind the layer and behind the next one, side by side, by batch; None if the layer is
            trained for its own output.
        """
        architecture, given = self._architecture, self._training.given
        following = architecture.consumers_in(layer + 1) if layer + 1 < architecture.layers else ()
        pruned = {consumer.module for consumer in following if consumer.module in self._fitted}
        asked = self._training.look_ahead and self._plan.width is None  # or fits of the next layer are missing
        if not asked or not following or not given.keys() >= pruned:
            return None
        runs = (self._streams.run(layer + 1, number, dense=True, state=state)[0] for number, state in enumerate(after))
        return [
            self._streams.wait(torch.cat([state, first_output(behind).cpu()], -1))
            for state, behind in zip(after, runs, strict=True)
        ]

    def train(self, layer: int, fits: list[Fit], after: Sequence[Tensor], ahead: Sequence[Tensor] | None) -> list[Fit]:
        """Train all weights of a layer but those that choose experts; the model is masked and keeps the new weights.

        Args:
            layer: which.
            fits: of the layer, at least one; the model has them.
            after: the dense stream behind the layer, by batch.
            ahead: as of `ahead`.

        Returns:
            The fits with the trained weights in their place.
        """
        width, names, streams = self._plan.width, self._trained_in(layer), self._streams
        old = values_of(self._model, names)
        set_parameters(self._model, {name: tensor.clone() for name, tensor in old.items()})

        def run(number: int) -> Tensor:
            trains = torch.is_grad_enabled()
            given = first_output(streams.run(layer, number, differentiable=trains)[0])
            if ahead is None:
                return given[..., :width]
            behind = first_output(streams.run(layer + 1, number, differentiable=trains, state=given)[0])
            return torch.cat([given, behind], -1)

        targets = ahead or [state[..., :width] for state in after]
        held_out = [batch.held_out for batch in streams.batches]
        needed = {name: self._model.get_parameter(name).requires_grad for name in names}
        parameters = {name: self._model.get_parameter(name).requires_grad_() for name in names}
        with nullcontext() if ahead is None else self._given_to(layer + 1):
            trained = train_layer(run, targets, held_out, parameters, self._training.epochs)
        set_parameters(self._model, trained.tensors or old, self._keep)
        for name, parameter in parameters.items():
            parameter.requires_grad_(needed[name])
        return trained_fits(fits, trained)

    def _trained_in(self, layer: int) -> list[str]:
        """The parameters of a layer that are trained: those of the parts that stay, but for what chooses experts."""
        architecture = self._architecture
        routers = {shape.router for shape in architecture.parts.values() if shape.router}
        parts = [part for part in architecture.parts_of(layer) if not self._plan.gone(layer, part)]
        names = [parameter.name for part in parts for parameter in architecture.parameters_of(layer, part)]
        return [name for name in names if not any(f".{router}." in name for router in routers)]

    @contextmanager
    def _given_to(self, layer: int) -> Iterator[None]:
        """Give a layer the weights of its given fits for a while."""
        modules = [consumer.module for consumer in self._architecture.consumers_in(layer)]
        given = self._training.given
        new = new_parameters([given[module] for module in modules if module in given])
        old = values_of(self._model, new)
        set_parameters(self._model, new, self._keep)
        try:
            yield
        finally:
            set_parameters(self._model, old)
