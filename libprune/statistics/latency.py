"""The time of one layer by its width, measured on this machine, as a straight line for each part."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from libprune.engine.architecture import Architecture
from libprune.engine.errors import LibpruneError
from libprune.engine.family import families
from libprune.engine.heads import HEADS
from libprune.engine.stock_config import new_config
from libprune.pipeline.sections import Latency


@dataclass(frozen=True)
class Timing:
    """Seconds of one forward pass over ``batch`` sequences of ``tokens`` tokens.

    Attributes:
        widths: units by part of each layer that was measured.
        seconds: what that layer takes, ``[widths]``, without embeddings and head.
        outside: embeddings, last norm, and the head; of a model that writes at one position of each sequence, as in a
            prefill.
    """

    widths: tuple[Mapping[str, int], ...]
    seconds: NDArray[np.float64]
    outside: float


def measured_widths(architecture: Architecture, number: int) -> list[dict[str, int]]:
    """The dense layer, and layers of which one part has fewer units.

    The counts are at even distances among those that the config can say and, of a long axis, that are as even as
    the dense one: an odd number of channels would be slow for a reason of its own.

    Raises:
        LibpruneError: if no smaller layer can be said.
    """
    dense = {part: architecture.units(part) for part in architecture.parts}
    found = [dense]
    for part, shape in architecture.parts.items():
        step = gcd(dense[part], _EVEN) if dense[part] > _EVEN else 1
        counts = [count for count in range(step, dense[part], step) if shape.says(count)]
        chosen = np.unique(np.linspace(0, len(counts), number - 1, endpoint=False).astype(int))
        found += [{**dense, part: counts[i]} for i in chosen if counts]
    if len(found) == 1:
        raise LibpruneError("the config of this model cannot say a smaller layer to time; choose another objective")
    return found


_EVEN = 64


def time_layers(
    config: PreTrainedConfig, architecture: Architecture, device: torch.device, dtype: torch.dtype, params: Latency
) -> Timing:
    """Time single layers with random weights; the rounds go over all widths, so that a drift favours none."""
    widths = measured_widths(architecture, params.widths)
    make = _Maker(config, architecture, device, dtype)
    nothing, rest = make(AutoModel, None), make(HEADS[architecture.head].loader, None)
    layers = []
    for width in widths:
        layers.append(make(AutoModel, width))
        layers[-1].set_input_embeddings(nothing.get_input_embeddings())  # one copy is enough
    ids = torch.zeros((params.batch, params.tokens), dtype=torch.long, device=device)
    rounds = []
    for _ in tqdm(range(params.rounds + 1), desc="latency", unit="round"):
        head = _seconds(rest, ids, **({"logits_to_keep": 1} if architecture.head == "causal_lm" else {}))
        rounds.append([_seconds(nothing, ids), head, *(_seconds(layer, ids) for layer in layers)])
    empty, outside, *found = (statistics.median(times) for times in zip(*rounds[1:], strict=True))
    return Timing(tuple(widths), np.array(found) - empty, outside)


class _Maker:
    """Models of no layer or of one."""

    def __init__(
        self, config: PreTrainedConfig, architecture: Architecture, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._config, self._architecture, self._device, self._dtype = config, architecture, device, dtype

    def __call__(self, kind: Any, units: Mapping[str, int] | None) -> PreTrainedModel:
        parts = self._architecture.parts
        sizes = dict(self._architecture.sizes) | {parts[part].axis: count for part, count in (units or {}).items()}
        layers = () if units is None else (0,)
        config = new_config(families()[self._architecture.family], self._config, sizes, layers)
        with self._device:
            model: PreTrainedModel = kind.from_config(config, dtype=self._dtype)
        return model.eval()


def _seconds(model: PreTrainedModel, ids: Tensor, **more: Any) -> float:
    with torch.no_grad():
        _wait(ids)
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False, **more)
        _wait(ids)
        return time.perf_counter() - start


def _wait(ids: Tensor) -> None:
    if ids.device.type != "cpu":
        torch.accelerator.synchronize(ids.device)


def fit_lines(architecture: Architecture, timing: Timing) -> dict[str, Any]:
    """Least squares of seconds = fixed + Σ over parts of unit[part]·units.

    A part whose units take no time that can be told from what the lines miss by, or was not measured, has 0 and is
    left out of the fit.

    Returns:
        `unit` by part and `fixed`, seconds of a layer; `outside`; `widths` and `seconds` as measured; and `misfit`,
        the largest difference between line and measurement as a share of the dense layer's time.

    Raises:
        LibpruneError: if no part has a time that can be told from noise.
    """
    dense = timing.widths[0]
    parts = [part for part in architecture.parts if any(width[part] < dense[part] for width in timing.widths)]
    while parts:
        counts = np.array([[1.0, *(width[part] for part in parts)] for width in timing.widths])
        (fixed, *units), *_ = np.linalg.lstsq(counts, timing.seconds, rcond=None)
        missed = float(np.abs(counts @ [fixed, *units] - timing.seconds).max())
        worst = int(np.argmin([unit * dense[part] for part, unit in zip(parts, units, strict=True)]))
        if units[worst] > 0 and units[worst] * dense[parts[worst]] >= missed:
            break
        parts.pop(worst)
    else:
        raise LibpruneError(
            "no width changed the time of a layer; raise latency.tokens, latency.batch or latency.rounds"
        )
    return {
        "unit": dict.fromkeys(architecture.parts, 0.0) | dict(zip(parts, map(float, units), strict=True)),
        "fixed": max(float(fixed), 0.0),
        "outside": timing.outside,
        "misfit": missed / float(timing.seconds[0]),
        "widths": [dict(width) for width in timing.widths],
        "seconds": timing.seconds.tolist(),
    }
