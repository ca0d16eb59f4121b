"""A pruned tiny model with a text to train on, for tests of the recovery."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from libprune.models.sequences import NO_TARGET, Sequences
from libprune.models.tokens import read_tokens, write_tokens
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.atomic import writing_folder
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Recover, Slice
from libprune.recovery.predictions import describe_teacher
from libprune.results.prune import prune
from tests.support.models import VOCAB
from tests.support.sliced import write_collected

CPU = Compute(device="cpu", dtype="float32", batch_tokens=32)
HELD_OUT, LENGTH = 4, 8


def short(**changes: Any) -> Recover:
    """A training of a few steps, which lowers the held-out loss of the tiny models."""
    usual = {"method": "full", "length": LENGTH, "tokens": 512, "held_out": HELD_OUT, "checks": 4, "batch_tokens": 32}
    return Recover(**(usual | {"learning_rate": 1e-3, "patience": 4} | changes))


def write_pruned_layout(
    root: Path, family: str, kind: str, finish: Callable[[Path], None] = lambda folder: None
) -> Layout:
    """A sliced tiny model in a layout, with random sequences to train on; some are held out.

    `finish` is as in `tests.support.sliced.write_collected`.
    """
    layout, _ = write_collected(root, family, kind, finish)
    with writing_folder(layout.pruned) as folder:
        prune(layout, folder, CPU, Slice(repair="none"))
    origin = read_architecture(layout).fingerprint
    calibration = read_tokens(layout.calibration_tokens, origin)[1]["tokens"]
    meta = {"model": origin, "calibration": calibration, "held_out": HELD_OUT, "read_before": 0.0, "text": "t"}
    about = {"model": origin, "teacher": origin}
    about["tokens"] = write_tokens(layout.recovery_tokens, training_sequences(family), meta)
    with writing_folder(layout.teacher) as folder:
        describe_teacher(folder, about, 0)
    return layout


def training_sequences(family: str, number: int = 20) -> Sequences:
    """Random sequences as a model of the family is trained on them: with next tokens, masked tokens or labels."""
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB, (number, LENGTH), generator=random)
    if family == "bert":
        masked = torch.zeros_like(ids, dtype=torch.bool)
        masked[:, 2:4] = True
        return Sequences(ids.where(~masked, 1), ids.where(masked, NO_TARGET))
    if family == "bert_classifier":
        return Sequences(ids, torch.randint(3, (number,), generator=random), torch.randint(3, LENGTH + 1, (number,)))
    return Sequences(ids)
