"""Labelled documents for models that classify sequences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from libprune.engine.errors import SourceError
from libprune.models.sequences import Sequences
from libprune.models.tokens import Ids
from libprune.pipeline.sections import Tokenize
from libprune.texts.draw import Drawn, TextProvenance, require_disjoint, source_provenance
from libprune.texts.source import SELF, TextSource, calibration_source, evaluation_source, open_text, require_other_text
from libprune.texts.windows import at_random, evenly

Example = tuple[str, int]
"""A document and its label, as the model numbers it."""


def draw_examples(
    settings: Tokenize, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> tuple[Drawn, Drawn]:
    """Draw labelled sequences for calibration and evaluation: one document each, with the tokenizer's special tokens.

    A document that is longer than the params allow is cut off; shorter ones stay as they are. If one text serves both,
    documents at even distances are held out for evaluation, since data sets may be in the order of their labels.

    Args:
        settings: the texts, and the number and length of sequences.
        tokenizer: tokenizer of the dense model.
        config: config of the dense model, which names the labels.

    Raises:
        SourceError: if a text cannot be read, has no label or too few documents, or is in large part the other one.
    """
    column = settings.label_column or "label"
    source, other = calibration_source(settings, column), evaluation_source(settings, column)
    if SELF in (settings.text, settings.evaluation_text) or source.streaming:
        what = "is streamed" if source.streaming else "has no labels"
        raise SourceError(f"the text {settings.text!r} {what}; a model that tells classes apart needs a labelled text")
    (examples, revision), parts = _read(source, config), ("all documents", "all documents")
    if other is None:
        rows = _evenly(len(examples), max(1, round(len(examples) * settings.evaluation_share)))
        held_out, rest = [examples[i] for i in rows], [examples[i] for i in np.delete(np.arange(len(examples)), rows)]
        parts = f"{len(rest)} documents", f"{len(held_out)} documents at even distances"
        other, held_revision = source, revision
    else:
        require_other_text(source, other)
        (held_out, held_revision), rest = _read(other, config), examples
    _require(len(rest), settings.calibration_sequences, "calibration")
    chosen = at_random(len(rest), settings.calibration_sequences, settings.seed)
    where = source_provenance(source, revision) | {
        "label_column": source.label,
        "part": parts[0],
        "seed": settings.seed,
    }
    calibration = _drawn(rest, chosen, settings.calibration_length, tokenizer, where)
    where = source_provenance(other, held_revision) | {"label_column": other.label, "part": parts[1]}
    chosen = _evenly(len(held_out), settings.evaluation_windows)
    evaluation = _drawn(held_out, chosen, settings.evaluation_length, tokenizer, where)
    require_disjoint(calibration, evaluation)
    return calibration, evaluation


def _read(source: TextSource, config: PreTrainedConfig) -> tuple[list[Example], str | None]:
    """Read the examples of a text, and the commit that it was read at."""
    text = open_text(source)
    return [(document, _label(value, config, source)) for document, value in text.examples()], text.revision


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
        raise SourceError(f"{what} needs {count} labelled documents, the text gives {available}; use fewer")


def _drawn(
    examples: Sequence[Example],
    chosen: Ids,
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    where: TextProvenance,
) -> Drawn:
    texts = [examples[i][0] for i in chosen]
    rows: list[list[int]] = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id or 0)
    for row, filled in zip(rows, ids, strict=True):
        filled[: len(row)] = torch.tensor(row)
    targets = torch.tensor([examples[i][1] for i in chosen])
    how = {
        **where,
        "mode": "labelled",
        "documents": len(examples),
        "skipped": 0,
        "cut": sum(len(row) == length for row in rows),
        "available": len(examples),
        "windows": chosen.tolist(),
    }
    sequences = Sequences(ids, targets, torch.tensor([len(row) for row in rows]))
    return Drawn(sequences, how, [document for document, _ in examples])
