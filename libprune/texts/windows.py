"""Token windows for calibration and evaluation, from disjoint documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from libprune.engine.errors import SourceError
from libprune.models.sequences import NO_TARGET, Sequences
from libprune.models.tokens import Ids, frame_of

Documents = Literal["joined", "apart"]
"""Whether windows run over the ends of documents (`joined`), or are cut from each document alone (`apart`)."""

_SEPARATOR = "\n\n"
_PIECE = 1 << 20
"""Characters that are tokenized at once: the memory of a tokenizer grows with them, by some hundred bytes each."""


@dataclass(frozen=True)
class Windows:
    """The whole windows of a text.

    Attributes:
        ids: token ids, ``[windows, length]``, in the text's order.
        documents: number of documents that the windows were cut from.
        skipped: number of documents that are shorter than a window and gave none; 0 if documents are joined.
        tokens: number of tokens of all documents.
    """

    ids: Ids
    documents: int
    skipped: int
    tokens: int

    @property
    def shortage(self) -> str:
        """Part of a message about too few windows: how many documents gave none; empty if all gave some."""
        if not self.skipped:
            return ""
        return (
            f"; {self.skipped} of its {self.documents} documents are shorter than a window and were skipped "
            "(tokenize.documents: joined would use them)"
        )


def split_documents(documents: list[str], evaluation_share: float) -> tuple[list[str], list[str]]:
    """Split documents into those for calibration and, at the end of the text, those for evaluation.

    Raises:
        SourceError: if there are too few documents.
    """
    cut = len(documents) - max(1, round(len(documents) * evaluation_share))
    if cut < 1:
        raise SourceError(
            f"the text has {len(documents)} document(s), and tokenize.evaluation_share = {evaluation_share:g} sets all "
            "of them apart for evaluation; use a text with more documents (a text file holds one a line), a smaller "
            "share, or name tokenize.evaluation_text"
        )
    return documents[:cut], documents[cut:]


def cut_windows(documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int, mode: Documents) -> Windows:
    """Cut documents into consecutive whole windows, each in the tokens that the tokenizer puts around a text.

    Args:
        documents: at least one document.
        tokenizer: tokenizer of the model.
        length: tokens of a window, those around the text included.
        mode: `joined` cuts all documents together, with an empty line between them; `apart` cuts each by itself.

    Raises:
        SourceError: if the tokens around a text fill a window.
    """
    frame = frame_of(tokenizer)
    width = frame.room(length)
    texts = [_SEPARATOR.join(documents)] if mode == "joined" else documents
    encoded = [_encode(tokenizer, text) for text in texts]
    whole = [ids[: len(ids) // width * width] for ids in encoded]
    joined = np.concatenate(whole).astype(np.int64).reshape(-1, width)
    skipped = sum(not len(ids) for ids in whole) if mode == "apart" else 0
    return Windows(frame.around(joined), len(documents), skipped, sum(map(len, encoded)))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[np.int32]:
    """The token ids of a text, without those that stand around it, in four bytes each."""
    encoded = (tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in pieces(text))
    return np.concatenate([np.asarray(ids, dtype=np.int32) for ids in encoded])


def pieces(text: str) -> Iterator[str]:
    """A text in parts of at most `_PIECE` characters, each cut before the end of a document, or else before a space."""
    start = 0
    while len(text) - start > _PIECE:
        ends = (text.rfind(mark, start + 1, start + _PIECE) for mark in (_SEPARATOR, " "))
        end = next((place for place in ends if place > 0), start + _PIECE)
        yield text[start:end]
        start = end
    yield text[start:]


def with_masks(ids: Ids, tokenizer: PreTrainedTokenizerBase, seed: int) -> Sequences:
    """Mask `MASKED_SHARE` of the tokens of each window; these tokens are the targets.

    All targets are replaced by the mask token. In BERT's training 80 % of them were, 10 % were left and 10 % changed
    (Devlin et al. 2019); but the prediction of a token that the model sees says little.

    Args:
        ids: windows in the tokenizer's frame, ``[windows, length]``.
        tokenizer: tokenizer of the model.
        seed: seed of the choice of tokens.

    Raises:
        SourceError: if the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise SourceError("the model predicts masked tokens, but its tokenizer has no mask token")
    frame = frame_of(tokenizer)
    inner = np.arange(len(frame.before), ids.shape[1] - len(frame.after))
    number = max(1, round(MASKED_SHARE * len(inner)))
    order = np.random.default_rng(seed).random((len(ids), len(inner))).argsort(1)
    chosen = np.zeros(ids.shape, dtype=bool)
    np.put_along_axis(chosen, inner[order[:, :number]], True, axis=1)
    hidden, targets = np.where(chosen, tokenizer.mask_token_id, ids), np.where(chosen, ids, NO_TARGET)
    return Sequences(torch.from_numpy(hidden), torch.from_numpy(targets))


MASKED_SHARE = 0.15
"""Share of the tokens that are masked, as in BERT's training (Devlin et al. 2019)."""


def draw(available: Windows, count: int, seed: int, what: str) -> Ids:
    """The indices ``[count]`` of a seeded sample of windows, without replacement and in the text's order.

    Raises:
        SourceError: if there are too few windows.
    """
    _require(available, count, what)
    return at_random(len(available.ids), count, seed)


def spread(available: Windows, count: int, what: str) -> Ids:
    """The indices ``[count]`` of windows at even distances over the whole text.

    Raises:
        SourceError: if there are too few windows.
    """
    _require(available, count, what)
    return evenly(len(available.ids), count)


def training_rows(
    available: int,
    count: int,
    held_out: int,
    seed: int,
    name: str,
    shortage: str = "",
    read: Float[NDArray[Any], " available"] | None = None,
) -> Ids:
    """The indices of sequences to train on, and behind them those of the held-out ones.

    Sequences of which least was read before are held out; the last of the text where several are alike in this.

    Args:
        available: number of sequences of the text.
        count: most sequences to train on; all but the held-out ones if there are no more.
        held_out: number of held-out sequences.
        seed: seed of the choice.
        name: the name of the text, for the message.
        shortage: what else the message says of too few sequences.
        read: the share of each sequence that the statistics or the repair have read; None: nothing.

    Raises:
        SourceError: if the text has too few sequences for both.
    """
    rest = available - held_out
    if rest < 1:
        raise SourceError(
            f"the text to train on, {name!r}, gives {available} sequences, of which {held_out} are held out to choose "
            f"the best step{shortage}; use more text, or lower recover.held_out or recover.length"
        )
    order = np.arange(available)[::-1]
    if read is not None:
        order = order[np.argsort(read[order], kind="stable")]
    last, others = np.sort(order[:held_out]), np.sort(order[held_out:])
    return np.concatenate([others[at_random(rest, min(count, rest), seed)], last])


def at_random(available: int, count: int, seed: int) -> Ids:
    """`count` different indices below `available`, ascending, drawn with a seed."""
    return np.sort(np.random.default_rng(seed).choice(available, size=count, replace=False))


def evenly(available: int, count: int) -> Ids:
    """`count` indices below `available`, at even distances from the first to the last."""
    return np.linspace(0, available - 1, count).round().astype(np.int64)


def _require(available: Windows, count: int, what: str) -> None:
    number, length = available.ids.shape
    if number < count:
        raise SourceError(
            f"{what} needs {count} windows of {length} tokens, the text gives {number} ({number * length} tokens)"
            f"{available.shortage}; use more text, fewer or shorter windows"
        )
