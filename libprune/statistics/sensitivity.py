"""The loss increase of removing whole layers, attentions and MLPs: what hierarchical allocation weighs units by."""

import numpy as np
import typer
from jaxtyping import Float
from numpy.typing import NDArray

from libprune.engine.architecture import Architecture, Block
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns, mean_columns

LAYER = "layer"
"""What the table calls the removal of all parts of a layer."""

Removal = Block
"""A layer, and what of it is removed: `LAYER` or a part."""


def removals(architecture: Architecture) -> list[Removal]:
    """All that is measured: every layer, and each of its parts."""
    return [(layer, what) for layer in range(architecture.layers) for what in (LAYER, *architecture.parts)]


def removal_plans(architecture: Architecture) -> dict[str, Plan]:
    """For each removal its plan, by a name for messages.

    What is removed contributes exactly nothing to the residual stream, biases included.
    """
    dense = Plan.dense(architecture).keep
    plans = {}
    for layer, what in removals(architecture):
        parts = list(architecture.parts) if what == LAYER else [what]
        gone = {(layer, part): np.zeros(architecture.units(part), dtype=bool) for part in parts}
        plans[f"layer {layer}" if what == LAYER else f"the {what} of layer {layer}"] = Plan({**dense, **gone})
    return plans


def sensitivity_table(
    measured: list[Removal], losses: Float[np.ndarray, "removals sequences"], dense: Float[np.ndarray, " sequences"]
) -> Columns:
    """One row a removal: the mean of L_i(removed) - L_i(dense) over sequences, and its standard error.

    L_i is the mean-token loss of sequence i, nats. The standard error is NaN for a single sequence.
    """
    return {
        "layer_idx": np.array([layer for layer, _ in measured], dtype=np.int64),
        "removed": np.array([what for _, what in measured], dtype=np.str_),
    } | mean_columns("loss_increase", losses - dense)


def empty_table() -> Columns:
    """The table of no removal."""
    return sensitivity_table([], np.zeros((0, 1)), np.zeros(1))


def increases_of(table: Columns) -> dict[str, NDArray[np.float64]]:
    """Loss increases ``[layers]`` in nats per token, by what is removed."""
    kinds = dict.fromkeys(table["removed"].tolist())
    return {kind: table["loss_increase"][table["removed"] == kind] for kind in kinds}


def print_sensitivity(table: Columns, loss: float) -> None:
    """The loss increases by layer, and the dense loss that they add to."""
    increases = increases_of(table)
    typer.echo("loss increase, nats per token, without")
    typer.echo(f"{'layer':>5}" + "".join(f"{f'the {kind}':>16}" for kind in increases))
    for layer, values in enumerate(zip(*increases.values(), strict=True)):
        typer.echo(f"{layer:>5}" + "".join(f"{value:>16.4f}" for value in values))
    typer.echo(f"dense loss {loss:.4f} nats per token")
