"""The tokens of a text as an artifact: sequences in a Parquet table with their digest."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from libprune.engine.errors import SourceError
from libprune.models.sequences import Sequences
from libprune.pipeline.artifacts import read_table, same_origin, write_table

Ids = NDArray[np.int64]
"""Token ids, or indices of windows."""
_COLUMNS = {"input_ids", "targets", "length"}


def write_tokens(path: Path, sequences: Sequences, meta: dict[str, Any]) -> str:
    """Write sequences with metadata; return the digest by which other artifacts name them, which is among these."""
    columns = {"input_ids": sequences.ids, "targets": sequences.targets, "length": sequences.lengths}
    arrays = {name: column.numpy() for name, column in columns.items() if column is not None}
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()[:16]
    counts = {"sequences": len(sequences), "length": sequences.ids.shape[1]}
    write_table(path, arrays, {**meta, **counts, "tokens": digest})
    return digest


def read_tokens(
    path: Path, model: str, sequences: int | None = None, stage: str = "tokenize"
) -> tuple[Sequences, dict[str, Any]]:
    """Read sequences and their metadata.

    Args:
        path: the artifact.
        model: fingerprint of the model whose tokenizer must have made the tokens.
        sequences: number of sequences to return, from the first on; None for all.
        stage: the stage that has written them, for messages.

    Raises:
        ArtifactError: if the tokens belong to another model.
        SourceError: if there are fewer sequences than asked for.
    """
    table, meta = read_table(path, stage)
    same_origin(path, meta, {"model": model})
    columns = {name: torch.from_numpy(np.stack(list(table[name])).astype(np.int64)) for name in _COLUMNS & table.keys()}
    stored = Sequences(columns["input_ids"], columns.get("targets"), columns.get("length"))
    return stored[: require_sequences(sequences, stored, path)], meta


def require_sequences(sequences: int | None, stored: Sequences, path: Path) -> int:
    """The number of sequences to use: the one asked for, or that of all stored ones if it is None.

    Raises:
        SourceError: if fewer are stored.
    """
    if sequences is not None and sequences > len(stored):
        raise SourceError(
            f"{sequences} calibration sequences are asked for, {path} holds {len(stored)}; "
            "raise tokenize.calibration_sequences"
        )
    return len(stored) if sequences is None else sequences
