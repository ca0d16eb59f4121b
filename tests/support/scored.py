"""Made-up tables of all stages, for tests of scoring; no model is needed."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from libprune.engine.tables import Columns, unit_index
from libprune.pipeline.artifacts import write_table
from libprune.pipeline.layout import Layout
from libprune.statistics.ablation import ablation_table
from tests.support.shapes import Shape

SHAPE = Shape(layers=3, kv=20, ffn=30)
ARCHITECTURE = replace(SHAPE.architecture(), fingerprint="here")
ORIGIN = {"model": "here", "tokens": "text"}
RNG = np.random.default_rng(0)
TAYLOR, FISHER, WANDA, MAGNITUDE = RNG.exponential(size=(4, len(SHAPE.unit_costs())))
LOSS = 2 * TAYLOR + 0.5 * WANDA
"""The made-up loss increase of removing each unit, nats."""


def write_tables(folder: Path) -> Layout:
    """Tables of every stage; `taylor` and `wanda` together explain the losses of the ablation stage."""
    layout, index = Layout(folder), unit_index(ARCHITECTURE)
    layout.architecture.write_text(ARCHITECTURE.to_json())
    costs = {"cost": SHAPE.unit_costs(), "magnitude_l1": MAGNITUDE, "magnitude_l2": MAGNITUDE**2}
    write_table(layout.weights, index | costs, ORIGIN)
    stages = {
        "gradients": {"taylor": TAYLOR, "taylor_signed": TAYLOR, "unit_fisher_sequence": FISHER},
        "hessian": {"fisher": FISHER},
        "activations": {"wanda_l2": WANDA},
    }
    for stage, columns in stages.items():
        write_table(layout.root / stage / "units.parquet", index | columns, ORIGIN)
    write_table(layout.ablation, measured(slice(None, None, 2), LOSS), ORIGIN)
    return layout


def copied(layout: Layout, folder: Path) -> Layout:
    """A copy of the artifacts, to be changed."""
    return Layout(Path(shutil.copytree(layout.root, folder / "artifacts")))


def measured(rows: slice, losses: np.ndarray) -> Columns:
    """An ablation table of some of the units."""
    index = unit_index(ARCHITECTURE)
    units = list(zip(*(index[name][rows].tolist() for name in index), strict=True))
    return ablation_table(units, losses[rows][:, None], np.zeros(1))
