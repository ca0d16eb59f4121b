"""First-order statistics: the mean gradient of every parameter of the layers, and how unit mask gradients behave."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from libprune.collection.accumulator import PENDING, ROWS, UNITS, Accumulator, Group
from libprune.collection.backward import Tape, watching, watching_parameters, weight_gradient
from libprune.collection.calibration import Run, set_up
from libprune.collection.records import BatchRows, Gram, MaskGradient, Pending, Statistic, Sum, count
from libprune.collection.resumable import ColumnsOf, RowsOf, collecting, write_artifact
from libprune.collection.stacked import Squares, Stacked
from libprune.collection.summary import mean_cell, print_keys
from libprune.engine.architecture import Architecture, Block, Map, Parameter
from libprune.engine.errors import StatisticsError
from libprune.engine.stacks import Routing
from libprune.engine.tables import Columns
from libprune.models.compute import Finite, require_finite, sequence_losses
from libprune.models.sequences import Pass, Sequences
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Gradients
from libprune.pipeline.terminal import note, say
from libprune.statistics.gradient_health import gradient_ratio, verdict
from libprune.statistics.unit_sums import sum_positions, unit_sums


def measure_gradients(layout: Layout, compute: Compute, section: Gradients) -> Columns | None:
    """Collect the first-order statistics of a language model, and write their artifact.

    Args:
        section: how many calibration sequences, how they are batched, and what is stored.

    Returns:
        The table of `layer_rows`; None in all processes but the first.

    Raises:
        LibpruneError: if an artifact is missing, the disk has no room, or a value is not finite.
    """
    run = set_up(layout, compute, section.sequences)
    size = section.batch_sequences
    in_pieces = run.sequences.lengths is not None or run.at_once < size
    groups = gradient_groups(run.architecture, run.n_tok, -(-run.available // size), section, in_pieces)
    identity = {"second_moments": section.second_moments}
    with collecting(run, "gradients", layout.gradients, groups, size, identity) as work:
        sums = work.accumulator
        least = -(-min(size, len(run.sequences)) // run.at_once) if run.world.sharded else 1
        collect_gradients(run.model, run.architecture, work.batches(), sums, run.at_once, run.recompute, least)
        return write_gradients(run, layout.gradients, sums, -(-len(run.sequences) // size)) if work.merge() else None


def write_gradients(
    run: Run, target: Path, sums: Accumulator, batches: int, columns_of: ColumnsOf | None = None
) -> Columns:
    """Write the artifact of the first-order statistics.

    Args:
        run: what was collected from.
        target: the folder of the artifact.
        sums: the joined sums of the `gradient_groups`.
        batches: the number of batches that were run.
        columns_of: per-unit columns of a block; None for `gradient_columns`.

    Returns:
        The table of `layer_rows`.
    """
    rows: dict[str, RowsOf] = {"layers": partial(layer_rows, batches=batches), "tensors": tensor_rows}
    loss = {"loss": float(sums.finish(run.architecture.layers)["loss"])}
    return write_artifact(run, target, sums, columns_of or gradient_columns, loss, rows)["layers"]


def gradient_groups(
    architecture: Architecture, n_tok: int, batches: int, section: Gradients, in_pieces: bool = False
) -> list[Group]:
    """The statistics of every layer, and the loss.

    Args:
        n_tok: loss-counted tokens of a sequence.
        batches: the most batches that the text has.
        section: storage type, and whether to keep whole second moments.
        in_pieces: whether a batch may take several passes, for example over sequences of several lengths, so that its
            gradients must be kept until the last pass.
    """
    layers = [
        _layer_group(architecture, layer, n_tok, batches, section, in_pieces) for layer in range(architecture.layers)
    ]
    return [*layers, {"loss": Sum((), sums=torch.float64)}]


def _layer_group(
    architecture: Architecture, layer: int, n_tok: int, batches: int, section: Gradients, in_pieces: bool
) -> Group:
    group: dict[str, Statistic] = {}
    dtype = getattr(torch, section.storage_dtype)
    for owner, part in architecture.uses(layer):
        for parameter in architecture.parameters_of(owner, part):
            if parameter.layer != layer:
                continue
            shape = tuple(dim.size(architecture.sizes) for dim in parameter.dims)
            group[parameter.name] = Sum(shape, dtype=dtype)
            group[ROWS + parameter.name] = BatchRows(batches)
            if in_pieces:
                group[PENDING + parameter.name] = Pending(shape)
        if owner == layer:
            group[UNITS + part] = MaskGradient(architecture.units(part), n_tok)
        consumers = architecture.consumers(owner, part)
        for entry in architecture.maps_of(owner, part):
            if entry.layer != layer:
                continue
            sides = {"output": entry.output} | ({"input": entry.input} if entry in consumers else {})
            if entry.stack:
                if entry in consumers:
                    group |= _stack_group(architecture, entry)
                continue
            for side, expr in sides.items():
                width = expr.size(architecture.sizes)
                group[f"{entry.module}.{side}_gradient_square"] = Sum((width,), sums=torch.float64)
                if section.second_moments == "full" and entry in consumers:
                    group[f"{entry.module}.{side}_gradient_gram"] = Gram(width)
    return group


def _stack_group(architecture: Architecture, consumer: Map) -> Group:
    """The second moments of the gradients at both sides of a stack: of each expert's rows, and of all tokens."""
    sizes = architecture.sizes
    rows = Squares(consumer.each_input(sizes))
    return {
        f"{consumer.module}.input_gradient_square": Stacked(consumer.copies(sizes), rows),
        f"{consumer.module}.output_gradient_square": Sum((consumer.output.size(sizes),), sums=torch.float64),
    }


def collect_gradients(
    model: PreTrainedModel,
    architecture: Architecture,
    batches: Iterable[Pass],
    sums: Accumulator,
    at_once: int,
    recompute: bool = False,
    least: int = 1,
) -> None:
    """Add batches to the sums, with one forward and backward pass over each sequence.

    Gradients leave the device map by map as backward produces them and are summed in float32, so
    a low-precision model adds no error over batches.

    Args:
        batches: number, index of the first sequence, and sequences of each.
        sums: of the `gradient_groups`.
        at_once: sequences in one pass; batches are cut to that.
        recompute: whether the layers are computed again in backward.
        least: the fewest passes of a batch. Processes that share the weights need as many as each other; a batch of
            fewer passes repeats the last one without counting it.

    Raises:
        StatisticsError: naming the first layer, from the output, and the sequence whose loss or
            gradient is not finite.
    """
    collector = _Collector(model, architecture, sums)
    finite = collector.finite
    blocks = (p for block in architecture.blocks() for p in architecture.parameters_of(*block))
    vectors = {p.name: partial(collector.vector, p) for p in blocks if p.name not in architecture.mapped}
    watched = watching(model, architecture, collector.output, collector.input, recompute, collector.rows, finite)
    with watched as tape, watching_parameters(model, architecture, vectors), torch.enable_grad():
        for number, first, batch in batches:
            end, chunks = first + len(batch), list(batch.passes(at_once))
            for chunk in chunks:
                last = first + len(chunk) == end
                begin = (number, len(batch), first, len(chunk), chunk.counted, last)
                finite.run(partial(_pass, tape, collector, model, chunk, begin), sums.uncounted)
                first += len(chunk)
            for _ in range(len(chunks), least):
                with sums.uncounted():
                    finite.run(partial(_pass, tape, collector, model, chunk, (*begin[:-1], False)), sums.uncounted)


def _pass(
    tape: Tape, collector: "_Collector", model: PreTrainedModel, chunk: Sequences, begin: tuple[Any, ...]
) -> None:
    """Run some sequences forward and backward; `begin` is what the collector is told of them."""
    tape.begin(begin[2], len(chunk))
    collector.begin(*begin)
    losses = sequence_losses(model, chunk)
    collector.finite.require(losses.detach(), tape.first, "the loss")
    tape.backward(losses.sum())
    total = losses.detach().double().sum()
    collector.sums.update(collector.architecture.layers, "loss", total, count(len(chunk)))


class _Collector:
    """Turns what backward brings into updates of the sums."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture, sums: Accumulator) -> None:
        self._model = model
        self.architecture = architecture
        self.sums = sums
        self.finite = Finite()
        self._named = {p.name for p in architecture.parameters}
        self._masks: dict[Block, list[Tensor]] = {}

    def begin(self, number: int, sequences: int, first: int, in_pass: int, n_tok: int, last: bool) -> None:
        """Begin a pass over some sequences of a batch.

        Args:
            number: of the batch.
            sequences: in the batch.
            first: index of the first sequence of the pass.
            in_pass: sequences in the pass.
            n_tok: loss-counted tokens of a sequence.
            last: whether this is the last pass of the batch.
        """
        self._number, self._sequences, self._last = number, sequences, last
        self._first, self._n_sequences = first, in_pass
        self._n_tok = n_tok
        self._masks.clear()

    def vector(self, parameter: Parameter, tensor: Tensor) -> None:
        """Add the gradient that autograd gave a parameter of no map, such as a norm's weight, or of a stack."""
        assert tensor.grad is not None and parameter.layer is not None
        gradient, tensor.grad = tensor.grad, None
        if not self.finite.holds(gradient) and not torch.isfinite(gradient).all():
            raise StatisticsError(
                f"the gradient of {parameter.name} is not finite in the pass from calibration sequence {self._first}; "
                "try compute.dtype: float32"
            )
        self._take(parameter.name, parameter.layer, gradient)

    def output(self, entry: Map, x: Tensor, delta: Tensor) -> None:
        """Add the gradients of a map's weight and bias, and the second moment of the gradient at its output.

        Autograd gives the gradients of a stack's weights and biases themselves.
        """
        if entry.stack:
            add_second_moment(self.sums, entry, "output", delta, self._n_tok)
            return
        gradient = weight_gradient(entry, x, delta)
        if not self.finite.holds(gradient):
            each = torch.stack([weight_gradient(entry, *pair) for pair in zip(x, delta, strict=True)])
            require_finite(each, self._first, f"the gradient of {entry.weight}")
            raise StatisticsError(
                f"the gradient of {entry.weight} overflows in the pass from calibration sequence {self._first}; "
                "try compute.dtype: float32"
            )
        self._take(entry.weight, entry.layer, gradient)
        bias = f"{entry.module}.bias"
        if bias in self._named:
            self._take(bias, entry.layer, delta.flatten(0, -2).sum(0, dtype=torch.float32))
        add_second_moment(self.sums, entry, "output", delta, self._n_tok)

    def input(self, entry: Map, x: Tensor, delta: Tensor) -> None:
        """Add the mask gradients of a consumer's units, and the second moment of the gradient at its input."""
        units = entry.input.units(self.architecture.parts[entry.part].axis, self.architecture.sizes)
        mask = sum_positions(x.float() * delta.float(), units, self.architecture.units(entry.part))
        if norm := self.architecture.parts[entry.part].norm:
            weight = self._model.get_parameter(f"{self.architecture.layers_path}.{entry.layer}.{norm}.weight")
            normed = torch.where(weight == 0, 0, x.float() / weight.float())
            mask = mask - self._renormed(mask, sum_positions(normed.square(), units, mask.shape[-1]), len(units), entry)
        self._mask(entry, mask)
        add_second_moment(self.sums, entry, "input", delta, self._n_tok)

    def _renormed(self, mask: Tensor, squares: Tensor, width: int, entry: Map) -> Tensor:
        """What a norm over the units that remain takes of their mask gradients.

        With a mask m on the units, the norm of a group of H units, G positions, gives

            y = w m x / sqrt(S + eps),   S = sum_u(m_u |x_u|^2) / sum_u(m_u G / H)

        so that the mask of a unit also moves S, and with it all outputs of its group: their mask gradients without that
        add up to A, and the squares z of what the norm divides to, so that y = w z, give

            A / 2 (|z_u|^2 - |z|^2 / H) / G
        """
        groups = (self.architecture.parts[entry.part].groups, -1)
        each, all_of_group = squares.unflatten(-1, groups), mask.unflatten(-1, groups).sum(-1, keepdim=True)
        moved = (each - each.mean(-1, keepdim=True)) * (groups[0] / width)
        return (all_of_group / 2 * moved).flatten(-2)

    def rows(self, entry: Map, x: Tensor, delta: Tensor, routing: Routing) -> None:
        """Add the mask gradients of a stack's units, and the second moments of the gradients at each expert's input."""
        sizes, axis = self.architecture.sizes, self.architecture.parts[entry.part].axis
        units = torch.from_numpy(entry.input.units(axis, sizes)).view(entry.copies(sizes), -1)
        units = units.to(x.device, non_blocking=True)
        number = self.architecture.units(entry.part)
        mask = torch.zeros(routing.total * number, device=x.device)
        places = routing.tokens[:, None] * number + units[routing.experts]
        mask.index_add_(0, places.flatten(), (x.float() * delta.float()).flatten())
        mask = mask.view(self._n_sequences, -1, number)
        self._mask(entry, mask)
        name = f"{entry.module}.input_gradient_square"
        self.sums.update(entry.layer, name, delta.float() * self._n_tok, torch.tensor(routing.counts))

    def _mask(self, entry: Map, mask: Tensor) -> None:
        """Add the mask gradients at the input of a consumer.

        Those of a block with several consumers, such as shared experts or layers that use its units too, add up before
        anything is made of them.
        """
        self.finite.require(mask, self._first, f"the mask gradient at the input of {entry.module}")
        home = self.architecture.home(entry)
        masks = self._masks.setdefault(home, [])
        masks.append(mask)
        if len(masks) == len(self.architecture.consumers(*home)):
            whole = torch.stack([one.to(mask.device) for one in self._masks.pop(home)]).sum(0)
            self.sums.update(home[0], UNITS + home[1], whole)

    def _take(self, name: str, layer: int, gradient: Tensor) -> None:
        """Keep the gradient of a pass, a sum over its sequences, and add that of a whole batch to the sums."""
        pending = PENDING + name in self.sums.groups[layer]
        if pending:
            self.sums.update(layer, PENDING + name, gradient)
            gradient = self.sums.state(layer, PENDING + name)["total"]
        if self._last:
            sequences = count(self._sequences)
            self.sums.update(layer, name, gradient, sequences)
            self.sums.update(layer, ROWS + name, gradient, sequences, torch.tensor(self._number))
            if pending:
                gradient.zero_()


def add_second_moment(sums: Accumulator, entry: Map, side: str, delta: Tensor, n_tok: int) -> None:
    """Add the second moment of a gradient at one side of a map, per token, where the sums have it.

    Args:
        sums: of the `gradient_groups`.
        entry: the map.
        side: `input` or `output`.
        delta: gradient of the sum of mean-token losses there, ``[..., width]``.
        n_tok: loss-counted tokens of a sequence, which turn it into the gradient of summed losses.
    """
    delta, group, name = delta.flatten(0, -2).float(), sums.groups[entry.layer], f"{entry.module}.{side}_gradient"
    if f"{name}_square" in group:
        sums.update(entry.layer, f"{name}_square", delta.square().sum(0).double() * n_tok**2, count(len(delta)))
    if f"{name}_gram" in group:
        sums.update(entry.layer, f"{name}_gram", delta * n_tok)


def gradient_columns(
    architecture: Architecture, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], layer: int, part: str
) -> dict[str, NDArray[np.float64]]:
    """Per-unit first-order numbers of a block: sum |W G|, sum W G, and those of `MaskGradient`.

    Args:
        tensors: the finished statistics of the layer, by name.
        weights: the dense model's parameters.
        layer: the layer of the block.
        part: the part of the block.
    """

    def signed(name: str, gradient: Tensor, rows: slice) -> Tensor:
        return weights[name][rows].double() * gradient

    prefix = f"{UNITS}{part}."
    return {
        "taylor": unit_sums(architecture, layer, part, tensors, of=lambda *one: signed(*one).abs_()),
        "taylor_signed": unit_sums(architecture, layer, part, tensors, of=signed),
    } | {name.removeprefix(prefix): tensor.numpy() for name, tensor in tensors.items() if name.startswith(prefix)}


def layer_rows(architecture: Architecture, tensors: Mapping[str, Tensor], layer: int, batches: int) -> Columns:
    """A table with one row a batch and parameter of a layer: mean |g|, standard deviation and norm of its gradient."""
    table: dict[str, list[object]] = {name: [] for name in LAYER_COLUMNS}
    for owner, part in architecture.uses(layer):
        for parameter in architecture.parameters_of(owner, part):
            if parameter.layer != layer:
                continue
            rows = tensors[f"{ROWS}{parameter.name}"][:batches]
            kind = _kind(architecture, parameter)
            for batch, row in enumerate(rows.tolist()):
                for name, value in zip(LAYER_COLUMNS, (layer, part, kind, batch, *row), strict=True):
                    table[name].append(value)
    return {name: np.array(values, dtype=object if name in _TEXT else None) for name, values in table.items()}


def tensor_rows(architecture: Architecture, tensors: Mapping[str, Tensor], layer: int) -> Columns:
    """A table with one row a parameter of the layer: the norm of its mean gradient over all sequences."""
    found = ((part, p) for owner, part in architecture.uses(layer) for p in architecture.parameters_of(owner, part))
    parameters = [(part, p) for part, p in found if p.layer == layer]
    return {
        "layer_idx": np.full(len(parameters), layer),
        "group_type": np.array([part for part, _ in parameters], dtype=object),
        "parameter": np.array([_kind(architecture, p) for _, p in parameters], dtype=object),
        "norm": np.array([float(tensors[p.name].double().norm()) for _, p in parameters]),
    }


def _kind(architecture: Architecture, parameter: Parameter) -> str:
    """A parameter's name within its layer."""
    return parameter.name.removeprefix(f"{architecture.layers_path}.{parameter.layer}.")


LAYER_COLUMNS = ("layer_idx", "group_type", "parameter", "batch", "mean_abs", "std", "norm")
_TEXT = {"group_type", "parameter"}


def print_gradients(rows: Columns, folder: Path) -> None:
    """Print the mean |g| by layer and part, the first keys, the gradient ratio and its verdict."""
    parts = list(dict.fromkeys(rows["group_type"]))
    note(f"{'layer':>5}" + "".join(f"{f'mean |g| {part}':>22}" for part in parts))
    for layer in np.unique(rows["layer_idx"]):
        own = rows["layer_idx"] == layer
        values = [rows["mean_abs"][own & (rows["group_type"] == part)] for part in parts]
        note(f"{layer:>5}" + "".join(mean_cell(some, 22) for some in values))
    print_keys(folder)
    ratio = gradient_ratio(rows)
    say(f"gradient ratio between layers: {ratio:,.1f} ({verdict(ratio)})")
