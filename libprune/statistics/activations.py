"""Forward-only statistics: norms and moments at every map's input, Gram matrices and histograms at the consumers'."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.collection.accumulator import Accumulator, Group
from libprune.collection.calibration import HELD_OUT_EVERY, held_out
from libprune.collection.records import (
    Cosine,
    Gram,
    HeldOut,
    Histogram,
    InputMoments,
    State,
    Statistic,
    entropy,
    frequency,
)
from libprune.engine.architecture import Architecture, Map
from libprune.engine.surgery import hooked
from libprune.engine.unit_sums import sum_positions, unit_sums
from libprune.models.compute import per_sequence, require_finite
from libprune.models.sequences import Pass
from libprune.pipeline.sections import Activations
from libprune.pipeline.shards import GRAM, HELD_OUT

NORMS = ("l1", "l2", "mean", "max")
HISTOGRAM_STRIDE = 4
"""One token in so many enters the histograms, at other positions in each sequence."""
ACTIVE = 0.125
"""A value counts as active from this share of the root mean square of the layer's consumer input."""

_HISTOGRAM, _LAYER = ".input_histogram", "block"


def activation_groups(architecture: Architecture, section: Activations) -> list[Group]:
    """The statistics of every layer."""
    return [_layer_group(architecture, layer, section) for layer in range(architecture.layers)]


def _layer_group(architecture: Architecture, layer: int, section: Activations) -> Group:
    group: dict[str, Statistic] = {} if architecture.is_network else {_LAYER: Cosine()}
    for part in architecture.parts:
        consumers = architecture.consumers(layer, part)
        for entry in architecture.maps_of(layer, part):
            width = entry.input.size(architecture.sizes)
            group[entry.module] = InputMoments(width)
            if entry in consumers:
                group[entry.module + GRAM] = Gram(width, getattr(torch, section.storage_dtype))
                group[entry.module + _HISTOGRAM] = Histogram(width)
                group[entry.module + HELD_OUT] = HeldOut(width)
    return group


def collect_activations(
    model: PreTrainedModel,
    architecture: Architecture,
    batches: Iterable[Pass],
    sums: Accumulator,
) -> None:
    """Add batches to the sums, with one forward pass over each sequence, without the head.

    Args:
        model: the model.
        architecture: its description.
        batches: each of sequences of one length.
        sums: of the `activation_groups`.

    Raises:
        StatisticsError: naming the module and sequence whose input is not finite.
    """
    with _collecting(model, architecture, sums) as collector, torch.no_grad():
        for _, first, sequences in batches:
            collector.begin(first, len(sequences))
            model.base_model(input_ids=sequences.ids, use_cache=False)


@contextmanager
def _collecting(model: PreTrainedModel, architecture: Architecture, sums: Accumulator) -> Iterator["_Collector"]:
    collector = _Collector(sums)
    with hooked(model) as handles:
        for entry in architecture.maps:
            module = model.get_submodule(entry.module)
            handles.append(module.register_forward_pre_hook(partial(collector.input, entry)))
        for layer in range(architecture.layers):
            module = model.get_submodule(f"{architecture.layers_path}.{layer}")
            handles.append(module.register_forward_hook(partial(collector.whole_layer, layer), with_kwargs=True))
        yield collector


class _Collector:
    """Turns inputs into updates of the sums. Maps that share an input, as q, k and v do, are measured once."""

    def __init__(self, sums: Accumulator) -> None:
        self.sums = sums

    def begin(self, first: int, sequences: int) -> None:
        """A batch of so many sequences begins."""
        self._first, self._sequences = first, sequences
        self._shared: tuple[Tensor, State] | None = None

    def input(self, entry: Map, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of a map."""
        x = args[0]
        if self._shared is None or self._shared[0] is not x:
            require_finite(per_sequence(x, self._sequences), self._first, f"the input of {entry.module}")
            moments = self.sums.groups[entry.layer][entry.module].measure(x.flatten(0, -2).float())
            self._shared = x, moments
        self.sums.join(entry.layer, entry.module, self._shared[1])
        if entry.module + GRAM in self.sums.groups[entry.layer]:
            add_consumer_input(self.sums, entry, per_sequence(x, self._sequences), self._first)

    def whole_layer(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Forward hook of a layer."""
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        self.sums.update(layer, _LAYER, before.flatten(0, -2), after.flatten(0, -2))


def add_consumer_input(sums: Accumulator, entry: Map, x: Float[Tensor, "sequences tokens input"], first: int) -> None:
    """Add a consumer's input to its histogram, its Gram matrix, and what is held out of that.

    Args:
        sums: of the `activation_groups`.
        entry: the consumer.
        x: its input, by sequence.
        first: index of the first sequence.
    """
    sums.update(entry.layer, entry.module + _HISTOGRAM, _sampled(x, first))
    apart = held_out(first, len(x)).to(x.device)
    if not apart.all():
        sums.update(entry.layer, entry.module + GRAM, (x[~apart] if apart.any() else x).flatten(0, -2))
    if apart.any():
        numbers = (first + apart.nonzero().squeeze(1).cpu()) // HELD_OUT_EVERY
        sums.update(entry.layer, entry.module + HELD_OUT, x[apart], numbers)


def _sampled(x: Float[Tensor, "sequences tokens input"], first: int) -> Float[Tensor, "sampled input"]:
    """The tokens whose position and sequence add up to a multiple of the stride."""
    sequence = torch.arange(first, first + x.shape[0], device=x.device)
    position = torch.arange(x.shape[1], device=x.device)
    return x[(sequence[:, None] + position) % HISTOGRAM_STRIDE == 0]


def activation_columns(
    architecture: Architecture, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], layer: int, part: str
) -> dict[str, NDArray[np.float64]]:
    """Per-unit forward statistics of a block.

    `wanda_*`: sum over the unit's weights of |W_ij| a_j, for every norm a of the input features.
    `fluctuation`: sum over the unit's positions at the consumer's input of variance times |W_:,p|^2.
    `activation_*`: what the unit's own positions carry at the consumer's input, on average:
    magnitude (mean |x|), variance, range (max - min), entropy (nats, over `BINS` bins), and
    frequency (share of values of at least `ACTIVE` times the layer's root mean square).
    """
    columns = {}
    for kind in NORMS:
        terms = {
            entry.weight: _weighted(entry, weights[entry.weight], tensors, kind)
            for entry in architecture.maps_of(layer, part)
        }
        columns[f"wanda_{kind}"] = unit_sums(architecture, layer, part, terms, only=terms)
    consumer = architecture.consumers(layer, part)[0]
    units = consumer.input.units(architecture.parts[part].axis, architecture.sizes)
    number = architecture.units(part)
    positions = sum_positions(torch.ones(len(units), dtype=torch.float64), units, number)
    columns["fluctuation"] = np.zeros(number)
    for entry in architecture.consumers(layer, part):
        of = entry.input.units(architecture.parts[part].axis, architecture.sizes)
        columns["fluctuation"] += sum_positions(_fluctuation(entry, tensors, weights), of, number).numpy()
    for name, values in _features(tensors, consumer.module).items():
        columns[f"activation_{name}"] = (sum_positions(values.double(), units, number) / positions).numpy()
    return columns


def _weighted(entry: Map, weight: Tensor, tensors: Mapping[str, Tensor], kind: str) -> Tensor:
    of = f"{entry.module}.input_mean" if kind == "mean" else f"{entry.module}.input_norm_{kind}"
    norm = tensors[of].abs()
    return weight.abs().float() * (norm[:, None] if entry.transposed else norm.view(weight.shape[1:]))


def _fluctuation(consumer: Map, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """Variance of each input of a consumer times the squared norm of its weights."""
    squares = weights[consumer.weight].double().square().sum(1 if consumer.transposed else 0)
    return squares.flatten() * tensors[f"{consumer.module}.input_variance"].double()


def _features(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """Statistics of every input feature of a consumer."""
    variance, mean = tensors[f"{module}.input_variance"], tensors[f"{module}.input_mean"]
    counts = tensors[module + _HISTOGRAM]
    root_mean_square = float((variance + mean.square()).mean().sqrt())
    tokens = float(tensors[f"{module}.input_tokens"])
    return {
        "magnitude": tensors[f"{module}.input_norm_l1"] / tokens,
        "variance": variance,
        "range": tensors[f"{module}.input_max"] - tensors[f"{module}.input_min"],
        "entropy": entropy(counts),
        "frequency": frequency(counts, ACTIVE * root_mean_square),
    }
