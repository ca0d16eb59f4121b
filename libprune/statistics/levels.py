"""What whole levels cost: the divergence of the model when one block alone loses so many units and is repaired."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import typer
from jaxtyping import Float
from numpy.typing import NDArray

from libprune.engine.architecture import Architecture, Block
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns, mean_columns

Level = tuple[int, str, int]
"""Layer, part, and how many of its units are removed."""


Orders = Mapping[Block, NDArray[np.int64]]


def unit_orders(architecture: Architecture, scores: Columns) -> Orders:
    """For every block its units in the order in which they go: ascending score, ties by unit."""
    orders, start = {}, 0
    for layer, part in architecture.blocks():
        stop = start + architecture.units(part)
        orders[layer, part] = np.argsort(scores["score"][start:stop], kind="stable")
        start = stop
    return orders


def choose_levels(architecture: Architecture, number: int) -> list[Level]:
    """The levels to measure of every block, at even distances up to the whole block; all of them if there are few."""
    return [
        (layer, part, int(removed))
        for layer, part in architecture.blocks()
        for removed in np.unique(
            np.linspace(0, architecture.units(part), _steps(architecture, part, number) + 1).round()
        )[1:]
    ]


def _steps(architecture: Architecture, part: str, number: int) -> int:
    return 1 if architecture.parts[part].coupled else number


def order_digest(orders: Orders) -> str:
    """Names the orders in which units go; levels measured in another order say nothing."""
    return hashlib.sha256(b"".join(order.tobytes() for order in orders.values())).hexdigest()[:16]


def level_plans(architecture: Architecture, orders: Orders, levels: Sequence[Level]) -> dict[str, Plan]:
    """For each level the plan that takes its block there and leaves all others whole, by the level's name."""
    dense = Plan.dense(architecture).keep
    plans = {}
    for layer, part, removed in levels:
        keep = np.ones(architecture.units(part), dtype=bool)
        keep[orders[layer, part][:removed]] = False
        plans[f"{removed} {part} units of layer {layer}"] = Plan({**dense, (layer, part): keep})
    return plans


def level_table(levels: list[Level], divergences: Float[np.ndarray, "levels sequences"]) -> Columns:
    """One row a level: the mean divergence and its standard error over sequences (NaN of one), nats per token."""
    return {
        "layer_idx": np.array([layer for layer, _, _ in levels], dtype=np.int64),
        "group_type": np.array([part for _, part, _ in levels], dtype=np.str_),
        "removed": np.array([removed for _, _, removed in levels], dtype=np.int64),
    } | mean_columns("divergence", divergences)


def empty_table() -> Columns:
    """The table of no level."""
    return level_table([], np.zeros((0, 1)))


def print_levels(architecture: Architecture, table: Columns) -> None:
    """The divergence of every level by layer and part, in thousandths."""
    for part in architecture.parts:
        rows = table["group_type"] == part
        counts = np.unique(table["removed"][rows])
        typer.echo(f"divergence, nats / 1000, without so many {part} units of {architecture.units(part)}")
        typer.echo(f"{'layer':>5}" + "".join(f"{count:>9}" for count in counts))
        for layer in np.unique(table["layer_idx"]):
            values = 1000 * table["divergence"][rows & (table["layer_idx"] == layer)]
            typer.echo(f"{layer:>5}" + "".join(f"{value:>9.2f}" for value in values))
