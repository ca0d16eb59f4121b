"""Watching a network: the inputs of its maps, the gradients at their outputs, and a mask for every unit and sample."""

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
    """The input of a map as rows: the patches of a convolution, the last dimension of any other map.

    Args:
        module: the map.
        x: its input, the samples in the first dimension.
        samples: number of samples.
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
    """The output of a map, or the gradient there, as rows."""
    return features_last(module, y).flatten(0, -2)


@contextmanager
def watched_inputs(
    network: nn.Module, maps: Iterable[Map], samples: int
) -> Iterator[Mapping[Map, list[Float[Tensor, "samples rows input"]]]]:
    """Inside the context, collect the inputs of maps in passes over `samples` samples.

    Yields:
        By map, in the order of their first calls: the rows of each call.
    """
    seen: dict[Map, list[Tensor]] = {}
    with hooked(network) as handles:
        for entry in maps:
            hook = partial(_keep_input, seen, samples, entry)
            handles.append(network.get_submodule(entry.module).register_forward_pre_hook(hook))
        yield seen


@contextmanager
def watched_gradients(
    network: nn.Module, architecture: Architecture
) -> Iterator[Mapping[Map, list[Float[Tensor, "rows output"]]]]:
    """Inside the context, collect the gradients at the output of every map while backward runs.

    Yields:
        By map: the rows of each call.
    """
    seen: dict[Map, list[Tensor]] = {entry: [] for entry in architecture.maps}
    with hooked(network) as handles:
        for entry in architecture.maps:
            hook = partial(_watch_output, seen[entry])
            handles.append(network.get_submodule(entry.module).register_forward_hook(hook))
        yield seen


@contextmanager
def unit_masks(
    network: nn.Module, architecture: Architecture, samples: int
) -> Iterator[Mapping[str, Float[Tensor, "samples units"]]]:
    """Inside the context, multiply every consumer's input by masks of ones, one for each sample and unit.

    The gradient of the loss by these masks is that of the units' own masks, over all consumers, calls and positions.

    Yields:
        By part: the masks, which take a gradient.
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
    """The unit of a part that each input feature of a map belongs to; the number of units for a feature of no unit."""
    units = entry.input.units(part, architecture.sizes)[:: entry.kernel]
    return np.where(units < 0, architecture.units(part), units)


def _keep_input(
    seen: dict[Map, list[Tensor]], samples: int, entry: Map, module: nn.Module, args: tuple[Tensor, ...]
) -> None:
    _require_samples_first(entry.module, args[0], samples)
    seen.setdefault(entry, []).append(input_rows(module, args[0].detach(), samples))


def _watch_output(seen: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
    output.register_hook(partial(_keep_gradient, seen, module))


def _keep_gradient(seen: list[Tensor], module: nn.Module, gradient: Tensor) -> None:
    seen.append(output_rows(module, gradient.detach()))


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
