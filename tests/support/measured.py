"""A folder for the stages that measure losses, and runs of them that are interrupted."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from libprune.engine.describe import describe
from libprune.models.compute import sequence_losses
from libprune.models.folder import fingerprint
from libprune.models.sequences import Sequences
from libprune.models.tokens import write_tokens
from libprune.pipeline.artifacts import read_table
from libprune.pipeline.layout import Layout
from libprune.statistics import losses as prefix_module
from stages.ablation import main
from tests.support import tiny
from tests.support.models import tokens

SEQUENCES, LENGTH, USED, AT_ONCE = 6, 9, 4, 3


PASSES = 2
"""Passes of one measurement."""


def write_project(model: PreTrainedModel, folder: Path) -> Path:
    layout = Layout(folder / "artifacts")
    model.save_pretrained(layout.model, save_original_format=False)
    digest = fingerprint(layout.model)
    layout.architecture.write_text(describe(model, digest).to_json())
    write_tokens(layout.calibration_tokens, Sequences(tokens(SEQUENCES, LENGTH)), {"model": digest})
    params(folder)
    return folder


def params(folder: Path, **changes: int) -> Path:
    ablation = {"units": 12, "sequences": USED, **changes}
    compute = {"device": "cpu", "dtype": "float32", "batch_tokens": AT_ONCE * LENGTH}
    return tiny.write_params(folder / "params.yaml", "none", "none", ablation=ablation, compute=compute)


def run_stage(folder: Path, **changes: int) -> tuple[dict, dict]:
    layout = Layout(folder / "artifacts")
    main(params(folder, **changes), layout.root)
    return read_table(layout.ablation, "ablation")


def patch_losses(monkeypatch, value_of) -> list[int]:
    """Calls a function with the number of each pass and its losses; returns the list of passes."""
    passes: list[int] = []

    def patched(model, sequences):
        passes.append(len(passes))
        return value_of(passes[-1], sequence_losses(model, sequences))

    monkeypatch.setattr(prefix_module, "sequence_losses", patched)
    return passes


def interrupt(monkeypatch, done: int, run: Callable[[], object]) -> None:
    """Run a stage, saving after every measurement, and stop in the middle of the one after so many."""
    monkeypatch.setattr("libprune.collection.accumulator.SavedSums.due", lambda self: True)

    def stop(number, losses):
        if number == PASSES * (1 + done) + 1:
            raise KeyboardInterrupt
        return losses

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch_losses(patch, stop)
        run()
