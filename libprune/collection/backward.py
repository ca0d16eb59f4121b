"""Watching a backward pass: the input and the gradients of every linear map, as soon as backward has them.

Autograd only computes gradients of activations here; a map's weight gradient is the product of its
output gradient and its input. So nothing waits for the end of backward, sharded and offloaded
weights need no gradient of their own, and gradients of single sequences are known.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture, Map
from libprune.engine.stacks import Routing
from libprune.engine.surgery import hooked
from libprune.models.compute import Finite, per_sequence

OnGradient = Callable[[Map, Tensor, Tensor], None]
"""A function called with a map, its input ``[sequences, tokens, input]``, and a gradient at its input or output."""
OnRows = Callable[[Map, Tensor, Tensor, Routing], None]
"""A function called with a stack of maps, its input ``[rows, input]``, the gradient there, and the routing."""


class Tape:
    """The inputs of the maps, held until their gradients arrive.

    With recomputation the inputs of the first forward pass are not held: backward runs each layer
    again, and brings them back. The gradient at a layer's last output comes before that, and waits.

    Attributes:
        first: index of the first sequence of the pass in progress, for messages.
        finite: checks what passes.
    """

    def __init__(
        self,
        on_output: OnGradient,
        on_input: OnGradient | None,
        recompute: bool,
        on_rows: OnRows | None = None,
        finite: Finite | None = None,
    ) -> None:
        self.first, self.finite = 0, finite or Finite()
        self._on_rows = on_rows
        self._sequences = 0
        self._on_output = on_output
        self._on_input = on_input
        self._recompute = recompute
        self._in_backward = False
        self._inputs: dict[str, Tensor] = {}
        self._waiting: dict[str, Tensor] = {}

    def begin(self, first: int, sequences: int) -> None:
        """Begin a pass over sequences, the first of which has the given index."""
        self.first, self._sequences = first, sequences

    def backward(self, loss: Tensor) -> None:
        """Run backward from a loss; this calls the functions with the gradients."""
        self._in_backward = True
        try:
            loss.backward()
        finally:
            self._in_backward = False
            self._inputs.clear()
            self._waiting.clear()

    def enter(self, entry: Map, consumes: bool, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """The forward pre-hook of a map: keep its input."""
        if self._in_backward or not self._recompute:
            self._inputs[entry.module] = args[0].detach()
        if entry.module in self._waiting:
            self._give_output(entry, consumes, self._waiting.pop(entry.module))
        if not self._in_backward and consumes:
            self._require_finite(args[0].detach(), f"the input of {entry.module}")
            if self._on_input is not None:
                args[0].register_hook(partial(self._take_input, entry))

    def leave(self, entry: Map, consumes: bool, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """The forward hook of a map: wait for the gradient at its output."""
        if not self._in_backward:
            output.register_hook(partial(self._take_output, entry, consumes))

    def enter_rows(self, entry: Map, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The forward pre-hook of a stack that consumes: keep its rows, and wait for the gradient there."""
        x, routing = args
        if self._in_backward or not self._recompute:
            self._inputs[entry.module] = x.detach()
        if not self._in_backward:
            self.finite.require_rows(x.detach(), self._sequence(routing), f"the input of {entry.module}")
            x.register_hook(partial(self._take_rows, entry, routing))

    def _take_rows(self, entry: Map, routing: Routing, gradient: Tensor) -> None:
        self.finite.require_rows(gradient, self._sequence(routing), f"the gradient at the input of {entry.module}")
        assert self._on_rows is not None
        self._on_rows(entry, self._inputs.pop(entry.module), gradient, routing)

    def _sequence(self, routing: Routing) -> Tensor:
        """The index of each row's sequence."""
        return self.first + routing.tokens // (routing.total // self._sequences)

    def leave_rows(self, entry: Map, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """The forward hook of a stack that consumes: pass the gradient at its output on, with an empty input."""
        if not self._in_backward:
            output.register_hook(lambda gradient: self._give(self._on_output, entry, gradient[..., :0], gradient))

    def _take_output(self, entry: Map, consumes: bool, gradient: Tensor) -> None:
        self._require_finite(gradient, f"the gradient at the output of {entry.module}")
        if entry.module in self._inputs:
            self._give_output(entry, consumes, gradient)
        else:
            self._waiting[entry.module] = gradient

    def _give_output(self, entry: Map, consumes: bool, gradient: Tensor) -> None:
        self._give(self._on_output, entry, self._inputs[entry.module], gradient)
        if not consumes or self._on_input is None:
            del self._inputs[entry.module]

    def _take_input(self, entry: Map, gradient: Tensor) -> None:
        self._require_finite(gradient, f"the gradient at the input of {entry.module}")
        assert self._on_input is not None
        self._give(self._on_input, entry, self._inputs.pop(entry.module), gradient)

    def _require_finite(self, values: Tensor, what: str) -> None:
        self.finite.require(per_sequence(values, self._sequences), self.first, what)

    def _give(self, take: OnGradient, entry: Map, inputs: Tensor, gradient: Tensor) -> None:
        take(entry, per_sequence(inputs, self._sequences), per_sequence(gradient, self._sequences))


@contextmanager
def watching(
    model: PreTrainedModel,
    architecture: Architecture,
    on_output: OnGradient,
    on_input: OnGradient | None = None,
    recompute: bool = False,
    on_rows: OnRows | None = None,
    finite: Finite | None = None,
) -> Iterator[Tape]:
    """Inside the context, `Tape.backward` calls the functions with the gradients of every linear map of the layers.

    Args:
        model: the model; no parameter of it takes a gradient inside.
        on_output: called for every map with the gradient at its output.
        on_input: called for every consumer with the gradient at its input, after `on_output`.
        recompute: whether the layers are computed again in backward.
        on_rows: called for every stack that consumes with its rows and the gradient there, and with `on_output` for the
            gradient at its output. Without it stacks are not watched.
        finite: checks what passes; None for one that waits at each check.
    """
    tape = Tape(on_output, on_input, recompute, on_rows, finite)
    with hooked(model) as handles:
        model.requires_grad_(False)
        embedding = model.get_input_embeddings()
        handles.append(embedding.register_forward_hook(_require_grad))
        consumers = {c.module for block in architecture.blocks() for c in architecture.consumers(*block)}
        for entry in architecture.maps:
            module, consumes = model.get_submodule(entry.module), entry.module in consumers
            if entry.stack:
                if consumes and on_rows is not None:
                    handles.append(module.register_forward_pre_hook(partial(tape.enter_rows, entry)))
                    handles.append(module.register_forward_hook(partial(tape.leave_rows, entry)))
                continue
            handles.append(module.register_forward_pre_hook(partial(tape.enter, entry, consumes)))
            handles.append(module.register_forward_hook(partial(tape.leave, entry, consumes)))
        yield tape


def _require_grad(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.requires_grad_(True) if torch.is_grad_enabled() else output


@contextmanager
def watching_parameters(
    model: PreTrainedModel, architecture: Architecture, parameters: Mapping[str, Callable[[Tensor], None]]
) -> Iterator[None]:
    """Inside the context, backward gives the gradients of parameters themselves.

    Args:
        model: the model, `exposed` if it is a mixture.
        architecture: its description.
        parameters: for the name of each parameter a function. It is called in backward with a tensor whose `grad` is
            the parameter's, and may set that to None. It is called once for each use of a stack of experts, and once
            for any other parameter.
    """
    stacks = {name: entry.module for entry in architecture.maps if entry.stack for name in (entry.weight, entry.bias)}
    with ExitStack() as stack:
        for name, take in parameters.items():
            if name in stacks:
                hooks = model.get_submodule(stacks[name]).on_gradient
                own = name.rpartition(".")[2]
                hooks[own] = take
                stack.callback(hooks.pop, own)
            else:
                tensor = model.get_parameter(name).requires_grad_(True)
                stack.callback(tensor.register_post_accumulate_grad_hook(take).remove)
        yield


def weight_gradient(
    entry: Map, inputs: Float[Tensor, "*tokens input"], deltas: Float[Tensor, "*tokens output"]
) -> Float[Tensor, "rows columns"]:
    """The gradient of a map's weight, in storage order: the sum over tokens of output gradient times input."""
    x, delta = inputs.flatten(0, -2), deltas.flatten(0, -2)
    return x.T @ delta if entry.transposed else delta.T @ x
