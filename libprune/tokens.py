"""Token windows for calibration and evaluation, from disjoint documents."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from libprune.artifacts import read_table, same_origin, write_table
from libprune.errors import SourceError

Ids = NDArray[np.int64]

_SEPARATOR = "\n\n"


def split_documents(documents: list[str], evaluation_share: float) -> tuple[list[str], list[str]]:
    """Documents for calibration and, from the end of the text, for evaluation."""
    cut = len(documents) - max(1, round(len(documents) * evaluation_share))
    if cut < 1:
        raise SourceError(
            f"the text has {len(documents)} document(s); two are needed to set some apart for evaluation "
            "(a text file holds one a line), or name tokenize.evaluation_text"
        )
    return documents[:cut], documents[cut:]


def windows(documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> Ids:
    """All whole consecutive windows of the joined documents; ``[windows, length]``.

    Documents are joined by an empty line and tokenized without special tokens.
    """
    ids = tokenizer(_SEPARATOR.join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // length
    return np.array(ids[: count * length], dtype=np.int64).reshape(count, length)


def draw(available: Ids, count: int, seed: int, what: str) -> Ids:
    """A seeded sample of windows without replacement, in the text's order.

    Raises:
        SourceError: if there are too few.
    """
    if len(available) < count:
        length = available.shape[1]
        raise SourceError(
            f"{what} needs {count} windows of {length} tokens, the text gives {len(available)} "
            f"({len(available) * length} tokens); use more text, fewer or shorter windows"
        )
    chosen = np.random.default_rng(seed).choice(len(available), size=count, replace=False)
    return available[np.sort(chosen)]


def spread(available: Ids, count: int, what: str) -> Ids:
    """Windows at even distances over the whole text."""
    draw(available, count, 0, what)
    return available[np.linspace(0, len(available) - 1, count).round().astype(int)]


def write_tokens(path: Path, ids: Ids, meta: dict[str, Any]) -> None:
    """Write token ids with what they are and a digest that names them in other artifacts."""
    digest = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
    counts = {"sequences": ids.shape[0], "length": ids.shape[1]}
    write_table(path, {"input_ids": ids}, {**meta, **counts, "tokens": digest})


def read_tokens(path: Path, model: str, sequences: int | None = None) -> tuple[Ids, dict[str, Any]]:
    """Token ids ``[sequences, length]`` and their metadata.

    Args:
        path: the artifact.
        model: fingerprint of the model whose tokenizer must have made them.
        sequences: how many, from the first; None for all.

    Raises:
        ArtifactError: if they belong to another model.
        SourceError: if there are fewer than asked for.
    """
    table, meta = read_table(path, "tokenize")
    same_origin(path, meta, {"model": model})
    ids = np.stack(list(table["input_ids"])).astype(np.int64)
    return ids[: require_sequences(sequences, ids, path)], meta


def require_sequences(sequences: int | None, ids: Ids, path: Path) -> int:
    """How many sequences to use: as many as asked for, or all.

    Raises:
        SourceError: if there are fewer.
    """
    if sequences is not None and sequences > len(ids):
        raise SourceError(
            f"{sequences} calibration sequences are asked for, {path} holds {len(ids)}; "
            "raise tokenize.calibration_sequences"
        )
    return len(ids) if sequences is None else sequences
