"""Labelled documents for models that classify sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from libprune.engine.errors import SourceError
from libprune.models.sequences import Sequences
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
from libprune.texts.draw import Drawn, Read, TextProvenance, require_disjoint, source_provenance
from libprune.texts.source import Text, open_text
from libprune.texts.windows import at_random, evenly, training_rows

Example = tuple[str, int]
"""A document and its label, as the model numbers it."""


def draw_examples(
    settings: Tokenize, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> tuple[Drawn, Drawn]:
    """Draw labelled sequences for calibration and evaluation: one document each, with the tokenizer's special tokens.

    A document that is longer than the params allow is cut off; shorter ones stay as they are. If one text serves both,
    documents at even distances are held out for evaluation, since data sets may be in the order of their labels.

    Args:
        settings: the texts, one of each, and the number and length of sequences.
        tokenizer: tokenizer of the dense model.
        config: config of the dense model, which names the labels.

    Raises:
        SourceError: if a text cannot be read, has no label or too few documents, or is in large part the other one.
    """
    rest, held_out = _read_both(settings, config)
    _require(len(rest.examples), settings.calibration_sequences, "calibration")
    chosen = at_random(len(rest.examples), settings.calibration_sequences, settings.seed)
    calibration = _drawn(rest, chosen, settings.calibration_length, tokenizer, {"seed": settings.seed})
    chosen = _evenly(len(held_out.examples), settings.evaluation_windows)
    evaluation = _drawn(held_out, chosen, settings.evaluation_length, tokenizer, {})
    require_disjoint([calibration], [evaluation])
    return calibration, evaluation


def draw_training_examples(
    settings: Tokenize,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    held_out: int,
    whole: bool,
    read: Read,
) -> Drawn:
    """Draw labelled sequences to train on from the calibration documents, and behind them those that are held out.

    Args:
        settings: the text, the most sequences to train on as `calibration_sequences`, and their length.
        tokenizer: tokenizer of the dense model.
        config: config of the dense model, which names the labels.
        held_out: number of held-out sequences.
        whole: whether all documents may be used; else those that calibration sequences are drawn from.
        read: the share of each document that was read before; documents of which least was read are held out.

    Raises:
        SourceError: if the text cannot be read, has no label or too few documents.
    """
    whole = whole or evaluation_source(settings) is not None
    rest = _read_whole(settings, config) if whole else _read_both(settings, config)[0]
    shuffled = np.random.default_rng(settings.seed).permutation(len(rest.examples))  # may be in the order of labels
    number, count = len(shuffled), settings.calibration_sequences
    cut = tokenizer([rest.examples[i][0] for i in shuffled], truncation=True, max_length=settings.calibration_length)
    before = read(list(map(np.array, cut["input_ids"])))
    chosen = shuffled[training_rows(number, count, held_out, settings.seed, only_text(settings), read=before)]
    return _drawn(rest, chosen, settings.calibration_length, tokenizer, {"seed": settings.seed})


@dataclass(frozen=True)
class _Part:
    """Labelled documents of a text, and where they come from."""

    examples: Sequence[Example]
    text: Text
    where: TextProvenance


def _read_whole(settings: Tokenize, config: PreTrainedConfig) -> _Part:
    """All documents of the calibration text."""
    source = calibration_source(settings, settings.label_column or "label")
    _require_labels(source, source.name)
    return _part(*_read(source, config), "all documents")


def _read_both(settings: Tokenize, config: PreTrainedConfig) -> tuple[_Part, _Part]:
    """The documents for calibration and those for evaluation."""
    column = settings.label_column or "label"
    source, other = calibration_source(settings, column), evaluation_source(settings, column)
    _require_labels(source, source.name, settings.evaluation_text)
    if other is not None:
        require_other_text(source, other)
        return _read_whole(settings, config), _part(*_read(other, config), "all documents")
    examples, text = _read(source, config)
    rows = _evenly(len(examples), max(1, round(len(examples) * settings.evaluation_share)))
    held_out, rest = [examples[i] for i in rows], [examples[i] for i in np.delete(np.arange(len(examples)), rows)]
    return (
        _part(rest, text, f"{len(rest)} documents"),
        _part(held_out, text, f"{len(held_out)} documents at even distances"),
    )


def _require_labels(source: TextSource, *names: str | None) -> None:
    if SELF in names or source.streaming:
        name, what = (SELF, "has no labels") if SELF in names else (names[0], "is streamed")
        raise SourceError(f"the text {name!r} {what}; a model that tells classes apart needs a labelled text")


def _part(examples: Sequence[Example], text: Text, part: str) -> _Part:
    where = source_provenance(text.source, text.revision) | {"label_column": text.source.label, "part": part}
    return _Part(examples, text, where)


def _read(source: TextSource, config: PreTrainedConfig) -> tuple[list[Example], Text]:
    """Read the examples of a text."""
    text = open_text(source)
    return [(document, _label(value, config, source)) for document, value in text.examples()], text


def _label(value: Any, config: PreTrainedConfig, source: TextSource) -> int:
    """The number that the model gives to a label, which is a whole number of any type or a name in its config."""
    names: Mapping[str, int] = config.label2id or {}
    if isinstance(value, str) and value in names:
        return int(names[value])
    if isinstance(value, str):
        number = int(value) if value.isdecimal() else -1
    else:
        number = int(value) if isinstance(value, int | float) and float(value).is_integer() else -1
    if not 0 <= number < config.num_labels:
        known = f"0 to {config.num_labels - 1}" + (f" or {', '.join(map(str, names))}" if names else "")
        raise SourceError(
            f"column {source.label!r} of text {source.name!r} holds {value!r}, no label of the model ({known}); a "
            "test split often hides its labels: name another split"
        )
    return number


def _evenly(available: int, count: int) -> Ids:
    _require(available, count, "evaluation")
    return evenly(available, count)


def _require(available: int, count: int, what: str) -> None:
    if available < count:
        raise SourceError(
            f"{what} needs {count} labelled documents, the text gives {available}; use fewer, more text, or another "
            "tokenize.evaluation_share"
        )


def _drawn(part: _Part, chosen: Ids, length: int, tokenizer: PreTrainedTokenizerBase, more: TextProvenance) -> Drawn:
    texts = [part.examples[i][0] for i in chosen]
    rows: list[list[int]] = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id or 0)
    for row, filled in zip(rows, ids, strict=True):
        filled[: len(row)] = torch.tensor(row)
    targets = torch.tensor([part.examples[i][1] for i in chosen])
    how = {
        **part.where,
        **more,
        "mode": "labelled",
        "documents": len(part.examples),
        "skipped": 0,
        "cut": sum(len(row) == length for row in rows),
        "available": len(part.examples),
        "windows": chosen.tolist(),
        "frame": frame_of(tokenizer).record(tokenizer),
    }
    sequences = Sequences(ids, targets, torch.tensor([len(row) for row in rows]))
    documents = [document for document, _ in part.examples]
    return Drawn(sequences, how, documents, part.text.told(documents, None))
