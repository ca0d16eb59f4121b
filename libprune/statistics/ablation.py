"""The loss increase of masking single units, which criteria are judged by: which units, and the table of them."""

import numpy as np
import typer
from jaxtyping import Float
from numpy.typing import NDArray

from libprune.engine.architecture import Architecture
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns, mean_columns

Unit = tuple[int, str, int]
"""Layer, part, and the unit's number in it."""


def sample_units(architecture: Architecture, count: int, seed: int) -> list[Unit]:
    """A seeded sample of units without replacement, in the order of the per-unit tables.

    Each part gives the same number, and each layer of a part, up to one. What a small part or layer
    lacks is taken from other layers of the same part, then from the other parts. All units are
    taken if more are asked for than there are.
    """
    rng = np.random.default_rng(seed)
    parts = list(architecture.parts)
    shares = _divide(count, np.array([architecture.layers * architecture.units(part) for part in parts]), rng)
    given = {
        part: _divide(int(share), np.full(architecture.layers, architecture.units(part)), rng)
        for part, share in zip(parts, shares, strict=True)
    }
    return [
        (layer, part, int(unit))
        for layer, part in architecture.blocks()
        for unit in np.sort(rng.choice(architecture.units(part), size=given[part][layer], replace=False))
    ]


def _divide(count: int, room: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Shares of a count, as even as the room allows; what does not divide goes to places at even distances."""
    shares = np.zeros_like(room)
    while (left := count - int(shares.sum())) > 0 and (free := np.flatnonzero(shares < room)).size:
        if left >= len(free):
            shares[free] = np.minimum(room[free], shares[free] + left // len(free))
        else:
            start = rng.integers(len(free))
            shares[free[(np.arange(left) * len(free) + start) // left]] += 1
    return shares


def unit_plans(architecture: Architecture, units: list[Unit]) -> dict[str, Plan]:
    """For each unit the plan that removes it alone, by the unit's name."""
    dense = Plan.dense(architecture).keep
    plans = {}
    for layer, part, unit in units:
        others = np.arange(architecture.units(part)) != unit
        plans[f"{part} unit {unit} of layer {layer}"] = Plan({**dense, (layer, part): others})
    return plans


def ablation_table(
    units: list[Unit], losses: Float[np.ndarray, "units sequences"], dense: Float[np.ndarray, " sequences"]
) -> Columns:
    """One row a unit: the loss increase of masking it and its standard error over sequences, nats per token.

    Both are of the differences L_i(masked) - L_i(dense), L_i the mean-token loss of sequence i. The
    standard error is NaN for a single sequence.
    """
    return {
        "layer_idx": np.array([layer for layer, _, _ in units], dtype=np.int64),
        "group_type": np.array([part for _, part, _ in units], dtype=np.str_),
        "group_idx": np.array([unit for _, _, unit in units], dtype=np.int64),
    } | mean_columns("loss_increase", losses - dense)


def empty_table() -> Columns:
    """The table of no unit."""
    return ablation_table([], np.zeros((0, 1)), np.zeros(1))


def print_ablation(table: Columns, loss: float) -> None:
    """Mean loss increase by layer and part, and the dense loss that it adds to."""
    parts = list(dict.fromkeys(table["group_type"]))
    typer.echo(f"{'layer':>5}" + "".join(f"{f'loss_increase {part}':>32}" for part in parts))
    for layer in np.unique(table["layer_idx"]):
        chosen = [(table["layer_idx"] == layer) & (table["group_type"] == part) for part in parts]
        means = [f"{table['loss_increase'][rows].mean():.3e}" if rows.any() else "-" for rows in chosen]
        typer.echo(f"{layer:>5}" + "".join(f"{mean:>32}" for mean in means))
    typer.echo(f"{len(table['layer_idx'])} units measured; dense loss {loss:.4f} nats per token")
