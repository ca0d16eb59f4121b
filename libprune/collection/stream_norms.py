"""Norms on the residual stream itself, behind the parts: by how much they divide what a consumer gives.

Where each layer normalises the residual stream (BERT), an error of a consumer's output counts relative to the size of
the stream at its token, by which the norm divides it. A few tokens have streams many times larger than all others, and
a least-squares fit that counts all tokens alike would serve these few alone. So tokens count by 1/variance there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from libprune.engine.architecture import Architecture, Map

Take = Callable[[Map, Tensor, Tensor], None]
"""A function called with a consumer, its input, and one over the standard deviation of each token of the stream."""


def stream_norms(architecture: Architecture, layer: int) -> list[str]:
    """The modules of a layer that work on the residual stream itself; none where all norms belong to a part."""
    found = (p.name.rpartition(".")[0] for p in architecture.parameters if p.layer == layer and p.part is None)
    return list(dict.fromkeys(found))


def watch_norms(model: nn.Module, architecture: Architecture, layer: int, take: Take) -> list[RemovableHandle]:
    """Call a function for each consumer of a layer, as soon as the next norm on the stream has its input.

    Returns:
        The handles of the hooks; none where the layer has no such norm, so that the function is never called.
    """
    norms, waiting = stream_norms(architecture, layer), list[tuple[Map, Tensor]]()
    if not norms:
        return []
    hooks = {entry.module: partial(_wait, waiting, entry) for entry in architecture.consumers_in(layer)}
    hooks |= {name: partial(_give, waiting, take) for name in norms}
    return [model.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]


def _wait(waiting: list[tuple[Map, Tensor]], entry: Map, module: nn.Module, args: tuple[Any, ...]) -> None:
    waiting.append((entry, args[0]))


def _give(waiting: list[tuple[Map, Tensor]], take: Take, module: nn.Module, args: tuple[Any, ...]) -> None:
    for entry, x in waiting:
        take(entry, x, inverse_deviation(args[0]))
    waiting.clear()


def inverse_deviation(stream: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch 1"]:
    """One over the standard deviation of each token, in float32."""
    return (stream.float().var(-1, unbiased=False, keepdim=True) + _LEAST).rsqrt()


_LEAST = 1e-12
"""Added to the variance, as norms do."""
