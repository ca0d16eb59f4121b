"""Examples with a label each, for models that tell classes apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from libprune.engine.errors import SourceError
from libprune.models.sequences import Sequences
from libprune.models.tokens import Ids
from libprune.pipeline.sections import Tokenize
from libprune.texts.draw import Drawn, origin, require_disjoint
from libprune.texts.source import SELF, TextSource, calibration_source, evaluation_source, open_text, require_other_text
from libprune.texts.windows import at_random, evenly

Example = tuple[str, int]


def draw_examples(
    settings: Tokenize, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig
) -> tuple[Drawn, Drawn]:
    """Labelled sequences to calibrate on and to evaluate on: one document each, with the tokenizer's special tokens.

    A document that is longer than the params allow is cut off; shorter ones stay as they are. Where one text serves
    both, every so-manieth document of it is set apart for evaluation, since data sets may be in the order of their
    labels.

    Args:
        settings: which, how many, how long.
        tokenizer: of the dense model.
        config: of the dense model; names the labels.

    Raises:
        SourceError: if a text cannot be read, has no label or too few documents, or is in large part the other one.
    """
    column = settings.label_column or "label"
    source, other = calibration_source(settings, column), evaluation_source(settings, column)
    if SELF in (settings.text, settings.evaluation_text) or source.streaming:
        what = "is streamed" if source.streaming else "has no labels"
        raise SourceError(f"the text {settings.text!r} {what}; a model that tells classes apart needs a labelled text")
    (found, revision), parts = _read(source, config), ("all documents", "all documents")
    if other is None:
        apart = _evenly(len(found), max(1, round(len(found) * settings.evaluation_share)))
        held, rest = [found[i] for i in apart], [found[i] for i in np.delete(np.arange(len(found)), apart)]
        parts = f"{len(rest)} documents", f"{len(held)} documents at even distances"
        other, held_revision = source, revision
    else:
        require_other_text(source, other)
        (held, held_revision), rest = _read(other, config), found
    _require(len(rest), settings.calibration_sequences, "calibration")
    chosen = at_random(len(rest), settings.calibration_sequences, settings.seed)
    where = origin(source, revision) | {"label_column": source.label, "part": parts[0], "seed": settings.seed}
    calibration = _drawn(rest, chosen, settings.calibration_length, tokenizer, where)
    where = origin(other, held_revision) | {"label_column": other.label, "part": parts[1]}
    chosen = _evenly(len(held), settings.evaluation_windows)
    evaluation = _drawn(held, chosen, settings.evaluation_length, tokenizer, where)
    require_disjoint(calibration, evaluation)
    return calibration, evaluation


def _read(source: TextSource, config: PreTrainedConfig) -> tuple[list[Example], str | None]:
    """The examples of a text, and the commit that it was read at."""
    text = open_text(source)
    return [(document, _label(value, config, source)) for document, value in text.examples()], text.revision


def _label(value: Any, config: PreTrainedConfig, source: TextSource) -> int:
    """A label as the model numbers it: a whole number of any type, or a name that its config knows."""
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
    where: Mapping[str, Any],
) -> Drawn:
    texts = [examples[i][0] for i in chosen]
    rows: list[list[int]] = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id or 0)
    for row, filled in zip(rows, ids, strict=True):
        filled[: len(row)] = torch.tensor(row)
    targets = torch.tensor([examples[i][1] for i in chosen])
    record = {
        **where,
        "mode": "labelled",
        "documents": len(examples),
        "skipped": 0,
        "cut": sum(len(row) == length for row in rows),
        "available": len(examples),
        "windows": chosen.tolist(),
    }
    sequences = Sequences(ids, targets, torch.tensor([len(row) for row in rows]))
    return Drawn(sequences, record, [document for document, _ in examples])
