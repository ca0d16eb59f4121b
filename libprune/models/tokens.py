"""The tokens of a text: what a tokenizer puts around it, and sequences as an artifact with their digest."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from libprune.engine.errors import SourceError
from libprune.models.sequences import Sequences
from libprune.pipeline.artifacts import read_table, same_origin, write_table

Ids = NDArray[np.int64]
"""Token ids, or indices of windows."""
_COLUMNS = {"input_ids", "targets", "length"}


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts around a text, such as one at its beginning.

    Attributes:
        before: their ids before the text.
        after: their ids behind it.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]

    def room(self, length: int) -> int:
        """The tokens of text in a window of `length` tokens.

        Raises:
            SourceError: if there is no room for any.
        """
        around = len(self.before) + len(self.after)
        if length <= around:
            raise SourceError(
                f"windows of {length} tokens have no room beside the {around} that the tokenizer puts around every "
                "text; raise tokenize.calibration_length, tokenize.repair_length, tokenize.evaluation_length or "
                "recover.length"
            )
        return length - around

    def around(self, ids: Ids) -> Ids:
        """Windows ``[windows, length]`` with the frame around each."""
        sides = (np.tile(np.array(side, dtype=np.int64), (len(ids), 1)) for side in (self.before, self.after))
        return np.concatenate([next(sides), ids, next(sides)], axis=1)

    def record(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
        """The tokens themselves, as the metadata of sequences hold them."""
        sides = {"before": self.before, "after": self.after}
        return {name: list(tokenizer.convert_ids_to_tokens(list(ids))) for name, ids in sides.items()}


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The special tokens that a tokenizer puts around a text, by what it does to one.

    Raises:
        SourceError: if it does not leave the tokens of a text together.
    """
    inner: list[int] = []
    for text in ("a", *tokenizer.get_vocab()):  # a tokenizer without a token for what it does not know may drop it
        inner = tokenizer(text, add_special_tokens=False)["input_ids"]
        if inner:
            break
    whole: list[int] = tokenizer(text)["input_ids"]
    for start in range(len(whole) - len(inner) + 1):
        if inner and whole[start : start + len(inner)] == inner:
            return Frame(tuple(whole[:start]), tuple(whole[start + len(inner) :]))
    raise SourceError(f"the tokenizer makes of a text the tokens {whole}, which do not hold those of the text, {inner}")


def require_known(sequences: Sequences, size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop if the model has no embedding for a token.

    Args:
        sequences: the sequences that it will be run on.
        size: the number of rows of the embedding.
        tokenizer: the tokenizer that made them.

    Raises:
        SourceError: naming the token.
    """
    ids = sequences.ids
    if sequences.lengths is not None:
        ids = ids[torch.arange(ids.shape[1]) < sequences.lengths[:, None]]
    if sequences.targets is not None and sequences.targets.ndim == 2:
        ids = torch.cat([ids.flatten(), sequences.targets.flatten()])
    if len(ids) and (last := int(ids.max())) >= size:
        raise SourceError(
            f"the tokenizer has the token {tokenizer.convert_ids_to_tokens(last)!r} with the id {last}, but the model "
            f"has embeddings for the ids 0 to {size - 1} alone; give the model the tokenizer that it was trained with, "
            "or an embedding for each of its tokens"
        )


def write_tokens(path: Path, sequences: Sequences, meta: dict[str, Any]) -> str:
    """Write sequences with metadata; return the digest by which other artifacts name them, which is among these."""
    columns = {"input_ids": sequences.ids, "targets": sequences.targets, "length": sequences.lengths}
    arrays = {name: column.numpy() for name, column in columns.items() if column is not None}
    known = [array.tobytes() for array in arrays.values()] + [(sequences.pooling or "").encode()]
    digest = hashlib.sha256(b"".join(known)).hexdigest()[:16]
    counts = {"sequences": len(sequences), "length": sequences.ids.shape[1]}
    pooling = {"pooling": sequences.pooling} if sequences.pooling else {}
    write_table(path, arrays, {**meta, **counts, **pooling, "tokens": digest})
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
    stored = Sequences(columns["input_ids"], columns.get("targets"), columns.get("length"), meta.get("pooling"))
    return stored[: require_sequences(sequences, stored, path)], meta


def require_sequences(sequences: int | None, stored: Sequences, path: Path) -> int:
    """The number of sequences to use: the one asked for, or that of all stored ones if it is None.

    Raises:
        SourceError: if fewer are stored.
    """
    if sequences is not None and sequences > len(stored):
        raise SourceError(
            f"{sequences} {path.stem} sequences are asked for, {path} holds {len(stored)}; "
            f"raise tokenize.{path.stem}_sequences"
        )
    return len(stored) if sequences is None else sequences
