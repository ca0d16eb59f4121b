"""The bytes that every stage writes, predicted from the shapes and the params alone.

Tensors are counted exactly, by the statistics that collect them, on the meta device. Compressed files and texts are
estimated; they are small beside the tensors unless the model is tiny.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from libprune.collection.accumulator import PENDING, ROWS, UNITS, Group, state_bytes
from libprune.collection.records import Statistic
from libprune.engine import cost
from libprune.engine.architecture import RESIDUAL, Architecture, Map
from libprune.engine.plan import Plan
from libprune.models.compute import resolve_dtype
from libprune.pipeline.methods import REPAIRS, allocation_reads, methods_that_read
from libprune.pipeline.params import Params
from libprune.pipeline.sections import Allocate, Compute, Recover
from libprune.recovery.memory import CHECKPOINTS, checkpoint_bytes, training_bytes
from libprune.recovery.predictions import BYTES, sequences_at_once, shard_path
from libprune.recovery.teacher_model import described_teacher
from libprune.scoring.expression import criteria_of
from libprune.scoring.score import component_columns
from libprune.statistics.activations import activation_groups
from libprune.statistics.depth import most_removals
from libprune.statistics.depth import removals as in_order
from libprune.statistics.gradients import gradient_groups
from libprune.statistics.hessian import hessian_groups
from libprune.statistics.levels import choose_levels
from libprune.statistics.sensitivity import removals

# pyarrow's defaults: values that a dictionary page of 1 MiB holds, and rows of a row group.
_DICTIONARY_VALUES, _ROW_GROUP = 1 << 17, 1 << 20
# Measured: what a Parquet file says of a column and of itself, a safetensors header of a tensor (beside its name) and
# of itself, a token id in Parquet, a token in tokenizer.json with its merges; then texts, and the report's pictures.
_COLUMN, _TABLE = 320, 600
_TENSOR, _SHARD = 76, 320
_TOKEN_ID, _TOKEN_TEXT = 2.5, 72
_CONFIG, _PROVENANCE, _EVALUATION, _EVALUATION_LAYER, _LATENCY = 1_400, 4_000, 3_000, 90, 1_500
_REPORT = 1_100_000
_ABOUT, _CURVE = 300, 30_000


@dataclass(frozen=True)
class Table:
    """A Parquet table as `libprune.pipeline.artifacts.write_table` writes it.

    Attributes:
        rows: number of rows.
        numbers: number of float64 columns whose values hardly repeat.
        labels: the number of distinct values of each column of small integers or rounded shares.
        runs: number of columns that are constant or sorted, and take next to no space.
    """

    rows: int
    numbers: int
    labels: tuple[int, ...] = ()
    runs: int = 2

    @property
    def columns(self) -> int:
        """Number of columns."""
        return self.numbers + len(self.labels) + self.runs

    @property
    def nbytes(self) -> int:
        """Predicted bytes of the file.

        A column is a dictionary of its values and one index a row, until the dictionary has grown to
        1 MiB; what follows in a row group is plain. Numbers of statistics hardly compress.
        """
        groups = [min(_ROW_GROUP, self.rows - start) for start in range(0, self.rows, _ROW_GROUP)]
        indexed = (min(rows, _DICTIONARY_VALUES) for rows in groups)
        numbers = sum(self.numbers * (8 * rows + _index(n, n)) for rows, n in zip(groups, indexed, strict=True))
        labels = sum(8 * min(distinct, rows) + _index(rows, distinct) for rows in groups for distinct in self.labels)
        return _TABLE + _COLUMN * self.columns + numbers + labels


def _index(rows: int, distinct: int) -> int:
    """Bytes of the indices of all rows into a dictionary of distinct values."""
    return rows * max(0, distinct - 1).bit_length() // 8


@dataclass(frozen=True)
class Footprint:
    """The files that one stage writes, and the running sums that it holds until then.

    Attributes:
        files: bytes by path below the folder of artifacts.
        settings: the params that decide the bytes, with their values.
        sums: bytes of the running sums, in memory or in `.work`; 0 for a stage that keeps hardly any.
        training: bytes of memory that the training of a model takes, without activations; 0 for a stage without one.
        checkpoints: the most bytes of its checkpoints in `.work`, until the stage ends.
    """

    stage: str
    files: Mapping[str, int]
    settings: str = ""
    sums: int = 0
    training: int = 0
    checkpoints: int = 0

    @property
    def written(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


_GGUF = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
"""Bytes of a weight in the types of GGUF files."""


def footprints(architecture: Architecture, params: Params, stored: torch.dtype) -> list[Footprint]:
    """Predict the files of all stages, in the order in which they run.

    Training and export have rows only if they are asked for.

    Args:
        params: the params of the run.
        stored: storage type of the dense model.

    Raises:
        LibpruneError: for an unknown criterion.
    """
    rows = sum(architecture.units(part) for _, part in architecture.blocks())
    components = component_columns(criteria_of(architecture, params.score), params.score)
    scores = _units(architecture, numbers=2 + components, runs=3)
    sliced = _slice(architecture, params, stored, _plan(scores))
    trained = params.recover.method != "none"
    exported = [_export(architecture, params, stored)] if params.export.formats else []
    scored = ", ".join(f"score.{key}: {text}" for key, text in params.score.expressions.items())
    return [
        _prepare(architecture, stored),
        _tokenize(params),
        _gradients(architecture, params),
        _hessian(architecture, params),
        _activations(architecture, params),
        _losses("ablation", min(params.ablation.units, rows), f"ablation.units: {params.ablation.units}", 3),
        Footprint("score", {"scores.parquet": scores.nbytes}, scored),
        _sensitivity(architecture, params.allocate),
        _depth(architecture, params),
        _levels(architecture, params),
        _width(architecture, params),
        _latency(params.allocate),
        Footprint("allocate", {"plan.parquet": _plan(scores).nbytes}, f"allocate.method: {params.allocate.method}"),
        sliced,
        *([_teacher(architecture, params.recover), _recover(architecture, params, sliced)] if trained else []),
        *exported,
        Footprint("evaluate", {"evaluation.json": _EVALUATION + _EVALUATION_LAYER * architecture.layers}),
        Footprint("report", {"../report": _REPORT}),
    ]


def _units(architecture: Architecture, numbers: int, labels: tuple[int, ...] = (), runs: int = 2) -> Table:
    """A per-unit table: the columns of layer, part and unit, and further ones."""
    rows = sum(architecture.units(part) for _, part in architecture.blocks())
    return Table(rows, numbers, (max(map(architecture.units, architecture.parts)), *labels), runs)


def _plan(scores: Table) -> Table:
    """The table of the plan: that of the scores, and the column `keep`."""
    return Table(scores.rows, scores.numbers, (*scores.labels, 2), scores.runs)


def _prepare(architecture: Architecture, stored: torch.dtype) -> Footprint:
    files = {
        "model/model.safetensors": _weights(architecture, architecture.total_parameters, stored),
        "model/config.json": _CONFIG,
        "model/tokenizer.json": _TOKEN_TEXT * architecture.sizes["vocab"],
        "architecture.json": len(architecture.to_json()),
        "vocabulary.json": _vocabulary(architecture),
        "weights.parquet": _units(architecture, numbers=5, runs=4).nbytes,
    }
    return Footprint("prepare", files, f"stored as {dtype_name(stored)}")


def _vocabulary(architecture: Architecture) -> int:
    """The note that all tokens stay, or the ids of those that do and the tokenizer that was given."""
    gone = architecture.trimmed
    return _ABOUT if gone is None else _ABOUT + 8 * architecture.sizes["vocab"] + _TOKEN_TEXT * gone.tokens


def _weights(architecture: Architecture, parameters: int, stored: torch.dtype) -> int:
    names = [parameter.name for parameter in architecture.parameters]
    return parameters * stored.itemsize + header_bytes(names)


def header_bytes(names: Iterable[str]) -> int:
    """Predicted bytes of the header of a safetensors file that holds tensors of these names."""
    return _SHARD + sum(_TENSOR + len(name) for name in names)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in configs and params."""
    return str(dtype).removeprefix("torch.")


def _tokenize(params: Params) -> Footprint:
    section = params.tokenize
    shapes = {
        "calibration": (section.calibration_sequences, section.calibration_length),
        "repair": section.repaired_on,
        "evaluation": (section.evaluation_windows, section.evaluation_length),
    }
    files = {f"tokens/{n}.parquet": _TABLE + _COLUMN + round(_TOKEN_ID * a * b) for n, (a, b) in shapes.items()}
    return Footprint("tokenize", files, ", ".join(dict.fromkeys(f"{a} × {b} tokens" for a, b in shapes.values())))


def _gradients(architecture: Architecture, params: Params) -> Footprint:
    section, tokens = params.gradients, params.tokenize
    sequences = section.sequences or tokens.calibration_sequences
    size, available = section.batch_sequences, tokens.calibration_sequences
    in_one_pass = max(1, params.compute.batch_tokens // tokens.calibration_length)
    in_pieces = architecture.head == "sequence_classification" or in_one_pass < size
    n_tok = tokens.calibration_length - 1
    groups = gradient_groups(architecture, n_tok, -(-available // size), section, in_pieces)
    parameters = [p for block in architecture.blocks() for p in architecture.parameters_of(*block)]
    tables = {
        "units": _units(architecture, numbers=10, labels=(sequences + 1,)),
        "layers": Table(len(parameters) * -(-sequences // size), 3, runs=4),
        "tensors": Table(len(parameters), 1, runs=3),
    }
    moments = f"second_moments: {section.second_moments}"
    settings = f"{section.storage_dtype}, {sequences} sequences, {moments}"
    return _collected("gradients", groups, architecture.layers, tables, settings)


def _hessian(architecture: Architecture, params: Params) -> Footprint:
    section = params.hessian
    if section.estimator == "none":
        return Footprint("hessian", {}, "hessian.estimator: none")
    groups = hessian_groups(architecture, params.tokenize.calibration_length - 1, section)
    tables = {"units": _units(architecture, numbers=4 if section.estimator == "hutchinson" else 2)}
    settings = f"{section.storage_dtype}, {section.estimator}"
    return _collected("hessian", groups, architecture.layers, tables, settings)


def _activations(architecture: Architecture, params: Params) -> Footprint:
    section, tokens = params.activations, params.tokenize
    sequences = section.sequences or tokens.calibration_sequences
    groups = activation_groups(architecture, section)
    table = _units(architecture, numbers=9, labels=(sequences * tokens.calibration_length // 8,))
    settings = f"{section.storage_dtype} Gram matrices, {sequences} sequences"
    return _collected("activations", groups, architecture.layers, {"units": table}, settings)


def _collected(
    stage: str, groups: Sequence[Group], layers: int, tables: Mapping[str, Table], settings: str
) -> Footprint:
    files = {f"{stage}/layer-{layer:03d}.safetensors": _shard(groups[layer]) for layer in range(layers)}
    files |= {f"{stage}/{name}.parquet": table.nbytes for name, table in tables.items()}
    return Footprint(stage, files, settings, state_bytes(groups))


def _shard(group: Group) -> int:
    """Bytes of a layer's shard, without the entries that go into tables or are dropped."""
    kept = {name: entry for name, entry in group.items() if not name.startswith((PENDING, ROWS, UNITS))}
    sizes = {
        f"{name}.{part}" if part else name: nbytes
        for name, entry in kept.items()
        for part, nbytes in _stored(entry).items()
    }
    return sum(sizes.values()) + header_bytes(sizes)


@cache
def _stored(statistic: Statistic) -> dict[str, int]:
    """Bytes of the tensors that a statistic stores, by name; those of layers that are alike are asked for once."""
    return {part: tensor.nbytes for part, tensor in statistic.finish(statistic.init("meta")).items()}


def _losses(stage: str, rows: int, settings: str, keys: int) -> Footprint:
    """A table of measured means and their standard errors, beside `keys` columns that name what was measured."""
    return Footprint(stage, {f"{stage}.parquet": Table(rows, 2, runs=keys).nbytes}, settings)


def _sensitivity(architecture: Architecture, allocate: Allocate) -> Footprint:
    used = "sensitivity" in allocation_reads(allocate.method, allocate.worth)
    setting = "worth: sensitivity" if allocate.worth == "sensitivity" else _method(allocate, "sensitivity")
    return _losses("sensitivity", len(removals(architecture)) if used else 0, _only(used, setting), 2)


def _depth(architecture: Architecture, params: Params) -> Footprint:
    allocate = params.allocate
    possible = len(in_order(architecture, params.depth.of))
    rows = most_removals(possible, params.depth.removals) if allocate.ordered else 0
    setting = f"depth: {allocate.depth}" if allocate.ordered else "depth: joint or cosine"
    return Footprint("depth", {"depth.parquet": Table(rows, 4, runs=3).nbytes}, _only(allocate.ordered, setting))


def _levels(architecture: Architecture, params: Params) -> Footprint:
    used, number = "levels" in allocation_reads(params.allocate.method), params.levels.number
    rows = len(choose_levels(architecture, number)) if used else 0
    return _losses("levels", rows, _only(used, _method(params.allocate, "levels")), 3)


def _width(architecture: Architecture, params: Params) -> Footprint:
    """The table of widths, the axes, and two matrices as wide as the stream for each of its norms."""
    used, whole = params.allocate.width is not None, architecture.sizes.get(RESIDUAL, 0)
    rows = (1 if isinstance(params.allocate.width, int) else params.width.number) if used else 0
    norms = len(architecture.stream_norms) if used else 0
    matrices = 2 * norms * whole * whole * torch.float32.itemsize
    files = {"width.parquet": Table(rows, 2, runs=2).nbytes}
    if used:
        files["width/axes.safetensors"] = matrices + (norms + whole) * whole * torch.float32.itemsize
    return Footprint("width", files, _only(used, "width"), matrices)


def _method(allocate: Allocate, artifact: str) -> str:
    """The setting that asks for an artifact: the chosen method if it reads the artifact, else all methods that do."""
    reads = artifact in allocation_reads(allocate.method)
    return f"method: {allocate.method if reads else methods_that_read(artifact)}"


def _latency(allocate: Allocate) -> Footprint:
    used = allocate.times
    setting = "objective: latency" if allocate.objective == "latency" or not used else "budgets.latency"
    return Footprint("latency", {"latency.json": _LATENCY if used else 40}, _only(used, setting))


def _only(used: bool, setting: str) -> str:
    return f"allocate.{setting}" if used else f"empty without allocate.{setting}"


def _slice(architecture: Architecture, params: Params, stored: torch.dtype, plan: Table) -> Footprint:
    """The pruned folder; the dense size stands for that of objectives that do not fix the number of parameters."""
    section, allocate = params.slice, params.allocate
    dtype = stored if section.dtype == "auto" else getattr(torch, section.dtype)
    left = architecture.total_parameters - _removed(architecture, allocate)
    consumers = sum(len(architecture.consumers(*block)) for block in architecture.blocks())
    files = {
        "pruned/model.safetensors": _weights(architecture, left, dtype),
        "pruned/config.json": _CONFIG,
        "pruned/tokenizer.json": _TOKEN_TEXT * architecture.sizes["vocab"],
        "pruned/libprune.json": _PROVENANCE,
        "pruned/plan.parquet": plan.nbytes,
        "pruned/repair.parquet": Table(consumers if REPAIRS[section.repair].function else 0, 5, runs=3).nbytes,
    }
    ratio = "null" if allocate.ratio is None else allocate.ratio
    limits = ", ".join(f"{name}: {share}" for name, share in allocate.budgets.asked.items())
    asked = f"allocate.ratio: {ratio} of the {allocate.ratio_of}'s {allocate.objective}"
    asked = f"allocate.budgets: {limits}" if limits else asked
    at_most = "" if _foretold(allocate) else "at most, "
    return Footprint("slice", files, f"{dtype_name(dtype)}, {at_most}{asked}")


def _foretold(allocate: Allocate) -> bool:
    """Whether the number of removed parameters follows from the params, at least about."""
    return allocate.objective in {"parameters", "macs"} and allocate.ratio is not None


def _removed(architecture: Architecture, allocate: Allocate) -> int:
    """Number of parameters that slicing removes; 0 where it is not foretold."""
    ratio, narrow = (allocate.ratio or 0) if _foretold(allocate) else 0, architecture.narrowed(allocate.columns)
    if allocate.ratio_of == "decoder":  # columns of the embedding go too
        whole, left = (one.total_parameters - one.decoder_parameters for one in (architecture, narrow))
        return round(ratio * architecture.decoder_parameters) + whole - left
    gone = architecture.given_parameters - architecture.total_parameters
    return max(0, round(ratio * architecture.given_parameters) - gone)


def _teacher(architecture: Architecture, recover: Recover) -> Footprint:
    """The text to train on, at most, and the stored predictions."""
    sequences, length = -(-recover.tokens // recover.length) + recover.held_out, recover.length
    files = {
        "tokens/recovery.parquet": _TABLE + _COLUMN + round(_TOKEN_ID * sequences * length),
        "teacher/teacher.json": _ABOUT,
    }
    if recover.top_k is not None:
        positions = 1 if architecture.head == "sequence_classification" else length
        each = positions * min(recover.top_k, architecture.sizes["vocab"]) * BYTES
        at_once = sequences_at_once(positions, recover.top_k)
        for number, first in enumerate(range(0, sequences, at_once)):
            size = min(at_once, sequences - first) * each + header_bytes(("log_probabilities", "ids"))
            files[f"teacher/{shard_path(Path(), number)}"] = size
    top_k = "null" if recover.top_k is None else recover.top_k
    return Footprint("teacher", files, f"{sequences:,} × {length:,} tokens, recover.top_k: {top_k}")


def _recover(architecture: Architecture, params: Params, sliced: Footprint) -> Footprint:
    """The recovered folder, which holds what the pruned one does, and what its training takes."""
    recover, allocate = params.recover, params.allocate
    files = {name.replace("pruned/", "recovered/"): size for name, size in sliced.files.items()}
    files["recovered/libprune.json"] += _CURVE
    left = architecture.total_parameters - _removed(architecture, allocate)
    beside = sum(architecture.numel(parameter) for parameter in architecture.parameters if parameter.whole)
    trained = left - beside if recover.method == "full" else _lora_parameters(architecture, recover, allocate)
    computed = compute_dtype(params.compute)
    learned_from, teacher = 0, "teacher stored" if recover.compares else "no teacher"
    if recover.runs_teacher:
        learned_from = described_teacher(architecture, recover).total_parameters
        teacher = f"teacher in {dtype_name(computed)}"
    return Footprint(
        "recover",
        files,
        f"{recover.method} in {recover.dtype}, {trained:,} trained, {teacher}",
        training=training_bytes(trained, left, recover) + learned_from * computed.itemsize,
        checkpoints=CHECKPOINTS * checkpoint_bytes(trained, recover),
    )


def _export(architecture: Architecture, params: Params, stored: torch.dtype) -> Footprint:
    """The files for other programs; rows that fill no block, and channels of zeros, make them a little larger."""
    export, left = params.export, architecture.total_parameters - _removed(architecture, params.allocate)
    words = _TOKEN_TEXT * architecture.sizes["vocab"]
    files: dict[str, int] = {}
    for name in export.formats:
        if name == "gguf":
            files |= {f"exported/model.{kind}.gguf": round(left * _GGUF[kind]) + words for kind in export.gguf_types}
        else:
            width = stored.itemsize if name == "transformers" else torch.float32.itemsize
            files[f"exported/{name}"] = left * width
    return Footprint("export", files, f"export.formats: {', '.join(export.formats)}")


def _lora_parameters(architecture: Architecture, recover: Recover, allocate: Allocate) -> int:
    """Number of parameters in the matrices beside the layers' maps, if all units of the pruned model are left alike.

    The few maps outside the layers, such as those of an encoder's head, and those of no part are left out. For
    mixtures of experts it is an estimate: which of their tensors peft trains differs by family.
    """
    nothing = Plan({block: ~keep for block, keep in Plan.dense(architecture).keep.items()})
    prunable = replace(cost.prices(architecture, "parameters"), rest={}).removed(nothing)
    share = 1 - _removed(architecture, allocate) / prunable
    pruned = frozenset[str]().union(*(shape.axes for shape in architecture.parts.values()))
    sides = [side for one in architecture.maps if _targeted(one, recover) for side in (one.input, one.output)]
    widths = (side.size(architecture.sizes) * (share if side.names & pruned else 1) for side in sides)
    return round(recover.lora_rank * sum(widths))


def _targeted(one: Map, recover: Recover) -> bool:
    """Whether `lora` trains matrices beside a map, by the rules of peft."""
    targets = recover.lora_targets
    return targets == "all-linear" or any(f".{one.module}".endswith(f".{target}") for target in targets)


def compute_device(compute: Compute) -> torch.device:
    """The kind of device that passes run on, on this machine where the params leave it open."""
    gpu = torch.cuda.is_available() if compute.device == "auto" else compute.device != "cpu"
    return torch.device("cuda" if gpu else "cpu")


def compute_dtype(compute: Compute) -> torch.dtype:
    """The type that passes are computed in, on this machine where the params leave it open."""
    return resolve_dtype(compute.dtype, compute_device(compute))
