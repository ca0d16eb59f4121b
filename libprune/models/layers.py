"""Running single layers of a model, as the whole model would run them.

The model itself makes the embeddings, masks and position encodings. The layers before the one of interest are skipped,
and the pass ends as soon as its results are there. So a family file need not describe the arguments of its layers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture
from libprune.engine.stacks import StackedMap
from libprune.engine.surgery import hooked
from libprune.models.compute import per_sequence
from libprune.models.memory import Keep, in_memory


def layers_of(model: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """The modules of a model's layers, in their order."""
    return [model.get_submodule(f"{architecture.layers_path}.{layer}") for layer in range(architecture.layers)]


def first_output(output: Any) -> Tensor:
    """The hidden states in the output of a layer, which is a tensor or a tuple that begins with them."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states


def copy_output(output: Any, device: torch.device | str) -> Any:
    """A copy of a layer's output, a tensor or a tuple, on a device; the model may write into an output."""
    if isinstance(output, tuple):
        return tuple(copy_output(item, device) for item in output)
    return output.to(device, copy=True) if isinstance(output, Tensor) else output


@contextmanager
def skipped(layers: Sequence[nn.Module], output: Any, device: torch.device, runs: bool = False) -> Iterator[None]:
    """Inside the context, consecutive layers compute nothing, and the last of them returns the given output.

    The outputs of the others are only passed on to the next layer. The modules stay where they are, with their
    attributes and hooks: only `forward` is another function.

    Args:
        layers: at least one.
        output: what the last of them returns.
        device: of the model.
        runs: whether the first layer computes nevertheless, for what it hands to later ones beside its output.
    """
    own = [vars(layer).get("forward") for layer in layers]
    filler, last = copy_output(output, device), copy_output(output, device)
    try:
        for layer in layers:
            returned = last if layer is layers[-1] else filler
            run = layer.forward if runs and layer is layers[0] else None
            layer.forward = partial(_return, returned, run)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _return(output: Any, run: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    if run is not None:
        run(*args, **kwargs)
    return output


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the context, some parameters of the model have other values."""
    before = values_of(model, tensors)
    try:
        set_parameters(model, tensors)
        yield
    finally:
        set_parameters(model, before)


def values_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """What parameters hold until `set_parameters` gives them other values: on the CPU no copies are made."""
    parameters = {name: model.get_parameter(name) for name in names}
    return {name: p.data if p.device.type == "cpu" else p.detach().clone() for name, p in parameters.items()}


def set_parameters(model: nn.Module, tensors: Mapping[str, Tensor], keep: Keep = in_memory) -> None:
    """Give parameters of a model other values, in their type and on their device; on the CPU without a copy.

    Args:
        model: with the parameters.
        tensors: the values by name, read one at a time.
        keep: where the values are put.
    """
    for name in tensors:
        parameter = model.get_parameter(name)
        if parameter.device.type == "cpu":
            parameter.data = keep(tensors[name].detach().to(parameter).contiguous())
        else:
            parameter.detach().copy_(tensors[name])


class _SeenError(Exception):
    """Ends a pass whose results are there."""


class _Seen:
    """What hooks keep of a pass of so many sequences: the outputs of modules, and the result at which it ends."""

    def __init__(self, sequences: int) -> None:
        self.result: Any = None
        self.outputs: dict[nn.Module, Tensor] = {}
        self._sequences = sequences

    def watch(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.outputs[module] = per_sequence(output, self._sequences)

    def end_at_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        self.result = (x, args[1]) if isinstance(module, StackedMap) else per_sequence(x, self._sequences)
        raise _SeenError

    def end_at_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.result = output
        raise _SeenError


def run_layer(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    layer: int,
    ids: Int[Tensor, "batch length"],
    state: Any,
    watched: Sequence[nn.Module] = (),
    until: nn.Module | None = None,
    differentiable: bool = False,
    earlier: Mapping[int, Any] = MappingProxyType({}),
) -> tuple[Any, list[Tensor]]:
    """Run one layer on the output of the layer before it.

    Args:
        layers: all its layers.
        layer: index of the layer to run.
        ids: token ids of the batch.
        state: the output of the layer before; not used for the first layer.
        watched: modules of the layer whose outputs are wanted.
        until: the layer itself or a module in it, at whose input the pass ends.
        differentiable: whether gradients can be taken of the results.
        earlier: by index the layers before it whose keys and values it uses, with the output of the layer before each;
            they run too.

    Returns:
        The output of the layer, or the input of `until`, of a stack its rows and their routing; and the outputs of the
        watched modules.
    """
    seen = _Seen(len(ids))
    with hooked(model) as handles, torch.set_grad_enabled(differentiable):
        handles += [module.register_forward_hook(seen.watch) for module in watched]
        if until is None:
            handles.append(layers[layer].register_forward_hook(seen.end_at_output))
        else:
            handles.append(until.register_forward_pre_hook(seen.end_at_input, with_kwargs=True))
        first = 0
        with ExitStack() as stack, suppress(_SeenError):
            for run, before in sorted({**earlier, layer: state}.items(), key=lambda item: item[0]):
                if run > 0:
                    stack.enter_context(skipped(layers[first:run], before, ids.device, runs=first in earlier))
                first = run
            model.base_model(input_ids=ids, use_cache=False)
    return seen.result, [seen.outputs[module] for module in watched]
