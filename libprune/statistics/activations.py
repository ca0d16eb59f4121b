"""Forward-only statistics: norms and moments at every map's input, Gram matrices and histograms at the consumers'."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.collection.accumulator import Accumulator, Group
from libprune.collection.calibration import HELD_OUT_EVERY, Run, held_out, set_up
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
from libprune.collection.resumable import Collection, collecting, write_artifact
from libprune.collection.stream_norms import stream_norms, watch_norms
from libprune.engine.architecture import Architecture, Map
from libprune.engine.surgery import hooked
from libprune.engine.tables import Columns
from libprune.engine.unit_sums import sum_positions, unit_sums
from libprune.models.compute import per_sequence, require_finite
from libprune.models.sequences import Pass
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Activations, Compute
from libprune.pipeline.shards import GRAM, HELD_OUT

NORMS = ("l1", "l2", "mean", "max")
HISTOGRAM_STRIDE = 4
"""Every fourth token of a sequence enters the histograms; the first of them changes with the sequence."""
ACTIVE = 0.125
"""Share of the root mean square of the consumer's input from which a value counts as active."""

_HISTOGRAM, _LAYER = ".input_histogram", "block"


def measure_activations(layout: Layout, compute: Compute, section: Activations) -> Columns | None:
    """Collect the forward-only statistics of a language model, and write their artifact.

    Args:
        section: how many calibration sequences, and the storage type of Gram matrices.

    Returns:
        The per-unit table; None in all processes but the first.

    Raises:
        LibpruneError: if an artifact is missing, the disk has no room, or an input is not finite.
    """
    run = set_up(layout, compute, section.sequences)

    def collect(work: Collection) -> None:
        collect_activations(run.model, run.architecture, work.passes(), work.accumulator)

    return write_activations(run, layout.activations, section, collect)


def write_activations(
    run: Run, target: Path, section: Activations, collect: Callable[[Collection], None]
) -> Columns | None:
    """Write the forward-only statistics that a function adds to the sums.

    Args:
        run: what is collected from.
        target: the folder of the artifact.
        section: the storage type of Gram matrices.
        collect: adds all batches to the sums of the `activation_groups`.

    Returns:
        The per-unit table; None in all processes but the first.
    """
    groups = activation_groups(run.architecture, section)
    with collecting(run, "activations", target, groups, run.at_once, {}) as work:
        collect(work)
        if not work.merge():
            return None
        return write_artifact(run, target, work.accumulator, activation_columns, {})["units"]


def activation_groups(architecture: Architecture, section: Activations) -> list[Group]:
    """The statistics of every layer, by name."""
    return [_layer_group(architecture, layer, section) for layer in range(architecture.layers)]


def _layer_group(architecture: Architecture, layer: int, section: Activations) -> Group:
    group: dict[str, Statistic] = {_LAYER: Cosine()} if architecture.layers_path else {}
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
        model: a language model.
        batches: each of sequences of one length.
        sums: of the `activation_groups`.

    Raises:
        StatisticsError: naming the module and sequence whose input is not finite.
    """
    inputs = InputSums(sums, behind_norms=bool(stream_norms(architecture, 0)))
    with hooked(model) as handles, torch.no_grad():
        for entry in architecture.maps:
            module = model.get_submodule(entry.module)
            handles.append(module.register_forward_pre_hook(partial(_add_input, inputs, entry)))
        for layer in range(architecture.layers):
            handles += watch_norms(model, architecture, layer, inputs.fit)
            module = model.get_submodule(f"{architecture.layers_path}.{layer}")
            handles.append(module.register_forward_hook(partial(_add_layer, sums, layer), with_kwargs=True))
        for _, first, sequences in batches:
            inputs.begin(first, len(sequences))
            model.base_model(input_ids=sequences.ids, use_cache=False)


class InputSums:
    """The part of the sums that inputs of maps enter. Maps that share an input, such as q, k and v, are measured once.

    Sequences may be the samples of a network, and tokens the rows that one sample gives a map.
    """

    def __init__(self, sums: Accumulator, behind_norms: bool = False) -> None:
        """Take the sums of the `activation_groups`.

        Args:
            sums: the sums.
            behind_norms: whether `fit` is called for every consumer, with the scale of each of its tokens.
        """
        self._sums, self._behind_norms = sums, behind_norms

    def begin(self, first: int, sequences: int) -> None:
        """Begin a batch, given the index of its first sequence and their number."""
        self._first, self._sequences = first, sequences
        self._shared: tuple[Tensor, State] | None = None

    def add(self, entry: Map, x: Tensor) -> None:
        """Add what a map takes from a batch, ``[sequences, tokens, input]`` or ``[sequences * tokens, input]``.

        Raises:
            StatisticsError: naming the module and the sequence whose input is not finite.
        """
        group, each = self._sums.groups[entry.layer], per_sequence(x, self._sequences)
        if self._shared is None or self._shared[0] is not x:
            require_finite(each, self._first, f"the input of {entry.module}")
            self._shared = x, group[entry.module].measure(x.flatten(0, -2).float())
        self._sums.join(entry.layer, entry.module, self._shared[1])
        if entry.module + GRAM in group:
            self._sums.update(entry.layer, entry.module + _HISTOGRAM, _sampled(each, self._first))
            if not self._behind_norms:
                self.fit(entry, x)

    def fit(self, consumer: Map, x: Tensor, scale: Tensor | None = None) -> None:
        """Add a consumer's input to its Gram matrix, and to the inputs that are held out of the matrix.

        Args:
            consumer: the map.
            x: its input, as in `add`.
            scale: of each token, for products and held-out inputs; None where all count alike.
        """
        x = per_sequence(x, self._sequences)
        scaled = x if scale is None else x.float() * per_sequence(scale, self._sequences)
        held = held_out(self._first, len(x)).to(x.device)
        if not held.all():
            chosen = ~held if held.any() else slice(None)
            both = (one[chosen].flatten(0, -2) for one in ((x,) if scale is None else (x, scaled)))
            self._sums.update(consumer.layer, consumer.module + GRAM, *both)
        if held.any():
            numbers = (self._first + held.nonzero().squeeze(1).cpu()) // HELD_OUT_EVERY
            self._sums.update(consumer.layer, consumer.module + HELD_OUT, scaled[held], numbers)


def _add_input(inputs: InputSums, entry: Map, module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Forward pre-hook of a map that adds its input to the sums."""
    inputs.add(entry, args[0])


def _add_layer(
    sums: Accumulator, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> None:
    """Forward hook of a layer that adds the cosine between its input and its output to the sums."""
    before = args[0] if args else kwargs["hidden_states"]
    after = output if isinstance(output, Tensor) else output[0]
    sums.update(layer, _LAYER, before.flatten(0, -2), after.flatten(0, -2))


def _sampled(x: Float[Tensor, "sequences tokens input"], first: int) -> Float[Tensor, "sampled input"]:
    """The tokens whose position and sequence number add up to a multiple of the stride."""
    sequence = torch.arange(first, first + x.shape[0], device=x.device)
    position = torch.arange(x.shape[1], device=x.device)
    return x[(sequence[:, None] + position) % HISTOGRAM_STRIDE == 0]


def activation_columns(
    architecture: Architecture, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], layer: int, part: str
) -> dict[str, NDArray[np.float64]]:
    """Per-unit forward statistics of a block.

    `wanda_*`: sum over the unit's weights of |W_ij| a_j, for every norm a of the input features.
    `fluctuation`: sum over the unit's positions at the consumer's input of variance times |W_:,p|^2.
    `activation_*`: mean over the unit's own positions at the consumer's input of
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
    """|W_ij| a_j of every weight of a map, in its own layout, with a_j the named norm of input feature j."""
    of = f"{entry.module}.input_mean" if kind == "mean" else f"{entry.module}.input_norm_{kind}"
    norm = tensors[of].abs()
    return weight.abs().float() * (norm[:, None] if entry.transposed else norm.view(weight.shape[1:]))


def _fluctuation(consumer: Map, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """Variance of each input of a consumer times the squared norm of the weights that read it, ``[input]``."""
    squares = weights[consumer.weight].double().square().sum(1 if consumer.transposed else 0)
    return squares.flatten() * tensors[f"{consumer.module}.input_variance"].double()


def _features(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """The `activation_*` statistics of every input feature of a consumer, ``[input]`` each."""
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
