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
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from libprune.engine.architecture import Architecture, PartShape
from libprune.engine.errors import LibpruneError
from libprune.engine.family import families
from libprune.engine.heads import HEADS, writes
from libprune.engine.stock_config import new_config
from libprune.models.compute import resolve_device, resolve_dtype
from libprune.models.folder import load_config, own_model, require_positions
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.atomic import write_json
from libprune.pipeline.digests import sealed
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Latency
from libprune.pipeline.terminal import Bar


@dataclass(frozen=True)
class Timing:
    """Seconds of one forward pass over ``batch`` sequences of ``tokens`` tokens.

    Attributes:
        widths: units by part of each measured layer; where these lie in groups with an axis, the groups by that axis.
        seconds: the time of each of these layers, ``[widths]``, without embeddings and head.
        outside: the time of embeddings, last norm, and head. The head of a language model runs at one position of each
            sequence, as in a prefill.
    """

    widths: tuple[Mapping[str, int], ...]
    seconds: NDArray[np.float64]
    outside: float


def measured_widths(architecture: Architecture, number: int) -> list[dict[str, int]]:
    """The dense layer, and layers of which one part has fewer units, as units by part.

    Of a part whose units are query heads, some have fewer heads in each group, and some fewer groups, by their axis.

    The counts are at even distances among those that the config can say. On an axis of more than 64 units they are
    multiples of gcd(dense count, 64), since an odd number of channels would be slow for a reason of its own.

    Raises:
        LibpruneError: if the config can say no smaller layer.
    """
    if kinds := [part for part, shape in architecture.parts.items() if shape.layers is not None]:
        raise LibpruneError(
            f"the layers of this model are not alike (only some have {' and '.join(kinds)}), and one layer is what is "
            "timed; choose allocate.objective: parameters or macs"
        )
    dense = {part: architecture.units(part) for part in architecture.parts}
    dense |= {shape.outer: shape.groups for shape in architecture.parts.values() if shape.outer}
    widths = [dense]
    for part, shape in architecture.parts.items():
        if shape.outer:
            widths += _of_heads(dense, part, shape, number)
            continue
        step = gcd(dense[part], _EVEN) if dense[part] > _EVEN else 1
        counts = [count for count in range(step, dense[part], step) if count >= shape.least and shape.says(count)]
        chosen = np.unique(np.linspace(0, len(counts), number - 1, endpoint=False).astype(int))
        widths += [{**dense, part: counts[i]} for i in chosen if counts]
    if len(widths) == 1:
        raise LibpruneError("the config of this model cannot say a smaller layer to time; choose another objective")
    return widths


_EVEN = 64


def _of_heads(dense: dict[str, int], part: str, shape: PartShape, number: int) -> list[dict[str, int]]:
    """Layers with fewer query heads in every group, and others with fewer groups."""
    groups, each = shape.groups, dense[part] // shape.groups
    fewer = [[(groups, groups * left) for left in range(1, each)], [(left, left * each) for left in range(1, groups)]]
    widths = []
    for pairs in fewer:
        said = [pair for pair in pairs if shape.says(pair[1], pair[0])]
        chosen = np.unique(np.linspace(0, len(said), number - 1, endpoint=False).astype(int))
        widths += [{**dense, part: said[i][1], shape.outer: said[i][0]} for i in chosen if said]
    return widths


def time_layers(
    config: PreTrainedConfig, architecture: Architecture, device: torch.device, dtype: torch.dtype, params: Latency
) -> Timing:
    """Time single layers with random weights. Each round goes over all widths, so that a drift favours none.

    Args:
        config: the dense model's config.
        device: where to run.
        dtype: of the weights.
        params: widths a part, sequences and tokens of a pass, and rounds, of which the median counts.

    Raises:
        LibpruneError: if the config can say no smaller layer.
    """
    widths, family = measured_widths(architecture, params.widths), families()[architecture.family]

    def make(kind: Any, units: Mapping[str, int] | None) -> PreTrainedModel:
        """A model of one layer or of none, with random weights."""
        sizes, counts = dict(architecture.sizes), units or {}
        for part in counts.keys() & architecture.parts:
            shape = architecture.parts[part]
            sizes |= shape.sizes(counts[part], counts.get(shape.outer, 0))
        one = new_config(family, config, sizes, (0,))
        with device:
            model: PreTrainedModel = kind.from_config(one, dtype=dtype)
        if units is None:
            path = architecture.layers_path.removeprefix(f"{model.base_model_prefix}.")
            del model.base_model.get_submodule(path)[:]
        for path in () if family.tower is None else family.tower.untouched:  # which text does not pass
            model.base_model.set_submodule(path.partition(".")[2], nn.Identity())
        return model.eval()

    nothing, rest = make(AutoModel, None), make(HEADS[architecture.head].loader, None)
    layers = []
    for width in widths:
        layers.append(make(AutoModel, width))
        layers[-1].set_input_embeddings(nothing.get_input_embeddings())  # one copy is enough
    ids = torch.zeros((params.batch, params.tokens), dtype=torch.long, device=device)
    rounds = []
    for _ in Bar(range(params.rounds + 1), desc="latency", unit="round"):
        head = _seconds(rest, ids, **({"logits_to_keep": 1} if writes(architecture.head) else {}))
        rounds.append([_seconds(nothing, ids), head, *(_seconds(layer, ids) for layer in layers)])
    empty, outside, *seconds = (statistics.median(times) for times in zip(*rounds[1:], strict=True))
    return Timing(tuple(widths), np.array(seconds) - empty, outside)


def _seconds(model: PreTrainedModel, ids: Tensor, **more: Any) -> float:
    """Seconds of one forward pass."""
    with torch.no_grad():
        _wait(ids)
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False, **more)
        _wait(ids)
        return time.perf_counter() - start


def _wait(ids: Tensor) -> None:
    """Wait until the device of a tensor has finished its work."""
    if ids.device.type != "cpu":
        torch.accelerator.synchronize(ids.device)


def fit_lines(architecture: Architecture, timing: Timing) -> dict[str, Any]:
    """Least squares of seconds = fixed + Σ over parts of unit[part]·units, and unit[axis]·groups of an axis of groups.

    A part is left out of the fit, with 0 seconds a unit, if it was not measured or if all its units together take less
    time than the largest error of the fit.

    Returns:
        `unit` by part and `fixed`, seconds of a layer; `outside`; `widths` and `seconds` as measured; and `misfit`,
        the largest difference between line and measurement as a share of the dense layer's time.

    Raises:
        LibpruneError: if no part takes more time than that error.
    """
    dense = timing.widths[0]
    parts = [part for part in dense if any(width[part] < dense[part] for width in timing.widths)]
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
        "unit": dict.fromkeys(dense, 0.0) | dict(zip(parts, map(float, units), strict=True)),
        "fixed": max(float(fixed), 0.0),
        "outside": timing.outside,
        "misfit": missed / float(timing.seconds[0]),
        "widths": [dict(width) for width in timing.widths],
        "seconds": timing.seconds.tolist(),
    }


def measure_latency(layout: Layout, device: str, dtype: str, section: Latency) -> list[str]:
    """Time layers of several widths on this machine, and write the straight lines fitted to the times.

    Args:
        layout: holds the model and its description; the lines are written into it.
        device: where to run, as `compute.device`.
        dtype: of the weights, as `compute.dtype`.
        section: widths a part, sequences and tokens of a pass, and rounds.

    Returns:
        A sentence for each part and one for what remains of a layer.

    Raises:
        LibpruneError: if the model is missing, has fewer positions than tokens are asked for, or its config can say no
            smaller layer.
    """
    architecture = read_architecture(layout)
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place)
    config = load_config(own_model(layout, architecture))
    require_positions(config, architecture, {"latency.tokens": section.tokens})
    lines = fit_lines(architecture, time_layers(config, architecture, place, kind, section))
    machine = {"device": str(place), "dtype": str(kind).removeprefix("torch.")}
    write_json(layout.latency, sealed({"model": architecture.fingerprint, **section.model_dump(), **machine, **lines}))
    return [
        *(
            f"{part}: {1e6 * seconds:.3g} µs a unit, {1e3 * seconds * lines['widths'][0][part]:.3g} ms a layer"
            for part, seconds in lines["unit"].items()
        ),
        f"rest of a layer: {1e3 * lines['fixed']:.3g} ms; the lines miss by {100 * lines['misfit']:.0f} % at most",
    ]
