"""The table of what narrower residual streams cost."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns, mean_columns
from libprune.pipeline.terminal import note


def width_table(
    architecture: Architecture, widths: Sequence[int], divergences: Float[np.ndarray, "widths sequences"]
) -> Columns:
    """A table with one row a width: the mean divergence and its standard error, nats per token, and all parameters."""
    dense = Plan.dense(architecture)
    totals = [cost.size(architecture, replace(dense, width=width)).total for width in widths]
    return {
        "width": np.array(widths, dtype=np.int64),
        "parameters": np.array(totals, dtype=np.int64),
    } | mean_columns("divergence", divergences)


def empty_table() -> Columns:
    """A table of widths without rows."""
    return {"width": np.zeros(0, np.int64), "parameters": np.zeros(0, np.int64)} | mean_columns(
        "divergence", np.zeros((0, 1))
    )


def print_widths(table: Columns) -> None:
    """Print the divergence at every width, in thousandths of a nat."""
    note(f"{'columns':>8}{'parameters':>16}{'nats / 1000':>13}{'+-':>8}")
    for width, parameters, mean, error in zip(*table.values(), strict=True):
        note(f"{width:>8}{parameters:>16,}{1000 * mean:>13.1f}{1000 * error:>8.1f}")
