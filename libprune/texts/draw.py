"""Calibration and evaluation windows, drawn from disjoint texts, and the record of what was drawn."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from libprune.engine.errors import SourceError
from libprune.engine.heads import HeadName
from libprune.models.sequences import Sequences
from libprune.models.tokens import Ids
from libprune.pipeline.sections import Tokenize
from libprune.texts.source import (
    SELF,
    Text,
    TextSource,
    calibration_source,
    evaluation_source,
    open_text,
    require_other_text,
)
from libprune.texts.windows import Windows, draw, split_documents, spread, windows, with_masks

MARGIN = 2
"""A stream is read until it gives so many times the windows asked for, so that there is something to draw from."""
MOST_SHARED = 0.1
"""Share of the evaluation text, in characters, that may also be documents of the calibration text: headings and set
phrases recur in any text, whole articles do not."""

EVALUATION_SEED = 0
"""Of the masked tokens of evaluation windows, which are the same for every seed of the calibration text."""

Record = dict[str, Any]
Sample = Callable[[int, int, int | None], tuple[Ids, Record]]
"""Sequences that the dense model writes, given their number, their length and a seed (None: those to evaluate on)."""


@dataclass(frozen=True)
class Drawn:
    """What the stages run the model on.

    Attributes:
        sequences: the windows.
        record: what they are and how they were drawn; docs/formats.md lists the keys.
        documents: the documents that they were cut from; none where the model wrote them.
    """

    sequences: Sequences
    record: Record
    documents: list[str]

    def sentence(self, what: str) -> str:
        """One line for the terminal."""
        (number, length), record = self.sequences.ids.shape, self.record
        if record["mode"] == "labelled":
            return (
                f"{what}: {number:,} labelled documents of up to {length:,} tokens ({self.sequences.tokens:,} tokens), "
                f"{record['cut']:,} of them cut off, of {record['documents']:,}: {record['source']}, {record['part']}"
            )
        found = f"{what}: {number:,} windows of {length:,} tokens"
        if record["mode"] == "sampled":
            return f"{found}, written by the dense model itself ({record['part']})"
        skipped = f", {record['skipped']:,} of them shorter than a window" if record["skipped"] else ""
        return (
            f"{found} ({number * length:,} tokens), of {record['available']:,} in {record['documents']:,} documents"
            f"{skipped}: {record['source']}, {record['part']}"
        )


def draw_texts(
    settings: Tokenize, tokenizer: PreTrainedTokenizerBase, sample: Sample, head: HeadName = "causal_lm"
) -> tuple[Drawn, Drawn]:
    """Calibration and evaluation windows.

    Args:
        settings: which, how many, how long.
        tokenizer: of the dense model.
        sample: writes sequences, for the text `self`.
        head: of the dense model: `causal_lm`, or `masked_lm` for windows in the tokenizer's frame with tokens masked.

    Raises:
        SourceError: if a text cannot be read, holds too little, or is in large part the other one.
    """
    reader = _Reader(settings, tokenizer, head == "masked_lm")
    other = settings.evaluation_text or settings.text
    if settings.text == SELF or other == SELF:
        calibration = _sampled(sample, settings, True) if settings.text == SELF else reader.calibration_alone()
        evaluation = _sampled(sample, settings, False) if other == SELF else reader.evaluation_alone()
    else:
        calibration, evaluation = reader.both()
    require_disjoint(calibration, evaluation)
    return calibration, evaluation


def require_disjoint(calibration: Drawn, evaluation: Drawn) -> None:
    """Stop if what is to be evaluated on is what is calibrated on, under whatever name.

    Of texts that are read, whole documents are compared. Of sampled ones, how windows begin: a model that writes the
    same again and again has nothing to be judged on.

    Raises:
        SourceError: if more than `MOST_SHARED` of the text to evaluate on is known from the text to calibrate on.
    """
    if calibration.documents and evaluation.documents:
        known = {document.strip() for document in calibration.documents}
        sizes = {True: 0, False: 0}
        for document in evaluation.documents:
            sizes[document.strip() in known] += len(document)
        shared = sizes[True] / sum(sizes.values())
    elif not calibration.documents and not evaluation.documents:
        rows, other = calibration.sequences.ids.numpy(), evaluation.sequences.ids.numpy()
        length = min(rows.shape[1], other.shape[1])
        begun = {row.tobytes() for row in rows[:, :length]}
        shared = sum(row.tobytes() in begun for row in other[:, :length]) / len(other)
    else:
        return
    if shared > MOST_SHARED:
        raise SourceError(
            f"{100 * shared:.0f} % of the text to evaluate on ({evaluation.record['source']!r}) is in the text to "
            f"calibrate on ({calibration.record['source']!r}) too; name another tokenize.evaluation_text, or take "
            "out what is repeated"
        )


class _Reader:
    """Reads documents and cuts the windows that the params ask for."""

    def __init__(self, settings: Tokenize, tokenizer: PreTrainedTokenizerBase, masks: bool) -> None:
        self._settings, self._tokenizer, self._masks = settings, tokenizer, masks

    def calibration_alone(self) -> Drawn:
        return self._whole_calibration(open_text(calibration_source(self._settings)))

    def evaluation_alone(self) -> Drawn:
        source = evaluation_source(self._settings)
        assert source is not None, "only asked for where tokenize.evaluation_text names it"
        return self._whole_evaluation(open_text(source))

    def both(self) -> tuple[Drawn, Drawn]:
        source, other = calibration_source(self._settings), evaluation_source(self._settings)
        if other is not None:
            require_other_text(source, other)
            return self._whole_calibration(open_text(source)), self._whole_evaluation(open_text(other))
        text = open_text(source)
        return self._head_and_rest(text) if source.streaming else self._first_and_last(text)

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
        """The end of a stream is not at hand, so its head is set apart; no calibration document is read from there."""
        head = self._read_evaluation(text)
        rest = self._read_calibration(text, len(head))
        return (
            self._calibration(text, rest, f"documents after the first {len(head)}"),
            self._evaluation(text, head, f"the first {len(head)} documents"),
        )

    def _read_calibration(self, text: Text, skip: int) -> list[str]:
        settings = self._settings
        if not text.source.streaming:
            return list(text.documents())
        documents = text.shuffled(skip, settings.seed)
        return self._enough(documents, settings.calibration_sequences, settings.calibration_length)

    def _read_evaluation(self, text: Text) -> list[str]:
        settings, documents = self._settings, text.documents()
        if not text.source.streaming:
            return list(documents)
        return self._enough(documents, settings.evaluation_windows, settings.evaluation_length)

    def _enough(self, documents: Iterator[str], count: int, length: int) -> list[str]:
        """As many documents as windows, then twice as many as before, until they give the windows `MARGIN` times."""
        read = list(islice(documents, count))
        while len(self._cut(read, length).ids) < MARGIN * count:
            more = list(islice(documents, len(read)))
            if not more:
                break
            read += more
        return read

    def _cut(self, documents: list[str], length: int) -> Windows:
        return windows(documents, self._tokenizer, length, self._settings.documents, framed=self._masks)

    def _calibration(self, text: Text, documents: list[str], part: str) -> Drawn:
        settings = self._settings
        available = self._cut(documents, settings.calibration_length)
        chosen = draw(available, settings.calibration_sequences, settings.seed, "calibration")
        record = self._record(text, available, chosen, part) | {"seed": settings.seed}
        return Drawn(self._asked(available.ids[chosen], settings.seed), record, documents)

    def _evaluation(self, text: Text, documents: list[str], part: str) -> Drawn:
        available = self._cut(documents, self._settings.evaluation_length)
        chosen = spread(available, self._settings.evaluation_windows, "evaluation")
        record = self._record(text, available, chosen, part)
        return Drawn(self._asked(available.ids[chosen], EVALUATION_SEED), record, documents)

    def _asked(self, ids: Ids, seed: int) -> Sequences:
        return with_masks(ids, self._tokenizer, seed) if self._masks else Sequences(torch.from_numpy(ids))

    def _record(self, text: Text, available: Windows, chosen: Ids, part: str) -> Record:
        return {
            **origin(text.source, text.revision),
            "mode": self._settings.documents,
            "part": part,
            "documents": available.documents,
            "skipped": available.skipped,
            "available": len(available.ids),
            "windows": chosen.tolist(),
        }


def origin(source: TextSource, revision: str | None) -> Record:
    """Where a text comes from; config, revision and split are null where they have no effect."""
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
