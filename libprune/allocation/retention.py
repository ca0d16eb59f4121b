"""Retention: a block whose importance lies in few units can lose the others; one whose units are alike loses little.

How unlike the units of a block are is the coefficient of variation of their importance, standard deviation / mean.
Above 2.5 those units stay that hold 70 % of the block's importance, above 1.5 those that hold 80 %, else those that
hold a conservative share. The bounds and shares are conventions; nothing here measures a loss.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from libprune.allocation.ladders import Ladders
from libprune.engine.architecture import Architecture, Block
from libprune.engine.errors import LibpruneError
from libprune.engine.tables import Columns, Values, split_blocks

CONCENTRATED = ((2.5, 0.7), (1.5, 0.8))
"""Coefficients of variation, and the share of the importance that blocks above them keep."""

CONSERVATIVE = {"transformer": 0.85, "mixed": 0.9, "snn": 0.9, "rnn": 0.95}
"""The share elsewhere, by kind of network. A transformer's residual stream carries what a block lacks past it; a
spiking neuron below its threshold hands on nothing; a recurrent network feeds an error back at every step."""


def retained_share(importance: Values, network_type: str) -> float:
    """The share of a block's importance that is kept.

    Args:
        importance: of the block's units, ``[units]``, not negative.
        network_type: a key of `CONSERVATIVE`.
    """
    mean = float(importance.mean())
    variation = float(importance.std()) / mean if mean > 0 else 0.0
    return next((share for bound, share in CONCENTRATED if variation > bound), CONSERVATIVE[network_type])


def removable_units(importance: Values, share: float) -> float:
    """How many units may go, the least important first, so that what stays holds the share; with a fraction.

    Units of no importance at all count as alike.
    """
    held = importance if importance.sum() > 0 else np.ones_like(importance)
    lost = np.concatenate([[0.0], np.cumsum(np.sort(held))])
    allowed = (1 - share) * lost[-1]
    whole = int(np.searchsorted(lost, allowed * (1 + 1e-12), side="right")) - 1
    return whole + max(0.0, float((allowed - lost[whole]) / (lost[whole + 1] - lost[whole])))


def wanted_removals(architecture: Architecture, scores: Columns, network_type: str) -> dict[Block, float]:
    """How many units every block may lose.

    Raises:
        LibpruneError: if an importance is negative, which has no coefficient of variation and no share.
    """
    importance = scores["importance"]
    if (importance < 0).any():
        raise LibpruneError(
            "allocate.method: retention reads shares of the importance, and some of it is negative; set score.scaling "
            "to none or minmax, or choose another allocate.method"
        )
    return {
        block: removable_units(values, retained_share(values, network_type))
        for block, values in split_blocks(architecture, importance)
    }


def by_progress(ladders: Ladders, wanted: Mapping[Block, float]) -> Ladders:
    """Ladders with every step ranked by how far it takes its block: units gone / units wanted.

    Taken in this order, all blocks come to the same multiple of what is wanted; at 1 to what is wanted itself.
    """
    ranked = {}
    for block, steps in ladders.items():
        gone = np.cumsum([len(step.units) for step in steps])
        ranks = gone / max(wanted[block], np.finfo(np.float64).tiny)
        ranked[block] = tuple(
            step if step.forced else replace(step, rank=float(rank)) for step, rank in zip(steps, ranks, strict=True)
        )
    return ranked


def wanted_total(ladders: Ladders, wanted: Mapping[Block, float]) -> int:
    """How much of the objective goes if every block loses as many whole steps as are wanted."""
    return sum(step.cost for steps in by_progress(ladders, wanted).values() for step in steps if step.rank <= 1)
