"""The loss increase of masking single units: which units are drawn, the measurement, and the table of them."""

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from libprune.engine.architecture import Architecture, Block
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns, mean_columns
from libprune.pipeline.artifacts import write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Ablation, Compute
from libprune.pipeline.terminal import note, say

Unit = tuple[int, str, int]
"""Layer, part, and the unit's number in it."""


def sample_units(architecture: Architecture, count: int, seed: int) -> list[Unit]:
    """A seeded sample of units without replacement, in the order of the per-unit tables.

    All parts give the same number, and all layers of a part, up to one. Where a part or layer is too small, the rest
    is taken from other layers of the same part, then from the other parts. All units are taken if there are no more
    than the count.
    """
    rng = np.random.default_rng(seed)
    parts = list(architecture.parts)
    layers = {part: architecture.with_part(part) for part in parts}
    shares = _divide(count, np.array([len(layers[part]) * architecture.units(part) for part in parts]), rng)
    given: dict[Block, int] = {}
    for part, share in zip(parts, shares, strict=True):
        each = _divide(int(share), np.full(len(layers[part]), architecture.units(part)), rng)
        given |= {(layer, part): int(number) for layer, number in zip(layers[part], each, strict=True)}
    return [
        (layer, part, int(unit))
        for layer, part in architecture.blocks()
        for unit in np.sort(rng.choice(architecture.units(part), size=given[layer, part], replace=False))
    ]


def _divide(count: int, room: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Divide a count into shares that are as even as the room allows; a remainder goes to places at even distances."""
    shares = np.zeros_like(room)
    while (left := count - int(shares.sum())) > 0 and (free := np.flatnonzero(shares < room)).size:
        if left >= len(free):
            shares[free] = np.minimum(room[free], shares[free] + left // len(free))
        else:
            start = rng.integers(len(free))
            shares[free[(np.arange(left) * len(free) + start) // left]] += 1
    return shares


def unit_plans(architecture: Architecture, units: list[Unit]) -> dict[str, Plan]:
    """The plans that each remove one unit alone, by the unit's name."""
    dense = Plan.dense(architecture)
    return {f"{part} unit {unit} of layer {layer}": dense.without((layer, part), unit) for layer, part, unit in units}


def ablation_table(
    units: list[Unit], losses: Float[np.ndarray, "units sequences"], dense: Float[np.ndarray, " sequences"]
) -> Columns:
    """A table with one row a unit: the loss increase of masking it and its standard error, nats per token.

    The increase is the mean over sequences i of L_i(masked) - L_i(dense), with L_i the mean-token loss of sequence i;
    the standard error is that of this mean, NaN for a single sequence.
    """
    return {
        "layer_idx": np.array([layer for layer, _, _ in units], dtype=np.int64),
        "group_type": np.array([part for _, part, _ in units], dtype=np.str_),
        "group_idx": np.array([unit for _, _, unit in units], dtype=np.int64),
    } | mean_columns("loss_increase", losses - dense)


def empty_table() -> Columns:
    """An ablation table without rows."""
    return ablation_table([], np.zeros((0, 1)), np.zeros(1))


def measure_ablation(layout: Layout, compute: Compute, section: Ablation) -> tuple[Columns, float] | None:
    """Measure the loss increase of masking each of a sample of units alone, and write the table.

    Args:
        section: how many units, their seed, and how many calibration sequences, which are the last ones.

    Returns:
        The table and the mean loss of the dense model, nats per token; None in all processes but the first.

    Raises:
        LibpruneError: if an artifact is missing, the disk has no room, or a loss is not finite.
    """
    from libprune.collection.calibration import set_up  # needs torch, which reading the table does not
    from libprune.statistics.losses import measuring

    run = set_up(layout, compute, section.sequences, last=True)
    units = sample_units(run.architecture, section.units, section.seed)
    if run.world.first and len(units) < section.units:
        say(f"ablation.units is {section.units}, the model has {len(units)} units: all are measured")
    sample = {"units": len(units), "seed": section.seed}
    with measuring(run, "ablation", layout.ablation, unit_plans(run.architecture, units), sample) as losses:
        if losses is None:
            return None
        table, loss = ablation_table(units, losses.changed, losses.dense), float(losses.dense.mean())
        write_table(layout.ablation, table, run.meta | sample | {"loss": loss})
        return table, loss


def print_ablation(table: Columns, loss: float) -> None:
    """Print the mean loss increase by layer and part, and the dense loss that it adds to."""
    parts = list(dict.fromkeys(table["group_type"]))
    note(f"{'layer':>5}" + "".join(f"{f'loss_increase {part}':>32}" for part in parts))
    for layer in np.unique(table["layer_idx"]):
        chosen = [(table["layer_idx"] == layer) & (table["group_type"] == part) for part in parts]
        means = [f"{table['loss_increase'][rows].mean():.3e}" if rows.any() else "-" for rows in chosen]
        note(f"{layer:>5}" + "".join(f"{mean:>32}" for mean in means))
    say(f"{len(table['layer_idx'])} units measured; dense loss {loss:.4f} nats per token")
