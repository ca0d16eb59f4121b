"""The time of one layer by its width, measured on this machine, as a straight line for each part."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from libprune.architecture import Architecture
from libprune.describe import new_config
from libprune.errors import LibpruneError
from libprune.family import families
from libprune.params import Latency


@dataclass(frozen=True)
class Timing:
    """Seconds of one forward pass over ``batch`` sequences of ``tokens`` tokens.

    Attributes:
        widths: units by part of each layer that was measured.
        seconds: what that layer takes, ``[widths]``, without embeddings and head.
        outside: embeddings, last norm and head.
    """

    widths: tuple[Mapping[str, int], ...]
    seconds: NDArray[np.float64]
    outside: float


def measured_widths(architecture: Architecture, number: int) -> list[dict[str, int]]:
    """The dense layer, and layers of which one part has fewer units, evenly spaced among those the config can say.

    Raises:
        LibpruneError: naming a part of which no smaller number of units can be said.
    """
    dense = {part: architecture.units(part) for part in architecture.parts}
    found = [dense]
    for part, shape in architecture.parts.items():
        counts = [count for count in range(1, dense[part]) if shape.says(count)]
        if not counts:
            raise LibpruneError(
                f"the config of this model cannot say fewer than {dense[part]} {part} units in every layer, so that "
                "their time cannot be measured; choose another allocate.objective"
            )
        chosen = np.unique(np.linspace(0, len(counts) - 1, min(number - 1, len(counts))).round().astype(int))
        found += [{**dense, part: counts[i]} for i in chosen]
    return found


def time_layers(
    config: PreTrainedConfig, architecture: Architecture, device: torch.device, dtype: torch.dtype, params: Latency
) -> Timing:
    """Time single layers with random weights; the rounds go over all widths, so that a drift favours none."""
    widths = measured_widths(architecture, params.widths)
    make = _Maker(config, architecture, device, dtype)
    layers = [make(AutoModel, width) for width in widths]
    nothing, rest = make(AutoModel, None), make(AutoModelForCausalLM, None)
    models = [nothing, rest, *layers]
    ids = torch.zeros((params.batch, params.tokens), dtype=torch.long, device=device)
    rounds = []
    for _ in tqdm(range(params.rounds + 1), desc="latency", unit="round"):
        rounds.append([_seconds(model, ids) for model in models])
    empty, outside, *found = (statistics.median(times) for times in zip(*rounds[1:], strict=True))
    return Timing(tuple(widths), np.array(found) - empty, outside)


class _Maker:
    """Models of no layer or of one."""

    def __init__(
        self, config: PreTrainedConfig, architecture: Architecture, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._config, self._architecture, self._device, self._dtype = config, architecture, device, dtype

    def __call__(self, kind: Any, units: Mapping[str, int] | None) -> nn.Module:
        parts = self._architecture.parts
        sizes = dict(self._architecture.sizes) | {parts[part].axis: count for part, count in (units or {}).items()}
        layers = () if units is None else (0,)
        config = new_config(families()[self._architecture.family], self._config, sizes, layers)
        with self._device:
            model: nn.Module = kind.from_config(config, dtype=self._dtype)
        return model.eval()


def _seconds(model: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        _wait(ids)
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False)
        _wait(ids)
        return time.perf_counter() - start


def _wait(ids: Tensor) -> None:
    if ids.device.type != "cpu":
        torch.accelerator.synchronize(ids.device)


def fit_lines(architecture: Architecture, timing: Timing) -> dict[str, Any]:
    """Least squares of seconds = fixed + Σ over parts of unit[part]·units, none below 0.

    Returns:
        `unit` by part and `fixed`, seconds of a layer; `outside`; `widths` and `seconds` as measured; and `misfit`,
        the largest difference between line and measurement as a share of the dense layer's time.

    Raises:
        LibpruneError: if a layer took no time that could be told from noise.
    """
    parts = list(architecture.parts)
    counts = np.array([[1.0, *(width[part] for part in parts)] for width in timing.widths])
    solution, *_ = np.linalg.lstsq(counts, timing.seconds, rcond=None)
    fixed, *units = np.maximum(solution, 0.0).tolist()
    if not any(units):
        raise LibpruneError(
            "no width changed the time of a layer; raise latency.tokens, latency.batch or latency.rounds"
        )
    expected = counts @ np.array([fixed, *units])
    return {
        "unit": dict(zip(parts, units, strict=True)),
        "fixed": fixed,
        "outside": timing.outside,
        "misfit": float(np.abs(expected - timing.seconds).max() / timing.seconds[0]),
        "widths": [dict(width) for width in timing.widths],
        "seconds": timing.seconds.tolist(),
    }
