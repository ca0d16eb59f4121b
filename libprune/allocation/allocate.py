"""Allocation: which units go, so that a given share of the parameters is removed."""

from collections.abc import Callable

from libprune.allocation.advice import held_whole
from libprune.allocation.hgsp import above_floors
from libprune.allocation.ladders import Ladders, build_ladders, plan_of
from libprune.allocation.methods import Depth, Evidence
from libprune.allocation.retention import wanted_removals, wanted_total
from libprune.allocation.widths import WITHIN, fitting_multiples
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.cost import Prices
from libprune.engine.errors import BudgetError, LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns
from libprune.pipeline.methods import METHODS
from libprune.pipeline.sections import Allocate

NO_EVIDENCE: Evidence = {}


def target_of(prices: Prices, params: Allocate) -> int:
    """How much of the objective is to go; the ratio is settled."""
    assert params.ratio is not None
    return round(params.ratio * base_of(prices, params))


def base_of(prices: Prices, params: Allocate) -> int:
    """How much of the objective the ratio is of."""
    return prices.decoder if params.ratio_of == "decoder" else prices.total


def settle(architecture: Architecture, scores: Columns, params: Allocate, evidence: Evidence = NO_EVIDENCE) -> Allocate:
    """The params with numbers where they leave one open: the multiple of channels (`auto`), and the ratio (null).

    `auto` is the largest multiple that the dense width is one of too, and at which the plan of the method, before a
    search improves it, removes a share within one point of the one asked for. Where the ratio is null, the share is
    compared with what is removed in single channels. 1 if there is none.

    Args:
        scores: the importance table.
        params: budget, method and limits.
        evidence: what else the method needs.

    Raises:
        BudgetError: if the ratio is null, and the scores allow nothing to go.
    """
    if params.channel_multiple != "auto":
        return _settle_ratio(architecture, scores, params, evidence)
    prices = cost.prices(architecture, params.objective, evidence.get("latency"))
    if "levels" in evidence:  # what is removed counts here, and not what it loses
        evidence = {**evidence, "levels": {block: 0 * curve for block, curve in evidence["levels"].items()}}
    single = settle(architecture, scores, params.model_copy(update={"channel_multiple": 1}), evidence)
    for multiple in fitting_multiples(architecture):
        coarse = params.model_copy(update={"channel_multiple": multiple})
        try:
            settled = _settle_ratio(architecture, scores, coarse, evidence)
            ladders = _ladders(architecture, scores, settled, prices)
            plan = descend(architecture, ladders, prices, settled, {**evidence, "scores": scores})
        except BudgetError:
            continue
        if abs(prices.removed(plan) - target_of(prices, single)) <= WITHIN * base_of(prices, params):
            return settled
    return single


def _settle_ratio(architecture: Architecture, scores: Columns, params: Allocate, evidence: Evidence) -> Allocate:
    """The params with a ratio: as given, or where it is null what `retention` finds that the scores allow."""
    if params.ratio is not None:
        return params
    prices = cost.prices(architecture, params.objective, evidence.get("latency"))
    wanted = wanted_removals(architecture, scores, params.network_type)
    target = wanted_total(build_ladders(architecture, scores, params, prices), wanted)
    if target == 0:
        raise BudgetError(
            "allocate.method: retention finds no block that can lose a unit under the floors, multiples and frozen "
            "layers; set allocate.ratio"
        )
    return params.model_copy(update={"ratio": target / base_of(prices, params)})


Improve = Callable[[Ladders, Depth, int, Allocate], Depth]
"""From ladders, a method's depths, the target and the params with the split settled to better depths."""


def allocate(
    architecture: Architecture,
    scores: Columns,
    params: Allocate,
    evidence: Evidence = NO_EVIDENCE,
    improve: Improve | None = None,
) -> Plan:
    """Decide which units stay.

    Args:
        scores: the importance table, rows in the order of `libprune.engine.tables.unit_index`.
        params: budget, method and limits; what they leave open is settled first.
        evidence: what else the method needs.
        improve: goes on from the depths of the method; None to leave it there.

    Raises:
        BudgetError: if the target cannot be reached under the floors, or not in the asked shape.
        LibpruneError: if layers may be removed that the model cannot do without.
    """
    if architecture.layers_stay and params.allow_layer_removal:
        raise LibpruneError(
            f"allocate.allow_layer_removal is true, but no layer of family {architecture.family!r} can be deleted: "
            f"{architecture.layers_stay}; set it to false"
        )
    prices = cost.prices(architecture, params.objective, evidence.get("latency"))
    evidence = {**evidence, "scores": scores}
    params = settle(architecture, scores, params, evidence)
    return descend(architecture, _ladders(architecture, scores, params, prices), prices, params, evidence, improve)


def descend(
    architecture: Architecture,
    ladders: Ladders,
    prices: Prices,
    params: Allocate,
    evidence: Evidence = NO_EVIDENCE,
    improve: Improve | None = None,
) -> Plan:
    """Decide which units stay, given the ladders; several ratios of one model can share them.

    Args:
        ladders: the allowed removals.
        prices: what they save.
        params: budget, method and limits, settled.
        evidence: what else the method needs.
        improve: goes on from the depths of the method; None to leave it there.

    Raises:
        BudgetError: if the target cannot be reached under the floors.
    """
    target = target_of(prices, params)
    depth = METHODS[params.method].allocate(architecture, ladders, target, params, evidence)
    if improve is not None:
        depth = improve(ladders, depth, target, params)
    plan = plan_of(architecture, ladders, depth)
    _check_reached(architecture, ladders, plan, target, prices, params, evidence)
    return plan


def _ladders(architecture: Architecture, scores: Columns, params: Allocate, prices: Prices) -> Ladders:
    """The ladders of the method: down to the floors, or to nothing where whole layers may collapse."""
    if not params.collapse_below:
        return build_ladders(architecture, scores, params, prices)
    free = [part for (_, part), unit in prices.unit.items() if unit == 0]
    if free:
        raise LibpruneError(
            f"allocate.collapse_below removes whole layers, but for allocate.objective: {params.objective} nothing is "
            f"gained by removing {free[0]} units; choose another objective, or collapse_below: 0"
        )
    return build_ladders(architecture, scores, params.model_copy(update={"min_groups": 0, "min_channels": 0}), prices)


def _check_reached(
    architecture: Architecture,
    ladders: Ladders,
    plan: Plan,
    target: int,
    prices: Prices,
    params: Allocate,
    evidence: Evidence,
) -> None:
    """Stop when more is asked for than the method can remove at all; coarse steps alone are no error."""
    removed = prices.removed(plan)
    cheapest = min((step.cost for steps in ladders.values() for step in steps), default=0)
    if target - removed <= cheapest:
        return
    most = _most(architecture, ladders, plan, prices, params, evidence)
    if most < target:
        base, what = base_of(prices, params), params.objective
        held = "".join(f"; {reason}" for reason in held_whole(architecture, params.shape == "per_layer"))
        raise BudgetError(
            f"allocate.ratio = {params.ratio} of the {params.ratio_of} {what} cannot be removed: under the floors, "
            f"frozen layers and shape {params.method} removes at most {most / base:.3f} ({most:,} of {target:,} "
            f"{what} asked for). Lower the ratio, min_groups, min_channels or the number of frozen layers{held}"
        )


def _most(
    architecture: Architecture, ladders: Ladders, plan: Plan, prices: Prices, params: Allocate, evidence: Evidence
) -> int:
    """The most that this method could remove.

    Which layers collapse depends on the target, so the plan's own choice of layers is kept.
    """
    if params.collapse_below:
        bounded = above_floors(architecture, ladders, params)
        deepest = {b: len((bounded if b[0] in plan.layers else ladders)[b]) for b in ladders}
    else:
        deepest = METHODS[params.method].allocate(architecture, ladders, prices.total, params, evidence)
    return prices.removed(plan_of(architecture, ladders, deepest))
