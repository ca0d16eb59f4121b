"""Artifacts: where they lie, what they say about their origin, and how they are written whole or not at all.

Nothing is ever opened for writing in place: outputs may be hard links into a cache.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from libprune.architecture import Architecture
from libprune.errors import ArtifactError, missing_key

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
    def scores(self) -> Path:
        """The global importance table."""
        return self.root / "scores.parquet"

    @property
    def plan(self) -> Path:
        """The importance table with the decision."""
        return self.root / "plan.parquet"

    @property
    def pruned(self) -> Path:
        """The pruned model, a Hugging Face folder."""
        return self.root / "pruned"


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder at, which takes the place of `target` only on success."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    _remove(partial)
    try:
        yield partial
        if partial.is_dir():
            _remove(target)
        partial.replace(target)
    finally:
        _remove(partial)


@contextmanager
def writing_folder(target: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `target` only on success."""
    with writing(target) as partial:
        partial.mkdir()
        yield partial


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with writing(target) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


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


def write_table(target: Path, columns: Columns, meta: Mapping[str, Any]) -> None:
    """Write a Parquet table with its metadata, whole or not at all."""
    arrays = {name: pa.array(list(v)) if v.ndim > 1 else pa.array(v) for name, v in columns.items()}
    table = pa.table(arrays).replace_schema_metadata(encode_meta(meta))
    with writing(target) as partial:
        pq.write_table(table, partial)


def read_table(path: Path, stage: str) -> tuple[Columns, dict[str, Any]]:
    """Columns and metadata of a Parquet table.

    Raises:
        ArtifactError: if it is missing or was not written by libprune.
    """
    try:
        table = pq.read_table(require(path, stage))
    except pa.ArrowInvalid as error:
        raise ArtifactError(f"{path} is damaged ({error}); delete it and run `dvc repro {stage}`") from error
    raw = (table.schema.metadata or {}).get(_KEY.encode())
    if raw is None:
        raise ArtifactError(f"{path} carries no libprune metadata; delete it and run `dvc repro {stage}`")
    return {name: table[name].to_numpy() for name in table.column_names}, json.loads(raw)


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
    """The solved description of the dense model."""
    return Architecture.from_json(require(layout.architecture, "prepare").read_text())


def unit_index(architecture: Architecture) -> Columns:
    """The rows of every per-unit table, in order: `layer_idx`, `group_type`, `group_idx`."""
    rows = [(layer, part, unit) for layer, part in architecture.blocks() for unit in range(architecture.units(part))]
    layers, parts, units = zip(*rows, strict=True)
    return {"layer_idx": np.array(layers), "group_type": np.array(parts, dtype=object), "group_idx": np.array(units)}
