"""Allocation for networks, where a weight that lies between two prunable axes goes with a unit of either.

What a removal saves depends on the others, so a budget is met by trial: a method is asked for amounts counted as if
removals added up, until the exact size of what it leaves fits.
"""

from libprune import cost
from libprune.architecture import Architecture
from libprune.artifacts import Columns
from libprune.errors import BudgetError, LibpruneError
from libprune.ladders import Ladders, build_ladders, plan_of
from libprune.methods import Evidence, allocate_global
from libprune.plan import Plan
from libprune.retention import by_progress, wanted_removals
from libprune.sections import Allocate

METHODS = ("uniform", "global", "retention")
OBJECTIVES = {"parameters": "decoder", "macs": "macs"}


def allocate_network(architecture: Architecture, scores: Columns, params: Allocate) -> Plan:
    """Decide which units stay.

    `uniform` takes the same share of every part, `global` the lowest scores anywhere, `retention` what the importance
    of each part lets it lose: without a ratio just that, with one so many times that.

    Args:
        architecture: the network's description.
        scores: the importance table.
        params: ratio, objective (`parameters` or `macs`), method, floors (`min_channels`), multiple.

    Raises:
        BudgetError: if the ratio cannot be reached under the floors, or `retention` finds nothing to remove.
        LibpruneError: for a method or an objective that networks do not have.
    """
    _require_known(params)
    ladders = _ranked(architecture, scores, params)
    if params.ratio is None and params.method == "retention":
        return _as_wanted(architecture, ladders)
    dense = _amount(architecture, Plan.dense(architecture), params)
    target = round(_ratio(params) * dense)

    def removed(asked: int) -> tuple[int, Plan]:
        depth = allocate_global(architecture, ladders, asked, params, Evidence())
        plan = plan_of(architecture, ladders, depth)
        return dense - _amount(architecture, plan, params), plan

    low, high = 0, sum(step.cost for steps in ladders.values() for step in steps)
    most, plan = removed(high)
    if most <= target:
        _require_reached(architecture, ladders, params, most, target, dense)
        return plan
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if removed(middle)[0] <= target else (low, middle)
    return removed(low)[1]


def _require_known(params: Allocate) -> None:
    for key, known in (("method", METHODS), ("objective", tuple(OBJECTIVES))):
        if getattr(params, key) not in known:
            raise LibpruneError(
                f"{key} = {getattr(params, key)!r} needs a language model; for networks choose {', '.join(known)}"
            )
    if params.min_channels < 1:
        raise LibpruneError("min_channels = 0, but a network needs at least one unit of each part")


def _ratio(params: Allocate) -> float:
    if params.ratio is None:
        raise LibpruneError(
            "ratio is None; say which share of the network is to go, such as 0.5, or take method = 'retention'"
        )
    return params.ratio


def _ranked(architecture: Architecture, scores: Columns, params: Allocate) -> Ladders:
    """The ladders, with ranks that let `allocate_global` take the method's order."""
    ladders = build_ladders(architecture, scores, params, cost.prices(architecture, params.objective))
    if params.method == "uniform":
        return by_progress(ladders, {block: float(architecture.units(block[1])) for block in ladders})
    if params.method == "retention":
        return by_progress(ladders, wanted_removals(architecture, scores, params.network_type))
    return ladders


def _as_wanted(architecture: Architecture, ladders: Ladders) -> Plan:
    """What `retention` lets every part lose, where a rank of 1 says that so much is gone."""
    depth = {block: sum(step.rank <= 1 for step in steps) for block, steps in ladders.items()}
    if not any(depth.values()):
        raise BudgetError("retention finds no part that can lose a unit under min_channels; set ratio")
    return plan_of(architecture, ladders, depth)


def _amount(architecture: Architecture, plan: Plan, params: Allocate) -> int:
    return int(getattr(cost.size(architecture, plan), OBJECTIVES[params.objective]))


def _require_reached(
    architecture: Architecture, ladders: Ladders, params: Allocate, most: int, target: int, dense: int
) -> None:
    if target - most > min((step.cost for steps in ladders.values() for step in steps), default=0):
        raise BudgetError(
            f"ratio = {params.ratio} of the {params.objective} cannot be removed: under min_channels = "
            f"{params.min_channels} at most {most / dense:.3f} can ({most:,} of {target:,}). Lower one of them"
        )
