"""What the units of a part send to the rest of the model, shown by the weights and by the part itself.

A unit contributes the sum of W[:, p]·x_p over the positions p of the consumers' inputs x that belong to it. A position
sends nothing that depends on the model's input if its column W[:, p] is zero, or if x_p is one number for all inputs.
The second is shown in two steps. The weights say which outputs of the part's other maps are constant: those whose row
is zero, which are their bias. Then the part runs, with every other output of these maps replaced by noise of both signs
and several sizes: what is the same in x under all of it is the same for all inputs, and the run gives its value.

So no activation function and no kind of attention is known here. What is zero behind a gate, a bias behind an
activation, and values behind attention weights, which sum to one, all show as constants; a channel that a ReLU only
happens to silence is not, because its row is not zero and noise takes its place.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from libprune.engine.architecture import Architecture, Block, Map
from libprune.engine.surgery import along_features, features_last, hooked, oriented

Fixed = dict[str, Bool[Tensor, "..."] | None]
"""By module, which of its outputs noise leaves unchanged, ``[output]``; None: those that are equal for all samples."""

_SCALES = (0.1, 1.0, 10.0)
"""Standard deviations of the noise."""
_FAR = 1e4
"""Standard deviation that is tried on networks as well, whose code may have thresholds, however high."""
_SEQUENCES, _LENGTH = 2, 16
_TOLERANCE = 1e-5
"""How far float32 lets a constant move, of the largest value: weights that sum to one do so up to rounding."""


@dataclass(frozen=True)
class Steady:
    """What one consumer takes while noise runs through the model.

    Attributes:
        values: what each feature is for every input of the model, in every place and call, ``[features]``; NaN where
            it is not one number.
        moves: features that depend on the input, ``[features]``. Others without a value depend on the place or call.
    """

    values: Float64[np.ndarray, " features"]
    moves: Bool[np.ndarray, " features"]


@dataclass(frozen=True)
class Contribution:
    """What the units of one block send.

    Attributes:
        constants: by consumer, what each position of its input is for every input of the model, ``[input]``; NaN where
            it is not one number, 0 where the consumer's column is zero.
        still: units whose contribution is the same for every input, ``[units]``.
        silent: those of them whose contribution is zero, ``[units]``.
        drifts: units whose contribution depends on no input, but on the place or the call, ``[units]``.
    """

    constants: Mapping[str, Float64[np.ndarray, "..."]]
    still: Bool[np.ndarray, " units"]
    silent: Bool[np.ndarray, " units"]
    drifts: Bool[np.ndarray, " units"]


def matrix(model: nn.Module, entry: Map) -> Float[Tensor, "output input"]:
    """The weight of a map of a model; of a convolution by patches."""
    return oriented(entry, model.get_parameter(entry.weight).detach())


def language_contributions(model: nn.Module, architecture: Architecture) -> dict[Block, Contribution]:
    """What the units of every block of a language model send; noise runs only where a map of the block has a zero row.

    Args:
        model: float32, on the CPU, in evaluation mode; its masks multiplied into the weights.
    """
    rows = {block: _constant_rows(model, _producers(architecture, block), {}) for block in architecture.blocks()}
    rows = {block: zero for block, zero in rows.items() if any(row.any() for row in zero.values())}
    consumers = [consumer.module for block in rows for consumer in architecture.consumers(*block)]
    generator = torch.Generator().manual_seed(0)
    length = min(_LENGTH, architecture.sizes.get("positions", _LENGTH))
    ids = torch.randint(architecture.sizes["vocab"], (_SEQUENCES, length), generator=generator)
    fixed: Fixed = {name: zero for producers in rows.values() for name, zero in producers.items()}
    forwards = [lambda: model(input_ids=ids, use_cache=False)] if rows else []
    return _contributions(model, architecture, _under_noise(model, fixed, consumers, forwards, _SCALES, generator))


def network_contributions(
    network: nn.Module, architecture: Architecture, probes: Sequence[Tensor], generator: torch.Generator
) -> dict[Block, Contribution]:
    """What the units of every part of a network send, with noise in the place of what depends on the input.

    The weights say which outputs of maps and embeddings do: those with a row that is not zero, and once it is known
    which inputs of a map are constants, those whose row reads another one. Of everything else that has weights, such as
    norms and depthwise convolutions, those outputs do that move.

    Args:
        network: on the CPU, in evaluation mode; its masks multiplied into the weights.
        probes: inputs, ``[samples, ...]`` each, of every shape that it is run on.
        generator: where the noise comes from.
    """
    fixed: Fixed = {
        stored.name.rpartition(".")[0]: None for stored in (*architecture.parameters, *architecture.buffers)
    }
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding):
            fixed[name] = (module.weight == 0).all(dim=0)
    consumers = [entry.module for entry in architecture.maps]
    forwards = [partial(network, probe) for probe in probes]
    rows = _constant_rows(network, architecture.maps, {})
    while True:
        seen = _under_noise(network, {**fixed, **rows}, consumers, forwards, (*_SCALES, _FAR), generator)
        known, rows = rows, _constant_rows(network, architecture.maps, seen)
        if all(torch.equal(known[name], row) for name, row in rows.items()):
            return _contributions(network, architecture, seen)


def _producers(architecture: Architecture, block: Block) -> Iterator[Map]:
    """The maps of a part that its consumers' inputs are made from."""
    axis = architecture.parts[block[1]].axis
    return (m for m in architecture.maps_of(*block) if axis in m.output.names or axis not in m.input.names)


def _constant_rows(model: nn.Module, maps: Iterable[Map], seen: Mapping[str, Steady]) -> dict[str, Bool[Tensor, "..."]]:
    """By map which of its outputs read nothing that moves, as far as its inputs have been seen, ``[output]``."""
    rows = {}
    for entry in maps:
        read = matrix(model, entry) != 0
        moving = _by_position(entry, seen.get(entry.module), read.shape[1])[1]
        rows[entry.module] = ~read[:, torch.from_numpy(moving)].any(dim=1)
    return rows


def _contributions(
    model: nn.Module, architecture: Architecture, seen: Mapping[str, Steady]
) -> dict[Block, Contribution]:
    return {block: _contribution(model, architecture, block, seen) for block in architecture.blocks()}


def _contribution(
    model: nn.Module, architecture: Architecture, block: Block, seen: Mapping[str, Steady]
) -> Contribution:
    """What the units of a block send, from what its consumers take; one that was not watched takes no constant."""
    axis, count = architecture.parts[block[1]].axis, architecture.units(block[1])
    moves, adds, uneven = (np.zeros(count, dtype=bool) for _ in range(3))
    constants = {}
    for consumer in architecture.consumers(*block):
        read = (matrix(model, consumer) != 0).any(dim=0).numpy()
        values, moving = _by_position(consumer, seen.get(consumer.module), len(read))
        sent = np.where(read, values, 0.0)
        units = consumer.input.units(axis, architecture.sizes)
        moves[units[(units >= 0) & read & moving]] = True
        adds[units[(units >= 0) & (sent != 0)]] = True
        uneven[units[(units >= 0) & np.isnan(values) & ~moving]] = True
        constants[consumer.module] = sent
    drifts = ~moves & adds & uneven
    return Contribution(constants, ~moves & ~drifts, ~moves & ~adds, drifts)


def _by_position(
    consumer: Map, steady: Steady | None, count: int
) -> tuple[Float64[np.ndarray, " input"], Bool[np.ndarray, " input"]]:
    """Values and moves of each position of a consumer's rows, of which a feature has one for each entry of a kernel."""
    if steady is None:
        return np.full(count, np.nan), np.ones(count, dtype=bool)
    return np.repeat(steady.values, consumer.kernel), np.repeat(steady.moves, consumer.kernel)


def _under_noise(
    model: nn.Module,
    fixed: Fixed,
    consumers: Iterable[str],
    forwards: Sequence[Callable[[], object]],
    scales: Sequence[float],
    generator: torch.Generator,
) -> dict[str, Steady]:
    """What the input of each consumer is with noise in the place of the outputs of other modules.

    Args:
        model: in evaluation mode.
        fixed: the modules, and which of their outputs stay as they are.
        consumers: modules whose input is watched.
        forwards: how the model is run, once for each kind of input.
        scales: standard deviations of the noise, one after the other.
        generator: where the noise comes from.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in consumers}
    for forward, scale in product(forwards, scales):
        with hooked(model) as handles, torch.no_grad():
            for name, outputs in fixed.items():
                hook = partial(_replace, outputs, scale, generator)
                handles.append(model.get_submodule(name).register_forward_hook(hook))
            for name, calls in seen.items():
                handles.append(model.get_submodule(name).register_forward_pre_hook(partial(_look, calls)))
            forward()
    return {name: _steady(torch.stack(calls)) for name, calls in seen.items() if calls}


def _replace(
    fixed: Bool[Tensor, "..."] | None,
    scale: float,
    generator: torch.Generator,
    module: nn.Module,
    args: tuple[Any, ...],
    output: Any,
) -> Any:
    if isinstance(output, tuple):
        return tuple(_replace(fixed, scale, generator, module, args, item) for item in output)
    noise = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    left = _alike(output.amin(0), output.amax(0)) if fixed is None else along_features(module, fixed)
    return torch.where(left, output, scale * noise)


def _look(calls: list[Tensor], module: nn.Module, args: tuple[Any, ...]) -> None:
    """Append the lowest and highest value of features, and whether they differ between samples, ``[3, features]``."""
    x = features_last(module, args[0]).double()
    low, high = (extreme.reshape(-1, x.shape[-1]) for extreme in (x.amin(0), x.amax(0)))
    calls.append(torch.stack([low.amin(0), high.amax(0), (~_alike(low, high)).any(0)]))


def _steady(calls: Float64[Tensor, "calls 3 features"]) -> Steady:
    low, high, moves = calls[:, 0].amin(0), calls[:, 1].amax(0), calls[:, 2].amax(0)
    values = torch.where(_alike(low, high), (low + high) / 2, torch.nan)
    return Steady(values.numpy(), moves.bool().numpy())


def _alike(low: Float[Tensor, "..."], high: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """Whether a range is that of rounding; not where it is not finite."""
    return (high - low <= _TOLERANCE * torch.maximum(low.abs(), high.abs())) & torch.isfinite(high - low)
