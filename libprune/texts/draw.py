"""Calibration and evaluation windows, drawn from disjoint texts, and the provenance of each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from libprune.engine.errors import SourceError
from libprune.engine.heads import HeadName
from libprune.models.sequences import Sequences, joined
from libprune.models.tokens import Ids, frame_of
from libprune.pipeline.sections import Tokenize
from libprune.texts.chosen import (
    SELF,
    TextSource,
    calibration_source,
    evaluation_source,
    only_text,
    require_other_text,
)
from libprune.texts.shares import judging, judging_shares, mixed, named, parts_of, rows_of, shares_of
from libprune.texts.source import Text, chat_writer, open_text
from libprune.texts.windows import Windows, cut_windows, draw, split_documents, spread, training_rows, with_masks

MARGIN = 2
"""A stream is read until it gives twice the windows that are asked for, so that there is a choice to draw from."""
MOST_SHARED = 0.1
"""The largest share of the evaluation text, in characters, whose documents may also be in the calibration text:
headings and set phrases recur in any text, whole articles do not."""

EVALUATION_SEED = 0
"""The seed of masked tokens in evaluation windows, which are the same for every seed of the calibration text."""

TextProvenance = dict[str, Any]
"""How a text was drawn, as it stands in the metadata of its tokens; docs/formats.md lists the keys."""
Read = Callable[[Sequence[Ids]], Float[NDArray[np.float64], " rows"]]
"""A function that gives the share of each of some rows of tokens that the statistics or the repair have read."""
Sample = Callable[[int, int, int | None], tuple[Ids, TextProvenance]]
"""A function that lets the dense model write sequences, by number, length and seed (None for evaluation sequences)."""


@dataclass(frozen=True)
class Drawn:
    """Windows that the model is run on, and where they come from.

    Attributes:
        sequences: the windows.
        provenance: how they were drawn.
        documents: the documents that they were cut from; empty if the model wrote them.
        read: what was read, in words; empty if the model wrote them.
        parts: what was drawn from each text, if there are several.
    """

    sequences: Sequences
    provenance: TextProvenance
    documents: list[str]
    read: str = ""
    parts: tuple["Drawn", ...] = ()

    def sentences(self, what: str) -> list[str]:
        """Lines for the terminal that say what was drawn, with one for each of several texts.

        Args:
            what: `calibration`, `repair` or `evaluation`.
        """
        parts = (part.sentence(f"{what}, text {number}") for number, part in enumerate(self.parts, 1))
        return [self.sentence(what), *parts]

    def sentence(self, what: str) -> str:
        """The first of these lines, which is about all texts."""
        (number, length), how = self.sequences.ids.shape, self.provenance
        if how["mode"] == "labelled":
            return (
                f"{what}: {number:,} labelled documents of up to {length:,} tokens ({self.sequences.tokens:,} tokens), "
                f"{how['cut']:,} of them that long or cut off, of {how['documents']:,}: {how['source']}, "
                f"{how['part']}; {self.read}"
            )
        drawn = f"{what}: {number:,} windows of {length:,} tokens"
        if how["mode"] == "sampled":
            return f"{drawn}, written by the dense model itself ({how['part']})"
        if how["mode"] == "mixed":
            return f"{drawn} ({number * length:,} tokens), from {how['source']}"
        skipped = f", {how['skipped']:,} of them shorter than a window" if how["skipped"] else ""
        return (
            f"{drawn} ({number * length:,} tokens), of {how['available']:,} in {how['documents']:,} documents"
            f"{skipped}: {how['source']}, {how['part']}; {self.read}"
        )


def draw_texts(
    settings: Tokenize, tokenizer: PreTrainedTokenizerBase, sample: Sample, head: HeadName = "causal_lm"
) -> tuple[Drawn, Drawn]:
    """Draw calibration and evaluation windows.

    Args:
        settings: the texts, one or several of each, and the number and length of windows.
        tokenizer: tokenizer of the dense model.
        sample: writes sequences, for the text `self`.
        head: head of the dense model: `causal_lm`, or `masked_lm` for windows with masked tokens.

    Raises:
        SourceError: if a text cannot be read, holds too little, or is in large part the other one.
    """
    texts, masks = shares_of(settings.text), head == "masked_lm"
    shares = [one.share for one in texts]
    readers = [_Reader(part, tokenizer, masks, len(texts) > 1) for part in parts_of(settings)]
    if settings.evaluation_text is None:
        pairs = [reader.both(sample) for reader in readers]
        calibrations = [calibration for calibration, _ in pairs]
        evaluations = [evaluation for _, evaluation in pairs if evaluation is not None]
    else:
        judge = judging(settings)
        _require_other_texts(parts_of(settings), judge)
        calibrations = [reader.calibration(sample) for reader in readers]
        evaluations = [_Reader(judge, tokenizer, masks).evaluation(sample)]
    require_disjoint(calibrations, evaluations)
    judged = [share for share in judging_shares(texts) if share]
    return _mixed(calibrations, shares, settings.seed), _mixed(evaluations, judged, EVALUATION_SEED)


def _require_other_texts(parts: Sequence[Tokenize], judge: Tokenize) -> None:
    other = None if judge.evaluation_text == SELF else evaluation_source(judge)
    for part in parts:
        if other is not None and part.text != SELF:
            require_other_text(calibration_source(part), other)


def _mixed(parts: Sequence[Drawn], shares: Sequence[float], seed: int) -> Drawn:
    """The windows of several texts in one order, as `mixed` gives it; those of a single text as they are."""
    if len(parts) == 1:
        return parts[0]
    counts = [len(part.sequences) for part in parts]
    order = mixed(counts, seed)
    given = list(zip(parts, shares, rows_of(order, counts), strict=True))
    how = {
        "source": named([(part.provenance["source"], share) for part, share, _ in given]),
        "mode": "mixed",
        "part": f"{len(parts)} texts",
        "frame": parts[0].provenance["frame"],
        "sources": [part.provenance | {"share": share, "rows": rows.tolist()} for part, share, rows in given],
    }
    how |= {"seed": seed} if "seed" in parts[0].provenance else {}
    sequences = joined(part.sequences for part in parts)[torch.from_numpy(order)]
    return Drawn(sequences, how, [one for part in parts for one in part.documents], parts=tuple(parts))


def draw_training_windows(
    settings: Tokenize,
    tokenizer: PreTrainedTokenizerBase,
    head: HeadName,
    held_out: int,
    whole: bool,
    read: Read,
) -> tuple[Drawn, Ids]:
    """Draw windows to train on from a text, and behind them those that are held out.

    Args:
        settings: the text, the most windows to train on as `calibration_sequences`, and their length.
        tokenizer: tokenizer of the dense model.
        head: head of the dense model.
        held_out: number of held-out windows.
        whole: whether all documents may be used; else those that calibration windows are drawn from.
        read: the share of each window that was read before; windows of which least was read are held out.

    Returns:
        The windows, and the token ids ``[windows, length]`` of all windows that they were drawn from.

    Raises:
        SourceError: if the text cannot be read or holds too little.
    """
    return _Reader(settings, tokenizer, head == "masked_lm").training(held_out, whole, read)


def require_disjoint(calibrations: Sequence[Drawn], evaluations: Sequence[Drawn]) -> None:
    """Stop if a text to evaluate on is also in the calibration text, under whatever name.

    For texts that are read, whole documents are compared. For texts that the model wrote, the beginnings of windows are
    compared: a model that writes the same again and again gives no evaluation text.

    Args:
        calibrations: what was drawn from each calibration text.
        evaluations: what was drawn from each text to evaluate on; each is compared with all calibration texts together.

    Raises:
        SourceError: if more than `MOST_SHARED` of a text to evaluate on is in the calibration text.
    """
    known = {document.strip() for one in calibrations for document in one.documents}
    written = [one.sequences.ids.numpy() for one in calibrations if not one.documents]
    for one in evaluations:
        shared = _shared_documents(known, one.documents) if one.documents else _shared_beginnings(written, one)
        if shared > MOST_SHARED:
            names = ", ".join(repr(other.provenance["source"]) for other in calibrations)
            raise SourceError(
                f"{100 * shared:.0f} % of the text to evaluate on ({one.provenance['source']!r}) is in the text to "
                f"calibrate on ({names}) too; name another tokenize.evaluation_text, or take out what is repeated"
            )


def _shared_documents(known: set[str], documents: list[str]) -> float:
    """The share of documents that are known, in characters."""
    sizes = {True: 0, False: 0}
    for document in documents:
        sizes[document.strip() in known] += len(document)
    return sizes[True] / sum(sizes.values())


def _shared_beginnings(written: Sequence[Ids], evaluation: Drawn) -> float:
    """The share of windows that begin as one of those that were written for the calibration, of the same length."""
    other, shared = evaluation.sequences.ids.numpy(), np.zeros(len(evaluation.sequences), dtype=bool)
    for rows in written:
        length = min(rows.shape[1], other.shape[1])
        begun = {row.tobytes() for row in rows[:, :length]}
        shared |= [row.tobytes() in begun for row in other[:, :length]]
    return float(shared.mean())


class _Reader:
    """Reads the documents of one text, or lets the model write it, and cuts the windows that the params ask for."""

    def __init__(
        self, settings: Tokenize, tokenizer: PreTrainedTokenizerBase, masks: bool, several: bool = False
    ) -> None:
        self._settings, self._tokenizer, self._masks = settings, tokenizer, masks
        self._chat = chat_writer(tokenizer)
        self._of = f" of {only_text(settings)!r}" if several else ""

    def calibration(self, sample: Sample) -> Drawn:
        if self._settings.text == SELF:
            return _sampled(sample, self._settings, True)
        return self._whole_calibration(self._open(calibration_source(self._settings)))

    def evaluation(self, sample: Sample) -> Drawn:
        if self._settings.evaluation_text == SELF:
            return _sampled(sample, self._settings, False)
        source = evaluation_source(self._settings)
        assert source is not None, "only asked for where tokenize.evaluation_text names it"
        return self._whole_evaluation(self._open(source))

    def both(self, sample: Sample) -> tuple[Drawn, Drawn | None]:
        """Windows of both kinds from one text; none to evaluate on from text that is written beside others."""
        if self._settings.text == SELF:
            written = _sampled(sample, self._settings, True)
            return written, _sampled(sample, self._settings, False) if self._settings.evaluation_windows else None
        source, other = calibration_source(self._settings), evaluation_source(self._settings)
        if other is not None:
            require_other_text(source, other)
            return self._whole_calibration(self._open(source)), self._whole_evaluation(self._open(other))
        text = self._open(source)
        return self._head_and_rest(text) if source.streaming else self._first_and_last(text)

    def _open(self, source: TextSource) -> Text:
        return open_text(source, self._chat)

    def training(self, held_out: int, whole: bool, read_before: Read) -> tuple[Drawn, Ids]:
        settings, text = self._settings, self._open(calibration_source(self._settings))
        documents, part = self._training_documents(text, held_out, whole)
        available = self._cut(documents, settings.calibration_length)
        number, count, name = len(available.ids), settings.calibration_sequences, text.source.name
        before = read_before(list(available.ids))
        chosen = training_rows(number, count, held_out, settings.seed, name, available.shortage, before)
        how = self._provenance(text, available, chosen, part) | {"seed": settings.seed}
        read = text.told(documents, available.tokens)
        return Drawn(self._asked(available.ids[chosen], settings.seed), how, documents, read), available.ids

    def _training_documents(self, text: Text, held_out: int, whole: bool) -> tuple[list[str], str]:
        if whole or evaluation_source(self._settings) is not None:
            return self._read_calibration(text, 0, held_out), "all documents"
        if text.source.streaming:
            skipped = len(self._read_evaluation(text))
            return self._read_calibration(text, skipped, held_out), f"documents after the first {skipped}"
        first, _ = split_documents(list(text.documents()), self._settings.evaluation_share)
        return first, f"the first {len(first)} documents"

    def _whole_calibration(self, text: Text) -> Drawn:
        return self._calibration(text, self._read_calibration(text, 0), "all documents")

    def _whole_evaluation(self, text: Text) -> Drawn:
        return self._evaluation(text, self._read_evaluation(text), "all documents")

    def _first_and_last(self, text: Text) -> tuple[Drawn, Drawn]:
        documents = list(text.documents())
        first, last = split_documents(documents, self._settings.evaluation_share)
        return (
            self._calibration(text, first, f"the first {len(first)} documents"),
            self._evaluation(text, last, f"the last {len(last)} documents"),
        )

    def _head_and_rest(self, text: Text) -> tuple[Drawn, Drawn]:
        """Hold out the beginning of a stream, whose end is not at hand; calibration documents are read behind it."""
        head = self._read_evaluation(text)
        rest = self._read_calibration(text, len(head))
        return (
            self._calibration(text, rest, f"documents after the first {len(head)}"),
            self._evaluation(text, head, f"the first {len(head)} documents"),
        )

    def _read_calibration(self, text: Text, skip: int, held_out: int = 0) -> list[str]:
        settings = self._settings
        if not text.source.streaming:
            return list(text.documents())
        documents = text.shuffled(skip, settings.seed)
        return self._enough(documents, settings.calibration_sequences + held_out, settings.calibration_length)

    def _read_evaluation(self, text: Text) -> list[str]:
        settings, documents = self._settings, text.documents()
        if not text.source.streaming:
            return list(documents)
        return self._enough(documents, settings.evaluation_windows, settings.evaluation_length)

    def _enough(self, documents: Iterator[str], count: int, length: int) -> list[str]:
        """Read as many documents as windows, then double their number until they give `MARGIN` times the windows."""
        read = list(islice(documents, count))
        while len(self._cut(read, length).ids) < MARGIN * count:
            more = list(islice(documents, len(read)))
            if not more:
                break
            read += more
        return read

    def _cut(self, documents: list[str], length: int) -> Windows:
        return cut_windows(documents, self._tokenizer, length, self._settings.documents)

    def _calibration(self, text: Text, documents: list[str], part: str) -> Drawn:
        settings = self._settings
        available = self._cut(documents, settings.calibration_length)
        chosen = draw(available, settings.calibration_sequences, settings.seed, f"calibration{self._of}")
        how = self._provenance(text, available, chosen, part) | {"seed": settings.seed}
        read = text.told(documents, available.tokens)
        return Drawn(self._asked(available.ids[chosen], settings.seed), how, documents, read)

    def _evaluation(self, text: Text, documents: list[str], part: str) -> Drawn:
        available = self._cut(documents, self._settings.evaluation_length)
        chosen = spread(available, self._settings.evaluation_windows, f"evaluation{self._of}")
        how = self._provenance(text, available, chosen, part)
        read = text.told(documents, available.tokens)
        return Drawn(self._asked(available.ids[chosen], EVALUATION_SEED), how, documents, read)

    def _asked(self, ids: Ids, seed: int) -> Sequences:
        return with_masks(ids, self._tokenizer, seed) if self._masks else Sequences(torch.from_numpy(ids))

    def _provenance(self, text: Text, available: Windows, chosen: Ids, part: str) -> TextProvenance:
        return {
            **source_provenance(text.source, text.revision),
            "mode": self._settings.documents,
            "part": part,
            "documents": available.documents,
            "skipped": available.skipped,
            "available": len(available.ids),
            "windows": chosen.tolist(),
            "frame": frame_of(self._tokenizer).record(self._tokenizer),
        }


def source_provenance(source: TextSource, revision: str | None) -> TextProvenance:
    """The source of a text as part of its provenance; config and split are None for local files."""
    hub = revision is not None
    return {
        "source": source.name,
        "data_set": source.data_set,
        "config": source.config if hub else None,
        "revision": revision,
        "split": source.split if hub else None,
        "column": source.column,
        "streaming": source.streaming,
    }


def _sampled(sample: Sample, settings: Tokenize, calibration: bool) -> Drawn:
    if calibration:
        ids, how = sample(settings.calibration_sequences, settings.calibration_length, settings.seed)
        part = {"part": f"seed {settings.seed}", "seed": settings.seed}
    else:
        ids, how = sample(settings.evaluation_windows, settings.evaluation_length, None)
        part = {"part": "samples of their own, which no seed of the calibration gives"}
    return Drawn(Sequences(torch.from_numpy(ids)), {"source": SELF, "mode": "sampled", **part, **how}, [])
