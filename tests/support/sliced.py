"""The tiny model with its text and a plan, as slice finds them, for tests of what slice writes."""

from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from libprune.engine.architecture import Architecture
from libprune.engine.plan import Plan
from libprune.engine.tables import unit_index
from libprune.models.sequences import Sequences
from libprune.models.tokens import write_tokens
from libprune.pipeline.artifacts import read_architecture, write_table
from libprune.pipeline.layout import Layout
from tests.support import tiny


def write_project(folder: Path) -> Layout:
    """The dense model, its description, and calibration text, in a folder's `artifacts`."""
    params = tiny.write_params(folder / "params.yaml", str(tiny.write_model(folder / "source")), "text")
    import_module("stages.prepare").main(params, folder / "artifacts")
    layout = Layout(folder / "artifacts")
    architecture = read_architecture(layout)
    write_tokens(layout.calibration_tokens, random_windows(architecture, 2, 16), {"model": architecture.fingerprint})
    return layout


def random_windows(architecture: Architecture, number: int, length: int) -> Sequences:
    """Windows of random tokens, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return Sequences(torch.randint(architecture.sizes["vocab"], (number, length), generator=generator))


def write_plan(path: Path, architecture: Architecture, plan: Plan, shape: str) -> None:
    """A plan as `plan.parquet`, with the metadata that slice reads."""
    keep = np.concatenate(list(plan.keep.values()))
    meta = {"model": architecture.fingerprint, "shape": shape}
    write_table(path, unit_index(architecture) | {"keep": keep}, meta)
