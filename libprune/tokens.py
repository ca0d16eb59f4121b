"""Token windows for calibration and evaluation, from disjoint documents."""

import hashlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from libprune.artifacts import read_table, same_origin, write_table
from libprune.errors import SourceError

Ids = NDArray[np.int64]
Documents = Literal["joined", "apart"]

_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Windows:
    """The whole windows of a text.

    Attributes:
        ids: token ids, ``[windows, length]``, in the text's order.
        documents: how many they were cut from.
        skipped: documents that are shorter than a window and gave none; 0 where documents are joined.
    """

    ids: Ids
    documents: int
    skipped: int


def split_documents(documents: list[str], evaluation_share: float) -> tuple[list[str], list[str]]:
    """Documents for calibration and, from the end of the text, for evaluation."""
    cut = len(documents) - max(1, round(len(documents) * evaluation_share))
    if cut < 1:
        raise SourceError(
            f"the text has {len(documents)} document(s); two are needed to set some apart for evaluation "
            "(a text file holds one a line), or name tokenize.evaluation_text"
        )
    return documents[:cut], documents[cut:]


def windows(documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int, mode: Documents) -> Windows:
    """All whole consecutive windows, tokenized without special tokens.

    Args:
        documents: at least one.
        tokenizer: of the model.
        length: of a window, in tokens.
        mode: `joined`: of all documents with an empty line between them; `apart`: of each document by itself.
    """
    texts = [_SEPARATOR.join(documents)] if mode == "joined" else documents
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    whole = [ids[: len(ids) // length * length] for ids in encoded]
    joined = np.fromiter(chain.from_iterable(whole), dtype=np.int64)
    skipped = sum(not ids for ids in whole) if mode == "apart" else 0
    return Windows(joined.reshape(-1, length), len(documents), skipped)


def draw(available: Windows, count: int, seed: int, what: str) -> Ids:
    """A seeded sample of windows without replacement, in the text's order; their indices, ``[count]``.

    Raises:
        SourceError: if there are too few.
    """
    _require(available, count, what)
    return np.sort(np.random.default_rng(seed).choice(len(available.ids), size=count, replace=False))


def spread(available: Windows, count: int, what: str) -> Ids:
    """Windows at even distances over the whole text; their indices, ``[count]``.

    Raises:
        SourceError: if there are too few.
    """
    _require(available, count, what)
    return np.linspace(0, len(available.ids) - 1, count).round().astype(np.int64)


def _require(available: Windows, count: int, what: str) -> None:
    found, length = available.ids.shape
    if found >= count:
        return
    short = (
        f"; {available.skipped} of its {available.documents} documents are shorter than a window and were skipped "
        "(tokenize.documents: joined would use them)"
    )
    raise SourceError(
        f"{what} needs {count} windows of {length} tokens, the text gives {found} ({found * length} tokens)"
        f"{short if available.skipped else ''}; use more text, fewer or shorter windows"
    )


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
