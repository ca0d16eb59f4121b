"""Allocation for networks, where a weight that lies between two prunable axes goes with a unit of either.

What a removal saves depends on the others, so that prices do not add up: the exact size of what is left decides.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence

from libprune.allocation.ladders import Ladders, build_ladders, plan_of
from libprune.allocation.retention import by_progress, wanted_removals
from libprune.engine import cost
from libprune.engine.architecture import Architecture, Block
from libprune.engine.errors import BudgetError, LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns
from libprune.pipeline.methods import METHODS
from libprune.pipeline.sections import Allocate

MODULE_METHODS = tuple(name for name, record in METHODS.items() if record.modules)
"""Values of `allocate.method` that networks have."""
OBJECTIVES = {"parameters": "decoder", "macs": "macs"}
"""By the value of `allocate.objective`, the field of `libprune.engine.cost.Size` that it counts."""

_READ = ("ratio", "ratio_of", "objective", "method", "network_type", "rank_by", "min_channels", "channel_multiple")
"""The params of allocation that networks have; all others keep their defaults."""


def allocate_network(architecture: Architecture, scores: Columns, params: Allocate) -> Plan:
    """Decide which units stay.

    `uniform` takes the same share of every part, `global` the lowest scores anywhere, `retention` what the importance
    of each part lets it lose: without a ratio exactly that, with a ratio a common multiple of it. Removals happen in
    this order as long as they fit the budget; of what comes after the first that does not, parts lose what still fits.

    Args:
        scores: the importance table.
        params: ratio, objective (`parameters` or `macs`), method, floors (`min_channels`), multiple (`auto`: 1). What
            networks do not have keeps its default.

    Raises:
        BudgetError: if the ratio cannot be reached under the floors, or `retention` finds nothing to remove.
        LibpruneError: for a method, an objective or another param that networks do not have.
    """
    _require_known(params)
    if params.channel_multiple == "auto":
        params = params.model_copy(update={"channel_multiple": 1})
    ladders = _ranked(architecture, scores, params)
    order = _order(architecture, ladders)
    if params.ratio is None:
        return _as_wanted(architecture, ladders, params)
    dense = _amount(architecture, Plan.dense(architecture), params)
    target = round(params.ratio * dense)

    def removed(depth: Mapping[Block, int]) -> int:
        return dense - _amount(architecture, plan_of(architecture, ladders, depth), params)

    most = removed(Counter(order))
    if most < target:
        raise BudgetError(
            f"ratio = {params.ratio} of the {params.objective} cannot be removed: under min_channels = "
            f"{params.min_channels} at most {most / dense:.3f} can ({most:,} of {target:,}). Lower one of them"
        )
    fitting = bisect_right(range(len(order) + 1), target, key=lambda number: removed(Counter(order[:number]))) - 1
    depth, full = Counter(order[:fitting]), set[Block]()
    for block in order[fitting:]:
        if block not in full and removed(depth + Counter([block])) <= target:
            depth[block] += 1
        else:
            full.add(block)
    return plan_of(architecture, ladders, depth)


def _order(architecture: Architecture, ladders: Ladders) -> Sequence[Block]:
    """The block of every removal, the lowest ranks first; ties break by part, then unit."""
    parts = list(architecture.parts)
    steps = ((step.rank, parts.index(block[1]), block) for block, ladder in ladders.items() for step in ladder)
    return [block for _, _, block in sorted(steps, key=lambda step: step[:2])]


def _as_wanted(architecture: Architecture, ladders: Ladders, params: Allocate) -> Plan:
    """The plan that `retention` finds without a ratio: all steps of a rank, units gone over units wanted, up to 1."""
    if not METHODS[params.method].finds_ratio:
        raise LibpruneError(
            "ratio is None; say which share of the network is to go, such as 0.5, or take method = 'retention'"
        )
    depth = {block: sum(step.rank <= 1 for step in steps) for block, steps in ladders.items()}
    if not any(depth.values()):
        raise BudgetError("retention finds no part that can lose a unit under min_channels; set ratio")
    return plan_of(architecture, ladders, depth)


def _require_known(params: Allocate) -> None:
    for key, known in (("method", MODULE_METHODS), ("objective", tuple(OBJECTIVES))):
        if getattr(params, key) not in known:
            raise LibpruneError(
                f"{key} = {getattr(params, key)!r} needs a language model; for networks choose {', '.join(known)}"
            )
    for key, field in Allocate.model_fields.items():
        if key not in _READ and getattr(params, key) != field.default:
            raise LibpruneError(
                f"{key} = {getattr(params, key)!r} needs a language model; networks know {', '.join(_READ)}"
            )
    if params.min_channels < 1:
        raise LibpruneError("min_channels = 0, but a network needs at least one unit of each part")


def _ranked(architecture: Architecture, scores: Columns, params: Allocate) -> Ladders:
    """The ladders, with ranks in the order of the method."""
    ladders = build_ladders(architecture, scores, params, cost.prices(architecture, params.objective))
    if METHODS[params.method].alike:
        return by_progress(ladders, {block: float(architecture.units(block[1])) for block in ladders})
    if METHODS[params.method].finds_ratio:
        return by_progress(ladders, wanted_removals(architecture, scores, params.network_type))
    return ladders


def _amount(architecture: Architecture, plan: Plan, params: Allocate) -> int:
    return int(getattr(cost.size(architecture, plan), OBJECTIVES[params.objective]))
