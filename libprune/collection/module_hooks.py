"""Watching a network: what its maps take and give, and a mask for every unit of every sample."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from libprune.engine.architecture import Architecture, Map
from libprune.engine.errors import StatisticsError
from libprune.engine.surgery import CONVOLUTIONS, along_features, features_last, hooked


def input_rows(module: nn.Module, x: Tensor, samples: int) -> Float[Tensor, "samples rows input"]:
    """What a map takes, row by row: the patches of a convolution, the last dimension of another map.

    Args:
        module: the map.
        x: its input, the samples in the first dimension.
        samples: how many samples there are.
    """
    if not isinstance(module, CONVOLUTIONS):
        return x.reshape(samples, -1, x.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if isinstance(module, nn.Conv1d):
        padded, kernel, dilation, stride = padded.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    rows = nn.functional.unfold(padded, kernel, dilation, stride=stride).mT
    return rows.reshape(samples, -1, rows.shape[-1])


def output_rows(module: nn.Module, y: Tensor) -> Float[Tensor, "rows output"]:
    """What a map gives, or the gradient there, row by row."""
    return features_last(module, y).flatten(0, -2)


@contextmanager
def watched_inputs(
    network: nn.Module, maps: Iterable[Map], samples: int
) -> Iterator[Mapping[Map, list[Float[Tensor, "samples rows input"]]]]:
    """Inside the context, the inputs of maps in a pass over samples, one entry a call, maps in the order of calls."""
    seen: dict[Map, list[Tensor]] = {}

    def keep(entry: Map, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        _require_samples_first(entry.module, args[0], samples)
        seen.setdefault(entry, []).append(input_rows(module, args[0].detach(), samples))

    with hooked(network) as handles:
        for entry in maps:
            handles.append(network.get_submodule(entry.module).register_forward_pre_hook(partial(keep, entry)))
        yield seen


@contextmanager
def watched_gradients(
    network: nn.Module, architecture: Architecture
) -> Iterator[Mapping[Map, list[Float[Tensor, "rows output"]]]]:
    """Inside the context, the gradients at the output of every map, one entry a call, once backward has run."""
    seen: dict[Map, list[Tensor]] = {entry: [] for entry in architecture.maps}

    def keep(entry: Map, module: nn.Module, gradient: Tensor) -> None:
        seen[entry].append(output_rows(module, gradient.detach()))

    def watch(entry: Map, module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(partial(keep, entry, module))

    with hooked(network) as handles:
        for entry in architecture.maps:
            handles.append(network.get_submodule(entry.module).register_forward_hook(partial(watch, entry)))
        yield seen


@contextmanager
def unit_masks(
    network: nn.Module, architecture: Architecture, samples: int
) -> Iterator[Mapping[str, Float[Tensor, "samples units"]]]:
    """Inside the context every consumer's input is multiplied by masks of ones, one for each sample and unit.

    The gradient of the loss by them is that of the units' own masks, over all consumers, calls and positions.

    Yields:
        By part the masks, which take a gradient.
    """
    device = next(network.parameters()).device
    masks = {part: torch.ones(samples, architecture.units(part), device=device) for part in architecture.parts}
    for mask in masks.values():
        mask.requires_grad_(True)
    with hooked(network) as handles:
        for entry in architecture.maps:
            for part, mask in masks.items():
                if part in entry.input.names:
                    places = torch.from_numpy(_places(architecture, entry, part)).to(device)
                    hook = partial(_multiply, entry.module, mask, places)
                    handles.append(network.get_submodule(entry.module).register_forward_pre_hook(hook))
        yield masks


def _places(architecture: Architecture, entry: Map, part: str) -> Int[np.ndarray, " features"]:
    """For every feature that a map takes its unit of a part; one past the last for features of none."""
    units = entry.input.units(part, architecture.sizes)[:: entry.kernel]
    return np.where(units < 0, architecture.units(part), units)


def _require_samples_first(name: str, x: Tensor, samples: int) -> None:
    if len(x) % samples:
        raise StatisticsError(
            f"module {name!r} takes an input of shape {list(x.shape)} for {samples} samples; the first dimension must "
            "run over the samples"
        )


def _multiply(
    name: str, mask: Tensor, places: Tensor, module: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    x, samples = args[0], len(mask)
    _require_samples_first(name, x, samples)
    factors = torch.cat([mask, mask.new_ones(samples, 1)], 1)[:, places].repeat_interleave(len(x) // samples, 0)
    if isinstance(module, CONVOLUTIONS):
        return (x * along_features(module, factors), *args[1:])
    return (x * factors.view(len(x), *[1] * (x.ndim - 2), -1), *args[1:])
