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
    HELD_OUT_SEQUENCES,
    HELD_OUT_TOKENS,
    Cosine,
    Gram,
    HeldOut,
    Histogram,
    InputMoments,
    State,
    Statistic,
    chosen,
    count,
    entropy,
    frequency,
)
from libprune.collection.resumable import Collection, collecting, write_artifact
from libprune.collection.stacked import Routed, RoutedHeldOut, Stacked
from libprune.collection.stream_norms import stream_norms, watch_norms
from libprune.engine.architecture import Architecture, Map
from libprune.engine.stacks import Routing, StackedMap
from libprune.engine.surgery import hooked, oriented
from libprune.engine.tables import Columns
from libprune.models.compute import Finite, per_sequence
from libprune.models.sequences import Pass
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Activations, Compute
from libprune.pipeline.shards import GRAM, HELD_OUT, ROUTED
from libprune.statistics.unit_sums import sum_positions, unit_sums

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
    for owner, part in architecture.uses(layer):
        consumers = architecture.consumers(owner, part)
        for entry in architecture.maps_of(owner, part):
            if entry.layer != layer:
                continue
            width, copies = entry.each_input(architecture.sizes), entry.copies(architecture.sizes)
            own: dict[str, Statistic] = {"": InputMoments(width)}
            if entry in consumers:
                own |= {GRAM: Gram(width, getattr(torch, section.storage_dtype)), _HISTOGRAM: Histogram(width)}
            if entry.stack:
                own = {name: Stacked(copies, statistic) for name, statistic in own.items()}
            if entry in consumers:
                own[HELD_OUT] = RoutedHeldOut(copies, width) if entry.stack else HeldOut(width)
            if entry in consumers and entry.stack:
                own[ROUTED] = Routed(copies)
            group |= {entry.module + name: statistic for name, statistic in own.items()}
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
    names = {name for group in sums.groups for name in group}
    inputs = InputSums(sums, architecture.sizes, behind_norms=bool(stream_norms(architecture, 0)))
    with hooked(model) as handles, torch.no_grad():
        for entry in architecture.maps:
            module = model.get_submodule(entry.module)
            handles.append(module.register_forward_pre_hook(partial(_add_input, inputs, entry)))
            if isinstance(module, StackedMap):
                module.watch = partial(_add_routed, sums, entry) if f"{entry.module}{ROUTED}" in names else None
        for layer in range(architecture.layers):
            handles += watch_norms(model, architecture, layer, inputs.fit)
            module = model.get_submodule(f"{architecture.layers_path}.{layer}")
            handles.append(module.register_forward_hook(partial(_add_layer, sums, layer), with_kwargs=True))
        for _, first, sequences in batches:
            inputs.begin(first, len(sequences))
            run = partial(model.base_model, input_ids=sequences.ids, use_cache=False)
            inputs.finite.run(run, sums.uncounted)


class InputSums:
    """The part of the sums that inputs of maps enter. Maps that share an input, such as q, k and v, are measured once.

    Sequences may be the samples of a network, and tokens the rows that one sample gives a map.
    """

    def __init__(self, sums: Accumulator, sizes: Mapping[str, int], behind_norms: bool = False) -> None:
        """Take the sums of the `activation_groups`.

        Args:
            sums: the sums.
            sizes: of the axes.
            behind_norms: whether `fit` is called for every consumer, with the scale of each of its tokens.
        """
        self._sums, self._sizes, self._behind_norms = sums, sizes, behind_norms
        self.finite = Finite()

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
            self.finite.require(each, self._first, f"the input of {entry.module}")
            self._shared = x, group[entry.module].measure(x.flatten(0, -2).float())
        self._sums.join(entry.layer, entry.module, self._shared[1])
        if entry.module + GRAM in group:
            self._sums.update(entry.layer, entry.module + _HISTOGRAM, _sampled(each, self._first))
            if not self._behind_norms:
                self.fit(entry, x)

    def add_rows(self, entry: Map, x: Float[Tensor, "rows input"], routing: Routing) -> None:
        """Add what the experts of a stack take from a batch, row by row.

        Raises:
            StatisticsError: naming the module and the sequence whose input is not finite.
        """
        length, copies = routing.total // self._sequences, entry.copies(self._sizes)
        self.finite.require_rows(x, routing.tokens // length + self._first, f"the input of {entry.module}")
        group, tokens_of = self._sums.groups[entry.layer], routing.tokens.cpu()
        experts = torch.arange(copies).repeat_interleave(torch.tensor(routing.counts))
        sequence, position = tokens_of // length, tokens_of % length

        def add(name: str, taken: Tensor) -> None:
            counts = torch.bincount(experts[taken], minlength=copies)
            self._sums.update(entry.layer, entry.module + name, chosen(x, taken).float(), counts)

        add("", torch.ones_like(sequence, dtype=torch.bool))
        if entry.module + GRAM not in group:
            return
        add(_HISTOGRAM, (sequence + self._first + position) % HISTOGRAM_STRIDE == 0)
        held = held_out(self._first, self._sequences)[sequence]
        add(GRAM, ~held)
        slots = torch.full((length,), -1)
        tokens = min(HELD_OUT_TOKENS, length)
        slots[torch.arange(tokens) * length // tokens] = torch.arange(tokens)
        number = (sequence + self._first) // HELD_OUT_EVERY
        kept = held & (slots[position] >= 0) & (number < HELD_OUT_SEQUENCES)
        places = (number * tokens + slots[position])[kept]
        self._sums.update(entry.layer, entry.module + HELD_OUT, chosen(x, kept), experts[kept], places)

    def fit(self, consumer: Map, x: Tensor, scale: Tensor | None = None) -> None:
        """Add a consumer's input to its Gram matrix, and to the inputs that are held out of the matrix.

        Args:
            consumer: the map.
            x: its input, as in `add`.
            scale: of each token, for products and held-out inputs; None where all count alike.
        """
        x = per_sequence(x, self._sequences)
        scaled = x if scale is None else x.float() * per_sequence(scale, self._sequences)
        held = held_out(self._first, len(x))  # known to the host
        if not held.all():
            both = (chosen(one, ~held).flatten(0, -2) for one in ((x,) if scale is None else (x, scaled)))
            self._sums.update(consumer.layer, consumer.module + GRAM, *both)
        if held.any():
            numbers = (self._first + held.nonzero().squeeze(1)) // HELD_OUT_EVERY
            self._sums.update(consumer.layer, consumer.module + HELD_OUT, chosen(scaled, held), numbers)


def _add_input(inputs: InputSums, entry: Map, module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a map that adds its input to the sums."""
    if entry.stack:
        inputs.add_rows(entry, args[0], args[1])
    else:
        inputs.add(entry, args[0])


def _add_routed(sums: Accumulator, entry: Map, added: Tensor, routing: Routing) -> None:
    """Add what experts give their tokens to the sums."""
    sums.update(entry.layer, entry.module + ROUTED, added, routing.experts, count(routing.total))


def _add_layer(
    sums: Accumulator, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> None:
    """Forward hook of a layer that adds the cosine between its input and its output to the sums."""
    before = args[0] if args else kwargs["hidden_states"]
    after = output if isinstance(output, Tensor) else output[0]
    sums.update(layer, _LAYER, before.flatten(0, -2), after.flatten(0, -2))


def _sampled(x: Float[Tensor, "sequences tokens input"], first: int) -> Float[Tensor, "sampled input"]:
    """The tokens whose position and sequence number add up to a multiple of the stride."""
    sequence, position = torch.arange(first, first + x.shape[0]), torch.arange(x.shape[1])
    sampled = (sequence[:, None] + position) % HISTOGRAM_STRIDE == 0  # known to the host
    return chosen(x.flatten(0, 1), sampled.flatten())


def activation_columns(
    architecture: Architecture, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], layer: int, part: str
) -> dict[str, NDArray[np.float64]]:
    """Per-unit forward statistics of a block.

    `wanda_*`: sum over the unit's weights of |W_ij| a_j, for every norm a of the input features.
    `fluctuation`: sum over the unit's positions at the consumer's input of variance times |W_:,p|^2.
    `activation_*`: mean over the layers that use the unit, and its own positions at the consumer's input there, of
    magnitude (mean |x|), variance, range (max - min), entropy (nats, over `BINS` bins), and
    frequency (share of values of at least `ACTIVE` times the layer's root mean square).
    """
    columns, maps = {}, {entry.weight: entry for entry in architecture.maps_of(layer, part)}
    for kind in NORMS:
        weighted = partial(_weighted, maps, tensors, kind)
        columns[f"wanda_{kind}"] = unit_sums(architecture, layer, part, weights, only=maps, of=weighted)
    consumers = architecture.consumers(layer, part)
    consumer = consumers[0]
    units = consumer.input.units(architecture.parts[part].axis, architecture.sizes)
    number = architecture.units(part)
    positions = sum_positions(torch.ones(len(units), dtype=torch.float64), units, number)
    columns["fluctuation"] = np.zeros(number)
    for entry in consumers:
        of = entry.input.units(architecture.parts[part].axis, architecture.sizes)
        columns["fluctuation"] += sum_positions(_fluctuation(entry, tensors, weights), of, number).numpy()
    if any(shape.router for shape in architecture.parts.values()):
        columns |= _routed(architecture, tensors, layer, part)
    firsts = [next(c for c in consumers if c.layer == user) for user in architecture.users(layer, part)]
    features = [_features(tensors, first.module) for first in firsts]
    for name in features[0]:
        values = torch.stack([own[name].double() for own in features]).mean(0)
        columns[f"activation_{name}"] = (sum_positions(values, units, number) / positions).numpy()
    return columns


def _routed(
    architecture: Architecture, tensors: Mapping[str, Tensor], layer: int, part: str
) -> dict[str, NDArray[np.float64]]:
    """`reap` and `routed_frequency` of the experts of a mixture; NaN for the units of other parts."""
    if not architecture.parts[part].router:
        return {name: np.full(architecture.units(part), np.nan) for name in ("reap", "routed_frequency")}
    module = architecture.consumers(layer, part)[0].module
    return {
        "reap": tensors[f"{module}{ROUTED}.reap"].double().numpy(),
        "routed_frequency": tensors[f"{module}{ROUTED}.frequency"].double().numpy(),
    }


def _weighted(
    maps: Mapping[str, Map], tensors: Mapping[str, Tensor], kind: str, name: str, weight: Tensor, rows: slice
) -> Tensor:
    """|W_ij| a_j of the weights of a map in some rows of its own layout, with a_j the named norm of input feature j."""
    entry = maps[name]
    of = f"{entry.module}.input_mean" if kind == "mean" else f"{entry.module}.input_norm_{kind}"
    norm = tensors[of].abs()
    if entry.stack:
        return weight.abs().float() * norm[rows].unsqueeze(2 if entry.transposed else 1)
    return weight.abs().float() * (norm[rows, None] if entry.transposed else norm.view(weight.shape[1:]))


def _fluctuation(consumer: Map, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """Variance of each input of a consumer times the squared norm of the weights that read it, ``[input]``."""
    squares = oriented(consumer, weights[consumer.weight].double()).square().sum(0)
    variance = tensors[f"{consumer.module}.input_variance"].double()
    if consumer.stack:  # over all tokens: the input of an expert is 0 where a token does not go through it
        share = tensors[f"{consumer.module}{ROUTED}.frequency"].double()[:, None]
        mean = tensors[f"{consumer.module}.input_mean"].double()
        variance = share * (variance + mean.square()) - (share * mean).square()
    return squares * variance.flatten()


def _features(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """The `activation_*` statistics of every input feature of a consumer, ``[input]`` each."""
    variance, mean = tensors[f"{module}.input_variance"], tensors[f"{module}.input_mean"]
    counts = tensors[module + _HISTOGRAM]
    root_mean_square = float((variance + mean.square()).mean().sqrt())
    tokens = tensors[f"{module}.input_tokens"].clamp(min=1).double()
    features = {
        "magnitude": tensors[f"{module}.input_norm_l1"] / tokens[..., None],
        "variance": variance,
        "range": tensors[f"{module}.input_max"] - tensors[f"{module}.input_min"],
        "entropy": entropy(counts),
        "frequency": frequency(counts, ACTIVE * root_mean_square),
    }
    return {name: values.flatten().nan_to_num(0.0) for name, values in features.items()}
