"""The loss increase of removing whole layers, attentions and MLPs, by which hierarchical allocation weighs units."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from libprune.engine.architecture import Architecture
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns, mean_columns
from libprune.pipeline.artifacts import write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Sensitivity
from libprune.pipeline.terminal import note

LAYER = "layer"
"""The name of the removal of all parts of a layer in the table."""

Removal = tuple[int, str]
"""A layer, and what is removed from it: `LAYER` or a part."""


def removable(architecture: Architecture, layer: int) -> list[str]:
    """The parts of a layer that can go while the layer stays."""
    return [part for part in architecture.parts_of(layer) if not architecture.parts[part].least]


def removals(architecture: Architecture) -> list[Removal]:
    """Every removal that is measured: each whole layer, followed by each of its parts."""
    return [(layer, what) for layer in range(architecture.layers) for what in (LAYER, *removable(architecture, layer))]


def removal_plans(architecture: Architecture) -> dict[str, Plan]:
    """The plan of every removal, in the order of `removals`, by a name for messages.

    A removed part adds exactly nothing to the residual stream, biases included.
    """
    plans = {}
    for layer, what in removals(architecture):
        plan = Plan.dense(architecture)
        for part in architecture.parts_of(layer) if what == LAYER else [what]:
            plan = plan.without((layer, part), slice(None))
        plans[f"layer {layer}" if what == LAYER else f"the {what} of layer {layer}"] = plan
    return plans


def sensitivity_table(
    measured: list[Removal], losses: Float[np.ndarray, "removals sequences"], dense: Float[np.ndarray, " sequences"]
) -> Columns:
    """A table with one row a removal: the mean of L_i(removed) - L_i(dense) over sequences, and its standard error.

    L_i is the mean-token loss of sequence i, nats. The standard error is NaN for a single sequence.
    """
    return {
        "layer_idx": np.array([layer for layer, _ in measured], dtype=np.int64),
        "removed": np.array([what for _, what in measured], dtype=np.str_),
    } | mean_columns("loss_increase", losses - dense)


def empty_table() -> Columns:
    """A sensitivity table without rows."""
    return sensitivity_table([], np.zeros((0, 1)), np.zeros(1))


def measure_sensitivity(layout: Layout, compute: Compute, section: Sensitivity) -> tuple[Columns, float] | None:
    """Measure the loss increase of removing each layer, and each of its parts alone, and write the table.

    Args:
        section: how many calibration sequences, which are the last ones.

    Returns:
        The table and the mean loss of the dense model, nats per token; None in all processes but the first.

    Raises:
        LibpruneError: if an artifact is missing, the disk has no room, or a loss is not finite.
    """
    from libprune.collection.calibration import set_up  # needs torch, which reading the table does not
    from libprune.statistics.losses import measuring

    run = set_up(layout, compute, section.sequences, last=True)
    with measuring(run, "sensitivity", layout.sensitivity, removal_plans(run.architecture), {}) as losses:
        if losses is None:
            return None
        table = sensitivity_table(removals(run.architecture), losses.changed, losses.dense)
        loss = float(losses.dense.mean())
        write_table(layout.sensitivity, table, run.meta | {"loss": loss})
        return table, loss


def increases_of(table: Columns) -> dict[str, NDArray[np.float64]]:
    """Loss increases ``[layers]`` in nats per token, by what is removed: `LAYER` or a part.

    A layer that has no such part, or cannot lose it alone, has NaN.
    """
    layers = 1 + int(table["layer_idx"].max(initial=-1))
    increases = {}
    for kind in dict.fromkeys(table["removed"].tolist()):
        rows = table["removed"] == kind
        increases[kind] = np.full(layers, np.nan)
        increases[kind][table["layer_idx"][rows]] = table["loss_increase"][rows]
    return increases


def block_increase(increases: Mapping[str, NDArray[np.float64]], layer: int, part: str) -> float:
    """The loss increase of removing a part of a layer, in nats per token.

    Of a part that cannot go alone, such as all experts of a mixture, it is that of removing the layer.
    """
    alone = increases[part][layer] if part in increases else np.nan
    return float(increases[LAYER][layer] if np.isnan(alone) else alone)


def print_sensitivity(table: Columns, loss: float) -> None:
    """Print the loss increases by layer, and the dense loss that they add to."""
    increases = increases_of(table)
    note("loss increase, nats per token, without")
    note(f"{'layer':>5}" + "".join(f"{f'the {kind}':>16}" for kind in increases))
    for layer, values in enumerate(zip(*increases.values(), strict=True)):
        note(f"{layer:>5}" + "".join(f"{'' if np.isnan(value) else f'{value:.4f}':>16}" for value in values))
    note(f"dense loss {loss:.4f} nats per token")
