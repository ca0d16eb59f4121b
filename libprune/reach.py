"""What the units of a part send to the residual stream, told from the weights and from the part itself.

A unit contributes the sum of W[:, p]·x_p over the positions p of the consumers' inputs x that belong to it. A position
sends nothing that depends on the model's input if its column W[:, p] is zero, or if x_p is one number for all inputs.
The second is shown in two steps. The weights say which outputs of the part's other maps are constant: those whose row
is zero, which are their bias. Then the part runs, with every other output of these maps replaced by noise of both signs
and several sizes: what is the same in x under all of it is the same for all inputs, and the run gives its value.

So no activation function and no kind of attention is known here. What is zero behind a gate, a bias behind an
activation, and values behind attention weights, which sum to one, are all found constant; a channel that a ReLU only
happens to silence is not, because its row is not zero and noise takes its place.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from libprune.architecture import Architecture, Map

Block = tuple[int, str]
"""A layer and a part."""

_SCALES = (0.1, 1.0, 10.0)
_SEQUENCES, _LENGTH = 2, 16
_TOLERANCE = 1e-5
"""Of the largest value: how far float32 lets a constant move, behind weights that sum to one only up to rounding."""


@dataclass(frozen=True)
class Reach:
    """What the units of one part of one block send.

    Attributes:
        constants: by consumer, what each position of its input is for every input of the model, ``[input]``; NaN where
            it depends on that, 0 where the consumer's column is zero.
        still: units whose contribution is the same for every input, ``[units]``.
        silent: those of them whose contribution is zero, ``[units]``.
    """

    constants: Mapping[str, Float64[np.ndarray, "..."]]
    still: Bool[np.ndarray, " units"]
    silent: Bool[np.ndarray, " units"]


def matrix(model: nn.Module, entry: Map) -> Float[Tensor, "output input"]:
    """The weight of a map, whatever way it is stored."""
    weight = model.get_parameter(entry.weight).detach()
    return weight.T if entry.transposed else weight


def reaches(model: nn.Module, architecture: Architecture) -> dict[Block, Reach]:
    """What the units of every part send.

    Args:
        model: float32, on the CPU, in evaluation mode; its masks multiplied into the weights.
        architecture: its description.
    """
    constants = _constants(model, architecture)
    return {block: _reach(model, architecture, block, constants) for block in architecture.blocks()}


def _reach(
    model: nn.Module, architecture: Architecture, block: Block, constants: Mapping[str, Float64[np.ndarray, "..."]]
) -> Reach:
    axis, count = architecture.parts[block[1]].axis, architecture.units(block[1])
    varies, adds = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
    sent = {}
    for consumer in architecture.consumers(*block):
        unread = (matrix(model, consumer) == 0).all(dim=0).numpy()
        found = np.where(unread, 0.0, constants.get(consumer.module, np.nan))
        units = consumer.input.units(axis, architecture.sizes)
        varies[units[(units >= 0) & np.isnan(found)]] = True
        adds[units[(units >= 0) & (found != 0)]] = True
        sent[consumer.module] = found
    return Reach(sent, ~varies, ~adds)


def _constants(model: nn.Module, architecture: Architecture) -> dict[str, Float64[np.ndarray, "..."]]:
    """By consumer the constants of its input, NaN where there is none; of the blocks that have a zero row."""
    rows = {block: _zero_rows(model, architecture, block) for block in architecture.blocks()}
    rows = {block: zero for block, zero in rows.items() if any(row.any() for row in zero.values())}
    if not rows:
        return {}
    generator = torch.Generator().manual_seed(0)
    length = min(_LENGTH, architecture.sizes.get("positions", _LENGTH))
    ids = torch.randint(architecture.sizes["vocab"], (_SEQUENCES, length), generator=generator)
    seen: dict[str, list[Tensor]] = {}
    for scale in _SCALES:
        with _noise(model, architecture, rows, scale, generator, seen), torch.no_grad():
            model(input_ids=ids, use_cache=False)
    return {name: _same(torch.stack(ranges)) for name, ranges in seen.items()}


def _producers(architecture: Architecture, block: Block) -> Iterator[Map]:
    """The maps of a part that its consumers' inputs are made from."""
    axis = architecture.parts[block[1]].axis
    return (m for m in architecture.maps_of(*block) if axis in m.output.names or axis not in m.input.names)


def _zero_rows(model: nn.Module, architecture: Architecture, block: Block) -> dict[str, Bool[Tensor, "..."]]:
    """By producer which of its outputs are its bias whatever the input, ``[output]``."""
    return {m.module: (matrix(model, m) == 0).all(dim=1) for m in _producers(architecture, block)}


@contextmanager
def _noise(
    model: nn.Module,
    architecture: Architecture,
    rows: Mapping[Block, Mapping[str, Bool[Tensor, "..."]]],
    scale: float,
    generator: torch.Generator,
    seen: dict[str, list[Tensor]],
) -> Iterator[None]:
    """Noise in the place of all outputs of producers but those of zero rows, and a look at the consumers' inputs."""
    with ExitStack() as stack:
        for block, producers in rows.items():
            for name, zero in producers.items():
                hook = partial(_replace, zero, scale, generator)
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
            for consumer in architecture.consumers(*block):
                module, ranges = model.get_submodule(consumer.module), seen.setdefault(consumer.module, [])
                stack.callback(module.register_forward_pre_hook(partial(_look, ranges)).remove)
        yield


def _replace(
    zero: Bool[Tensor, "..."],
    scale: float,
    generator: torch.Generator,
    module: nn.Module,
    args: tuple[Any, ...],
    output: Float[Tensor, "..."],
) -> Float[Tensor, "..."]:
    return torch.where(zero, output, scale * torch.randn(output.shape, generator=generator))


def _look(ranges: list[Tensor], module: nn.Module, args: tuple[Any, ...]) -> None:
    values = args[0].flatten(0, -2).double()
    ranges.append(torch.stack([values.amin(0), values.amax(0), values.mean(0)]))


def _same(ranges: Float64[Tensor, "runs 3 input"]) -> Float64[np.ndarray, " input"]:
    """The mean of each position where it does not move over all runs, else NaN."""
    low, high, mean = ranges[:, 0].amin(0), ranges[:, 1].amax(0), ranges[:, 2].mean(0)
    moves = high - low > _TOLERANCE * torch.maximum(low.abs(), high.abs())
    return torch.where(moves, torch.nan, mean).numpy()
