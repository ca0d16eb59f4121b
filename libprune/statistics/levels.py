"""The divergence of the model when one block alone loses a number of units, its level, and is repaired."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from libprune.engine.architecture import Architecture, Block
from libprune.engine.cost import Removals, removals_of_heads
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns, mean_columns, split_blocks
from libprune.pipeline.artifacts import read_scores, write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Levels
from libprune.pipeline.terminal import note

Level = tuple[int, str, int]
"""Layer, part, and how many of its units are removed."""

Orders = Mapping[Block, NDArray[np.int64]]
"""The units of every block, in the order in which they are removed."""


def unit_orders(architecture: Architecture, scores: Columns) -> Orders:
    """The units of every block in the order in which they are removed: ascending score, ties by unit.

    Query heads go in the order of their removals, all blocks through the same numbers of heads and groups.
    """
    orders = {block: np.argsort(score, kind="stable") for block, score in split_blocks(architecture, scores["score"])}
    if architecture.heads == "groups":
        return orders
    heads = removals_of_heads(architecture, scores["importance"], alike=True)
    return orders | {block: np.concatenate(removals).astype(np.int64) for block, removals in heads.items()}


def choose_levels(
    architecture: Architecture, number: int, importance: NDArray[np.float64] | None = None
) -> list[Level]:
    """The levels to measure of every block: at most `number`, at even distances up to the whole block.

    Args:
        number: of levels.
        importance: of all units, which says how many query heads go together; None: all alike.
    """
    heads: Mapping[Block, Removals] = {}
    if architecture.heads == "queries":
        units = sum(architecture.units(part) for _, part in architecture.blocks())
        heads = removals_of_heads(architecture, np.ones(units) if importance is None else importance, alike=True)
    return [
        (layer, part, int(removed))
        for layer, part in architecture.blocks()
        for removed in _counts(architecture, part, number, heads.get((layer, part)))
    ]


def _counts(architecture: Architecture, part: str, number: int, removals: Removals | None) -> NDArray[np.int64]:
    """The numbers of removed units that are measured, up to the whole part or to what must stay of it."""
    shape, groups = architecture.parts[part], architecture.parts[part].groups
    steps = (architecture.units(part) - shape.least) // groups if removals is None else len(removals)
    even = np.linspace(0, steps, (1 if shape.coupled else number) + 1).round().astype(np.int64)
    if removals is None:
        return groups * np.unique(even)[1:]
    return np.cumsum([0, *map(len, removals)])[np.unique(even)[1:]]


def order_digest(orders: Orders) -> str:
    """A digest of the orders in which units are removed; levels that were measured in another order do not count."""
    return hashlib.sha256(b"".join(order.tobytes() for order in orders.values())).hexdigest()[:16]


def level_plans(architecture: Architecture, orders: Orders, levels: Sequence[Level]) -> dict[str, Plan]:
    """The plans that each take one block to its level and leave all others whole, by the level's name."""
    dense = Plan.dense(architecture)
    return {
        f"{removed} {part} units of layer {layer}": dense.without((layer, part), orders[layer, part][:removed])
        for layer, part, removed in levels
    }


def level_table(levels: list[Level], divergences: Float[np.ndarray, "levels sequences"]) -> Columns:
    """A table with one row a level: the mean divergence over sequences and its standard error, nats per token.

    The standard error is NaN for a single sequence.
    """
    return {
        "layer_idx": np.array([layer for layer, _, _ in levels], dtype=np.int64),
        "group_type": np.array([part for _, part, _ in levels], dtype=np.str_),
        "removed": np.array([removed for _, _, removed in levels], dtype=np.int64),
    } | mean_columns("divergence", divergences)


def empty_table() -> Columns:
    """A table of levels without rows."""
    return level_table([], np.zeros((0, 1)))


def measure_levels(
    layout: Layout,
    compute: Compute,
    section: Levels,
    repairing: Callable[[], tuple[Callable[[Plan], Mapping[str, Any]], Mapping[str, Any]]],
) -> Columns | None:
    """Measure the divergence of every level of every block, and write the table.

    Args:
        section: how many levels a block, and how many calibration sequences, which are the last ones.
        repairing: called once the model is there. It gives the repair, from a plan to the new weights by parameter
            name, and what the repair depends on beside the model and the plan.

    Returns:
        The table; None in all processes but the first.

    Raises:
        LibpruneError: if an artifact is missing or foreign, the weights do not lie whole on the device, the disk has
            no room, or a divergence is not finite.
    """
    from libprune.collection.calibration import require_own_weights, set_up  # needs torch, which allocation does not
    from libprune.statistics.divergence import Divergence
    from libprune.statistics.losses import measuring

    run = set_up(layout, compute, section.sequences, last=True)
    require_own_weights(run)
    scores = read_scores(layout).table
    orders = unit_orders(run.architecture, scores)
    levels = choose_levels(run.architecture, section.number, scores["importance"])
    plans, order = level_plans(run.architecture, orders, levels), order_digest(orders)
    repair, inputs = repairing()
    identity = {"order": order, "number": section.number, "inputs": inputs}
    divergence = Divergence(run.model)

    def repaired(name: str) -> Mapping[str, Any]:
        return repair(plans[name])

    with measuring(run, "levels", layout.levels, plans, identity, divergence, repaired, rooms=("repair",)) as losses:
        if losses is None:
            return None
        table = level_table(levels, losses.changed)
        write_table(layout.levels, table, run.meta | {"levels": section.number, "order": order})
        return table


def print_levels(architecture: Architecture, table: Columns) -> None:
    """Print the divergence of every level by layer and part, in thousandths of a nat."""
    for part in architecture.parts:
        rows = table["group_type"] == part
        counts = np.unique(table["removed"][rows])
        note(f"divergence, nats / 1000, without so many {part} units of {architecture.units(part)}")
        note(f"{'layer':>5}" + "".join(f"{count:>9}" for count in counts))
        for layer in np.unique(table["layer_idx"]):
            values = 1000 * table["divergence"][rows & (table["layer_idx"] == layer)]
            note(f"{layer:>5}" + "".join(f"{value:>9.2f}" for value in values))
