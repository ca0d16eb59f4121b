"""Artifacts: where they lie, what they say about their origin, and how they are written whole or not at all.

Nothing is ever opened for writing in place: outputs may be hard links into a cache.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from libprune.engine.architecture import Architecture
from libprune.engine.errors import ArtifactError, LibpruneError, missing_key
from libprune.engine.plan import Plan
from libprune.pipeline.processes import runs

Columns = dict[str, NDArray[Any]]
"""A table: column name to an array of one value a row."""

_KEY = "libprune"


@dataclass(frozen=True)
class Layout:
    """The places of all artifacts below one folder."""

    root: Path = Path("artifacts")

    @property
    def model(self) -> Path:
        """The dense model, a Hugging Face folder."""
        return self.root / "model"

    @property
    def architecture(self) -> Path:
        """Axes, sizes and parameters of the dense model."""
        return self.root / "architecture.json"

    @property
    def weights(self) -> Path:
        """Per-unit costs and weight norms."""
        return self.root / "weights.parquet"

    @property
    def calibration(self) -> Path:
        """Token ids that statistics are collected on."""
        return self.root / "tokens" / "calibration.parquet"

    @property
    def evaluation(self) -> Path:
        """Token ids that the models are judged on."""
        return self.root / "tokens" / "evaluation.parquet"

    @property
    def gradients(self) -> Path:
        """Mean gradients by layer and their per-unit sums."""
        return self.root / "gradients"

    @property
    def hessian(self) -> Path:
        """Diagonals of the Hessian by layer and their per-unit sums."""
        return self.root / "hessian"

    @property
    def activations(self) -> Path:
        """Activation statistics by layer and their per-unit sums."""
        return self.root / "activations"

    @property
    def ablation(self) -> Path:
        """The measured loss increase of masking single units."""
        return self.root / "ablation.parquet"

    @property
    def sensitivity(self) -> Path:
        """The measured loss increase of removing whole layers and blocks."""
        return self.root / "sensitivity.parquet"

    @property
    def levels(self) -> Path:
        """The measured divergence of whole levels of single blocks."""
        return self.root / "levels.parquet"

    @property
    def latency(self) -> Path:
        """The measured time of a layer by its width."""
        return self.root / "latency.json"

    @property
    def scores(self) -> Path:
        """The global importance table."""
        return self.root / "scores.parquet"

    @property
    def plan(self) -> Path:
        """The importance table with the decision."""
        return self.root / "plan.parquet"

    @property
    def comparison(self) -> Path:
        """Everything measured of the dense and the pruned model."""
        return self.root / "evaluation.json"

    @property
    def pruned(self) -> Path:
        """The pruned model, a Hugging Face folder."""
        return self.root / "pruned"


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder at, which takes the place of `target` only on success."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    for left in target.parent.glob(f".{target.name}.*.partial"):
        if not runs(int(left.name.split(".")[-2])):  # a process that was killed cannot clear up
            remove(left)
    remove(partial)
    try:
        yield partial
        if partial.is_dir():
            remove(target)
        partial.replace(target)
    finally:
        remove(partial)


@contextmanager
def writing_folder(target: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `target` only on success."""
    with writing(target) as partial:
        partial.mkdir()
        yield partial


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with writing(target) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path, stage: str) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        ArtifactError: naming the stage that makes it.
    """
    with damage(path, stage):
        content: dict[str, Any] = json.loads(require(path, stage).read_text())
    return content


@contextmanager
def damage(path: Path, stage: str) -> Iterator[None]:
    """Turn the errors of a file that cannot be decoded into an ArtifactError that says what to do."""
    try:
        yield
    except LibpruneError:
        raise
    except Exception as error:  # pyarrow, safetensors and json each raise several types of their own
        raise ArtifactError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it and run `dvc repro {stage}`"
        ) from error


def require(path: Path, stage: str) -> Path:
    """The path, if it exists.

    Raises:
        ArtifactError: naming the stage that makes it.
    """
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; run `dvc repro {stage}` first")
    return path


def encode_meta(meta: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as one sorted JSON text under one key: safetensors orders several keys at random."""
    return {_KEY: json.dumps(meta, sort_keys=True)}


def decode_meta(path: Path, raw: Mapping[str, str] | None, stage: str) -> dict[str, Any]:
    """What `encode_meta` wrote.

    Raises:
        ArtifactError: if the file was not written by libprune.
    """
    if not raw or _KEY not in raw:
        raise ArtifactError(f"{path} carries no libprune metadata; delete it and run `dvc repro {stage}`")
    meta: dict[str, Any] = json.loads(raw[_KEY])
    return meta


def write_table(target: Path, columns: Columns, meta: Mapping[str, Any]) -> None:
    """Write a Parquet table with its metadata, whole or not at all."""
    arrays = {name: pa.array(list(v)) if v.ndim > 1 else pa.array(v) for name, v in columns.items()}
    table = pa.table(arrays).replace_schema_metadata(encode_meta(meta))
    with writing(target) as partial:
        pq.write_table(table, partial, write_page_checksum=True)


def read_table(path: Path, stage: str) -> tuple[Columns, dict[str, Any]]:
    """Columns and metadata of a Parquet table.

    Raises:
        ArtifactError: if it is missing or was not written by libprune.
    """
    with damage(path, stage):
        table = pq.read_table(require(path, stage), page_checksum_verification=True)
        raw = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        return {name: table[name].to_numpy() for name in table.column_names}, decode_meta(path, raw, stage)


def column(table: Columns, name: str, where: str) -> NDArray[Any]:
    """One column.

    Raises:
        ArtifactError: with the columns that exist.
    """
    if name not in table:
        raise ArtifactError(missing_key(name, table, where))
    return table[name]


def same_origin(path: Path, meta: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that an artifact was made from the expected model (and text).

    Raises:
        ArtifactError: naming both.
    """
    for key, value in expected.items():
        if meta.get(key) != value:
            raise ArtifactError(
                f"{path} belongs to {key} {meta.get(key)!r}, but the current {key} is {value!r}; "
                "run `dvc repro` to make them agree"
            )


def read_architecture(layout: Layout) -> Architecture:
    """The solved description of the dense model.

    Raises:
        ArtifactError: if it is missing, or not one that this version reads.
    """
    path = require(layout.architecture, "prepare")
    try:
        return Architecture.from_json(path.read_text())
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is no description that this version of libprune reads ({error!r}); run the prepare stage again"
        ) from error


def unit_index(architecture: Architecture) -> Columns:
    """The rows of every per-unit table, in order: `layer_idx`, `group_type`, `group_idx`."""
    rows = [(layer, part, unit) for layer, part in architecture.blocks() for unit in range(architecture.units(part))]
    layers, parts, units = zip(*rows, strict=True)
    return {"layer_idx": np.array(layers), "group_type": np.array(parts, dtype=object), "group_idx": np.array(units)}


def write_units(
    target: Path,
    architecture: Architecture,
    columns_of: Callable[[int, str], Mapping[str, NDArray[Any]]],
    meta: Mapping[str, Any],
) -> None:
    """Write a per-unit table, one row a unit in the order of `unit_index`, sums in float64.

    Args:
        target: the Parquet file.
        architecture: the model's description.
        columns_of: the named per-unit arrays ``[units]`` of a (layer, part).
        meta: origin of the values.
    """
    blocks = [columns_of(layer, part) for layer, part in architecture.blocks()]
    columns: Columns = {name: np.concatenate([np.asarray(block[name]) for block in blocks]) for name in blocks[0]}
    write_table(target, unit_index(architecture) | columns, meta)


def read_plan(layout: Layout, architecture: Architecture) -> tuple[Plan, dict[str, Any]]:
    """The plan and its metadata.

    Raises:
        ArtifactError: if it belongs to another model or lacks a unit.
    """
    table, meta = read_table(layout.plan, "allocate")
    same_origin(layout.plan, meta, {"model": architecture.fingerprint})
    keep = column(table, "keep", str(layout.plan))
    check_rows(architecture, table, layout.plan)
    return Plan(dict(split_blocks(architecture, keep))), meta


def check_rows(architecture: Architecture, table: Columns, path: Path) -> None:
    """Stop unless a table has one row a unit, in the order of `unit_index`."""
    for name, expected in unit_index(architecture).items():
        if not np.array_equal(column(table, name, str(path)), expected):
            raise ArtifactError(f"{path}: the rows do not list the units of this model in order; run `dvc repro`")


def split_blocks(architecture: Architecture, values: NDArray[Any]) -> Iterator[tuple[tuple[int, str], NDArray[Any]]]:
    """Cut a per-unit column into the blocks' own arrays."""
    start = 0
    for layer, part in architecture.blocks():
        stop = start + architecture.units(part)
        yield (layer, part), values[start:stop]
        start = stop
