"""Artifacts as JSON and Parquet, with the digests of the model and the text they were made from, and as records."""

import hashlib
import json
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from libprune.engine.architecture import Architecture, know_family
from libprune.engine.errors import ArtifactError, LibpruneError, MeansError, cause, lacking
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns, check_rows, column, split_blocks, unit_index
from libprune.pipeline.atomic import write_json, writing, writing_folder
from libprune.pipeline.digests import SEAL, ChangedError, require_digest, sealed, split_seal, text_digest, unsealed
from libprune.pipeline.layout import NOTHING, Layout

_KEY = "libprune"


def read_json(path: Path, stage: str) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        ArtifactError: if it is missing or damaged; the message names the stage that makes it.
    """
    with damage(path, stage):
        content: dict[str, Any] = unsealed(path, json.loads(require(path, stage).read_text()))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} in place of an object with keys")
    return content


@contextmanager
def damage(path: Path, stage: str) -> Iterator[None]:
    """Turn the errors of a file that cannot be decoded into an ArtifactError that says what to do.

    Where the machine lacks the means to read it, such as memory, it is a MeansError.
    """
    try:
        yield
    except ChangedError as error:
        raise ArtifactError(f"{error}; delete it and run `dvc repro {stage}`") from error
    except LibpruneError:
        raise
    except Exception as error:  # pyarrow, safetensors and json each raise several types of their own
        if (lacks := lacking(error)) is not None:
            raise MeansError(f"{path} cannot be read: {lacks}") from error
        raise ArtifactError(
            f"{path} is damaged ({type(error).__name__}: {' '.join(str(error).split())}); "
            f"delete it and run `dvc repro {stage}`"
        ) from error


def require(path: Path, stage: str) -> Path:
    """The path, if it is that of a file or a folder.

    Raises:
        ArtifactError: if it is not; the message names the stage that makes it.
    """
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; run `dvc repro {stage}` first")
    if not path.is_file() and not path.is_dir():  # reading from a pipe or a device may never end
        raise ArtifactError(f"{path} is no file; delete it and run `dvc repro {stage}`")
    return path


def encode_meta(meta: Mapping[str, Any], seal: Any = None) -> dict[str, str]:
    """Metadata as one sorted JSON text under one key: safetensors orders several keys at random.

    Args:
        meta: the metadata.
        seal: digests of the content of the file, if it has any.
    """
    return {_KEY: json.dumps({**meta, **({} if seal is None else {SEAL: seal})}, sort_keys=True)}


def decode_meta(path: Path, raw: Mapping[str, str] | None, stage: str) -> tuple[dict[str, Any], Any]:
    """The metadata and the digests that `encode_meta` put into the header of a file; None if it has no digests.

    Raises:
        ArtifactError: if the file was not written by libprune.
    """
    if not raw or _KEY not in raw:
        raise ArtifactError(f"{path} carries no libprune metadata; delete it and run `dvc repro {stage}`")
    return split_seal(path, json.loads(raw[_KEY]))


def write_nothing(target: Path, why: Mapping[str, Any]) -> None:
    """Write the folder of a stage that had nothing to do; it is not empty, since DVC warns of empty folders.

    Args:
        target: the folder.
        why: the params that say so.
    """
    with writing_folder(target) as folder:
        write_json(folder / NOTHING, why)


def write_table(target: Path, columns: Columns, meta: Mapping[str, Any]) -> None:
    """Write a Parquet table with its metadata, whole or not at all."""
    arrays = {name: pa.array(list(v)) if v.ndim > 1 else pa.array(v) for name, v in columns.items()}
    table = pa.table(arrays)
    table = table.replace_schema_metadata(encode_meta(meta, _content_digest(table, meta)))
    with writing(target) as partial:
        pq.write_table(table, partial, write_page_checksum=True)


def read_table(path: Path, stage: str) -> tuple[Columns, dict[str, Any]]:
    """Columns and metadata of a Parquet table.

    Raises:
        ArtifactError: if it is missing, damaged, or was not written by libprune.
    """
    with damage(path, stage), pq.ParquetFile(require(path, stage), page_checksum_verification=True) as file:
        table = file.read()
        raw = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        meta, seal = decode_meta(path, raw, stage)
        _require_one_schema(file, table)
        require_digest(path, seal, _content_digest(table, meta))
        return {name: table[name].to_numpy() for name in table.column_names}, meta


def _content_digest(table: pa.Table, meta: Mapping[str, Any]) -> str:
    """The digest of the names, types and values of a table, and of its metadata."""
    digest = hashlib.sha256(text_digest(meta).encode())
    for name, chunks in zip(table.column_names, table.columns, strict=True):
        rows = pa.types.is_list(chunks.type)
        flat = pc.list_flatten(chunks) if rows else chunks
        digest.update(f"{name} {'rows of ' if rows else ''}{flat.type} {len(chunks)} {len(flat)} ".encode())
        if rows:
            digest.update(pc.list_value_length(chunks).to_numpy().tobytes())
        values = flat.to_numpy()
        digest.update(json.dumps(values.tolist()).encode() if values.dtype == object else values.tobytes())
    return digest.hexdigest()


def _require_one_schema(file: pq.ParquetFile, table: pa.Table) -> None:
    """Stop where the footer, which has no checksum, contradicts itself: it holds rows, names and types twice.

    Raises:
        ValueError: if it does, or names a type that no artifact has.
    """
    written = pa.ipc.read_schema(pa.py_buffer(b64decode(file.metadata.metadata[b"ARROW:schema"])))
    same = (written.names, written.types, file.metadata.num_rows) == (
        table.schema.names,
        table.schema.types,
        len(table),
    )
    if not same or any(map(pa.types.is_temporal, written.types)):
        raise ValueError("the footer contradicts itself")


def same_origin(path: Path, meta: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that an artifact was made from the expected model (and text).

    Raises:
        ArtifactError: if another model or text is recorded in it, or none; the message names both.
    """
    different = [key for key, value in expected.items() if meta.get(key) != value]
    for key in sorted(different, key=lambda key: (key not in {"model", "tokens"}, isinstance(expected[key], dict))):
        raise ArtifactError(
            f"{path} belongs to {key} {meta.get(key)!r}, but the current {key} is {expected[key]!r}; "
            "run `dvc repro` to make them agree"
        )


def write_architecture(layout: Layout, architecture: Architecture) -> None:
    """Write the solved description of the dense model, whole or not at all."""
    write_json(layout.architecture, sealed(json.loads(architecture.to_json())))


def read_architecture(layout: Layout) -> Architecture:
    """The solved description of the dense model.

    Raises:
        ArtifactError: if it is missing, or not one that this version reads.
    """
    path = require(layout.architecture, "prepare")
    with damage(path, "prepare"):
        content = path.read_bytes()
    try:
        architecture = Architecture.from_json(json.dumps(unsealed(path, json.loads(content))))
        know_family(architecture.own_family)
        return architecture
    except ChangedError as error:
        raise ArtifactError(f"{error}; run `dvc repro prepare`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is no description that this version of libprune reads ({cause(error)}); run `dvc repro prepare`"
        ) from error


def write_units(
    target: Path,
    architecture: Architecture,
    columns_of: Callable[[int, str], Mapping[str, NDArray[Any]]],
    meta: Mapping[str, Any],
) -> None:
    """Write a per-unit table, one row a unit in the order of `unit_index`, sums in float64.

    Args:
        target: the Parquet file.
        columns_of: the named per-unit arrays ``[units]`` of a block, by its layer and part.
        meta: metadata of the table, with the origin of the values.
    """
    blocks = [columns_of(layer, part) for layer, part in architecture.blocks()]
    columns: Columns = {name: np.concatenate([np.asarray(block[name]) for block in blocks]) for name in blocks[0]}
    write_table(target, unit_index(architecture) | columns, meta)


def read_plan(layout: Layout, architecture: Architecture) -> tuple[Plan, dict[str, Any]]:
    """The plan and its metadata.

    Raises:
        ArtifactError: if it is missing, belongs to another model or lacks a unit.
    """
    table, meta = read_table(layout.plan, "allocate")
    same_origin(layout.plan, meta, {"model": architecture.fingerprint})
    keep = column(table, "keep", str(layout.plan))
    check_rows(architecture, table, layout.plan)
    return Plan(dict(split_blocks(architecture, keep)), meta.get("width")), meta


@dataclass(frozen=True)
class Scores:
    """The importance of every unit of a model.

    Attributes:
        table: a row a unit, in the order of `libprune.engine.tables.unit_index`, with `importance`, `score` (importance
            per parameter), `cost` and the components of the criterion.
        meta: how the scores were made: `criterion`, `scaling`, `fusion`, `comparable`, `gradient_orders`, and the
            digests of the model and, where it was used, of the text.
        tokens: the digest of the calibration text beside them, whether they were made from it or not.
    """

    architecture: Architecture
    table: Columns
    meta: Mapping[str, Any]
    tokens: str | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """The digests of the model and, where a text is known, of the tokens, which all statistics must be of."""
        found = {key: self.meta[key] for key in ("model", "tokens") if key in self.meta}
        return found if self.tokens is None else found | {"tokens": self.tokens}

    def compares(self, worth: str) -> bool:
        """Whether the scores compare between layers and parts: as they are, or by the worth of their blocks.

        Args:
            worth: the value of `allocate.worth`.
        """
        return worth != "none" or (bool(self.meta["comparable"]) and self.meta["scaling"] == "none")

    def with_columns(self, columns: Columns) -> "Scores":
        """Scores whose table has these columns, new or in the place of others."""
        return replace(self, table=self.table | columns)


def read_scores(layout: Layout) -> Scores:
    """The scores that the score stage has written.

    Raises:
        ArtifactError: if they or the calibration text are missing, or they belong to another model or text.
    """
    architecture = read_architecture(layout)
    table, meta = read_table(layout.scores, "score")
    _, text = read_table(layout.calibration_tokens, "tokenize")
    origin = {"model": architecture.fingerprint, "tokens": text["tokens"]}
    same_origin(layout.calibration_tokens, text, {"model": origin["model"]})
    same_origin(layout.scores, meta, origin if "tokens" in meta else {"model": origin["model"]})
    return Scores(architecture, table, meta, text["tokens"])
