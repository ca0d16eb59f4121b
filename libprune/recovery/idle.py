"""The artifacts of the stages teacher and recover where nothing is trained, and the figures that recover writes."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from libprune.pipeline.artifacts import write_table
from libprune.pipeline.atomic import write_json, writing, writing_folder
from libprune.pipeline.layout import NOTE, Layout

ABOUT = "teacher.json"
"""The file of the teacher's folder that says what the others hold."""
Curve = list[dict[str, float | int | None]]
"""Rows of the learning curve, with the columns `COLUMNS`; a loss that was not measured at a step is None."""
COLUMNS = ("step", "tokens", "seconds", "loss", "held_out")
"""The columns of the learning curve."""


def write_no_text(layout: Layout) -> None:
    """Write the artifacts of the teacher stage without a text."""
    write_table(layout.recovery_tokens, {"input_ids": np.zeros(0, dtype=np.int64)}, {"sequences": 0})
    with writing_folder(layout.teacher) as folder:
        write_json(folder / ABOUT, {"top_k": None})


def write_no_model(layout: Layout) -> None:
    """Write the artifact of the recover stage without a model."""
    with writing_folder(layout.recovered) as folder:
        write_json(folder / NOTE, {"method": "none"})


def write_figures(metrics: Path, figures: Mapping[str, Any], curve: Curve) -> None:
    """Write `recovery.json` and the learning curve as `learning_curve.csv`.

    Args:
        metrics: the folder of metrics.
        figures: the figures; none where nothing was trained.
        curve: the learning curve; without rows where nothing was trained.
    """
    write_json(metrics / "recovery.json", figures)
    with writing(metrics / "learning_curve.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)
