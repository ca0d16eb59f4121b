"""Allocation: which units go, so that a given share of the parameters is removed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from libprune.allocation.advice import held_whole
from libprune.allocation.frames import Frame, find, require_ordered, without
from libprune.allocation.hgsp import block_factors, collapsing, weighted
from libprune.allocation.ladders import Ladders, build_ladders, forced_by, free_steps, plan_of
from libprune.allocation.methods import Depth, Evidence, Order, allocate_global
from libprune.allocation.retention import wanted_removals, wanted_total
from libprune.allocation.widths import WITHIN, fine_enough, fitting_multiples
from libprune.engine import cost
from libprune.engine.architecture import Architecture, Block
from libprune.engine.cost import Prices
from libprune.engine.errors import BudgetError, LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns
from libprune.pipeline.methods import METHODS
from libprune.pipeline.sections import Allocate

NO_EVIDENCE: Evidence = {}


def target_of(prices: Prices, params: Allocate) -> int:
    """How much of the objective is to go, beyond what went with the vocabulary; the ratio is settled."""
    assert params.ratio is not None
    return max(0, round(params.ratio * base_of(prices, params)) - gone_of(prices, params))


def base_of(prices: Prices, params: Allocate) -> int:
    """How much of the objective the ratio is of: in the layers, or in the whole model as it was given."""
    return prices.decoder if params.ratio_of == "decoder" else prices.total + prices.gone


def gone_of(prices: Prices, params: Allocate) -> int:
    """How much of what the ratio is of went with rows of the vocabulary; the layers have none."""
    return 0 if params.ratio_of == "decoder" else prices.gone


def share_of(prices: Prices, removed: int, params: Allocate) -> float:
    """The share of what the ratio is of that is gone, where so much is removed beside the rows of the vocabulary."""
    return (removed + gone_of(prices, params)) / base_of(prices, params)


def settle(architecture: Architecture, scores: Columns, params: Allocate, evidence: Evidence = NO_EVIDENCE) -> Allocate:
    """The params with numbers where they leave one open: the multiple of channels (`auto`), and the ratio (null).

    `auto` is the largest multiple that the dense width is one of too, that is at most half of what a layer loses on
    average, and at which the plan of the method, before a search improves it, removes a share within one point of the
    one asked for. Where the ratio is null, the share is compared with what is removed in single channels. 1 if there is
    none.

    Args:
        scores: the importance table.
        params: budget, method and limits.
        evidence: what else the method needs.

    Raises:
        BudgetError: if the ratio is null, and the scores allow nothing to go.
    """
    if params.channel_multiple != "auto":
        return _settle_ratio(architecture, scores, params, evidence)
    prices = cost.prices(architecture, params.objective, evidence.get("latency"), params.columns)
    if "levels" in evidence:  # what is removed counts here, and not what it loses
        evidence = {**evidence, "levels": {block: 0 * curve for block, curve in evidence["levels"].items()}}
    single = settle(architecture, scores, params.model_copy(update={"channel_multiple": 1}), evidence)
    for multiple in fitting_multiples(architecture):
        coarse = params.model_copy(update={"channel_multiple": multiple, "nested": ()})
        try:
            settled = _settle_ratio(architecture, scores, coarse, evidence)
            ladders = build_ladders(architecture, scores, settled, prices)
            found = descend(architecture, ladders, prices, settled, {**evidence, "scores": scores})
        except BudgetError:
            continue
        if _as_asked(architecture, found, settled, single, prices, evidence):
            return settled.model_copy(update={"nested": params.nested})
    return single


def _as_asked(
    architecture: Architecture,
    found: "Allocated",
    params: Allocate,
    single: Allocate,
    prices: Prices,
    evidence: Evidence,
) -> bool:
    """Whether a plan removes what was asked for, or what binds of the budgets, to within one point and in small steps.

    Args:
        prices: at the width that the params give.
    """
    multiple = int(params.channel_multiple)
    if found.budgets:
        share = 1 - min(one["share_asked"] for one in found.budgets)
        near = min(one["share_asked"] - one["share"] for one in found.budgets) <= WITHIN
        return near and fine_enough(architecture, multiple, share)
    if found.plan.width != params.columns:
        prices = cost.prices(architecture, params.objective, evidence.get("latency"), found.plan.width)
    target, columns = target_of(prices, single), prices.narrowing.get(params.ratio_of, 0)
    gone = [block for block in found.plan.keep if block[0] not in found.plan.layers]
    whole = prices.removed(without(architecture, gone))
    left = prices.decoder - prices.narrowing.get("decoder", 0) - whole  # of the layers whose channels can go
    share = (target - columns - whole) / left if left else 0.0
    if not fine_enough(architecture, multiple, share):
        return False
    return abs(removed_by(prices, found.plan, params) - target) <= WITHIN * base_of(prices, params)


def _settle_ratio(architecture: Architecture, scores: Columns, params: Allocate, evidence: Evidence) -> Allocate:
    """The params with a ratio: as given, or where it is null what `retention` finds that the scores allow."""
    if params.ratio is not None or params.budgets.asked:
        return params
    prices = cost.prices(architecture, params.objective, evidence.get("latency"), params.columns)
    wanted = wanted_removals(architecture, scores, params.network_type)
    target = wanted_total(build_ladders(architecture, scores, params, prices), wanted)
    if target == 0:
        raise BudgetError(
            "allocate.method: retention finds no block that can lose a unit under the floors, multiples and frozen "
            "layers; set allocate.ratio"
        )
    return params.model_copy(update={"ratio": share_of(prices, target, params)})


def left_to_go(prices: Prices, params: Allocate) -> int:
    """How much of the target is left for units and layers, after what goes with the vocabulary and a given width.

    Args:
        prices: of the model at that width.
        params: the ratio, settled.

    Raises:
        BudgetError: if more than the target is gone already.
    """
    assert params.ratio is not None
    columns, rows = prices.narrowing.get(params.ratio_of, 0), gone_of(prices, params)
    left = round(params.ratio * base_of(prices, params)) - rows - columns
    if left >= 0:
        return left
    ways = {f"allocate.width = {params.width}": columns, "prepare.vocabulary": rows}
    taken = " and ".join(way for way, amount in ways.items() if amount)
    verb = "takes" if not (columns and rows) else "take"
    raise BudgetError(
        f"{taken} alone {verb} {share_of(prices, columns, params):.3f} of the {params.ratio_of} {params.objective}, "
        f"more than allocate.ratio = {params.ratio:.4g}; raise the ratio, or keep more of "
        f"{'the columns' if columns else 'the vocabulary'}"
    )


def removed_by(prices: Prices, plan: Plan, params: Allocate) -> int:
    """How much of the objective a plan removes in the scope of the ratio, columns of the residual stream included."""
    return prices.removed(plan) + prices.narrowing.get(params.ratio_of, 0)


Improve = Callable[[Ladders, Depth, int, Allocate], Depth]
"""From ladders, a method's depths, the target and the params with the split settled to better depths."""


@dataclass(frozen=True)
class Allocated:
    """A plan, and what an integer programme says of it.

    Attributes:
        plan: which units stay.
        frame: what goes whole by the choice of a programme; None without one.
        programme: the divergence that it predicts, and how far that is from optimal; empty without one.
        budgets: what was asked for and reached of each; empty without budgets.
    """

    plan: Plan
    frame: Frame | None
    programme: Mapping[str, Any]
    budgets: Sequence[Mapping[str, Any]]


def allocate(
    architecture: Architecture,
    scores: Columns,
    params: Allocate,
    evidence: Evidence = NO_EVIDENCE,
    improve: Improve | None = None,
) -> Plan:
    """Decide which units stay; `allocation` without what is said of it."""
    return allocation(architecture, scores, params, evidence, improve).plan


def allocation(
    architecture: Architecture,
    scores: Columns,
    params: Allocate,
    evidence: Evidence = NO_EVIDENCE,
    improve: Improve | None = None,
) -> Allocated:
    """Decide which units stay.

    The plans of smaller ratios that this one is to contain are made first, each within the next.

    Args:
        scores: the importance table, rows in the order of `libprune.engine.tables.unit_index`.
        params: budget, method and limits; what they leave open is settled first.
        evidence: what else the method needs.
        improve: goes on from the depths of the method; None to leave it there.

    Raises:
        BudgetError: if the target or a budget cannot be reached under the floors, or not in the asked shape.
        LibpruneError: if layers may be removed that the model cannot do without.
    """
    if architecture.layers_stay and params.may_empty:
        raise LibpruneError(
            f"allocate.depth is units, but no layer of family {architecture.family!r} can be deleted: "
            f"{architecture.layers_stay}; set it to none"
        )
    prices = cost.prices(architecture, params.objective, evidence.get("latency"), params.columns)
    evidence = {**evidence, "scores": scores}
    params = settle(architecture, scores, params, evidence)
    ladders = build_ladders(architecture, scores, params, prices)
    within = None
    for ratio in sorted(params.nested):
        if params.ratio is not None and ratio >= params.ratio:
            raise BudgetError(f"allocate.nested has {ratio}, which is not smaller than the ratio {params.ratio:.4g}")
        smaller = params.model_copy(update={"ratio": ratio})
        try:
            within = _containing(architecture, ladders, prices, smaller, evidence, None, within)
        except BudgetError as error:
            raise BudgetError(f"allocate.nested, for its ratio {ratio} in place of {params.ratio}: {error}") from error
        ladders = forced_by(ladders, within.plan)
    return _containing(architecture, ladders, prices, params, evidence, improve, within)


def _containing(
    architecture: Architecture,
    ladders: Ladders,
    prices: Prices,
    params: Allocate,
    evidence: Evidence,
    improve: Improve | None,
    within: Allocated | None,
) -> Allocated:
    """`descend`, refused where the plan keeps what that of a smaller ratio removes."""
    found = descend(architecture, ladders, prices, params, evidence, improve, within)
    if within is not None and any((keep & ~within.plan.keep[block]).any() for block, keep in found.plan.keep.items()):
        whole = ", set allocate.layers, or allocate.depth: none" if params.ordered else ""
        raise BudgetError(
            f"allocate.method: {params.method} finds no plan for the ratio {params.ratio} that contains those of the "
            f"smaller ratios in allocate.nested; leave some of them out{whole}, or choose another method"
        )
    return found


def descend(
    architecture: Architecture,
    ladders: Ladders,
    prices: Prices,
    params: Allocate,
    evidence: Evidence = NO_EVIDENCE,
    improve: Improve | None = None,
    within: Allocated | None = None,
) -> Allocated:
    """Decide which units stay, given the ladders; several ratios of one model can share them.

    What goes whole is settled first; the method removes the rest of the target from what stays.

    Args:
        ladders: the allowed removals of all blocks.
        prices: what they save.
        params: budget, method and limits, settled.
        evidence: what else the method needs.
        improve: goes on from the depths of the method; None to leave it there.
        within: the plan of a smaller ratio that this one contains; its removals are forced by the ladders.

    Raises:
        BudgetError: if the target cannot be reached under the floors, or has no room for so many whole removals.
    """
    if METHODS[params.method].programme:
        return _by_programme(architecture, ladders, params, evidence, improve, within)
    target = left_to_go(prices, params)
    gone = removed_whole(architecture, target, prices, params, evidence, within)
    left = {block: steps for block, steps in ladders.items() if block not in gone}
    rest = target - prices.removed(without(architecture, gone))
    depth = METHODS[params.method].allocate(architecture, left, rest, params, evidence)
    if improve is not None:
        depth = improve(left, depth, rest, params)
    plan = replace(plan_of(architecture, left, depth), width=params.columns)
    _check_reached(architecture, left, plan, target, prices, params, evidence)
    return Allocated(plan, None, {}, ())


def _by_programme(
    architecture: Architecture,
    ladders: Ladders,
    params: Allocate,
    evidence: Evidence,
    improve: Improve | None,
    within: Allocated | None,
) -> Allocated:
    """The plan of the integer programme in the best of its frames."""
    if params.ratio is not None:  # which has room for what goes by a given number, or not
        prices = cost.prices(architecture, params.objective, evidence.get("latency"), params.columns)
        left = left_to_go(prices, params)
        if params.ordered and params.layers is not None:
            _first_of_the_order(architecture, left, prices, params, evidence["depth"], within)
    found = find(architecture, ladders, params, evidence, None if within is None else within.frame)
    frame, depth = found.frame, found.solution.depth
    prices = cost.prices(architecture, params.objective, evidence.get("latency"), frame.width)
    target = 0
    if params.ratio is not None:
        target = max(0, target_of(prices, params) - prices.narrowing.get(params.ratio_of, 0))
    if improve is not None and params.ratio is not None:
        depth = improve(found.ladders, depth, target - prices.removed(without(architecture, frame.gone)), params)
    plan = replace(plan_of(architecture, found.ladders, depth), width=frame.width)
    narrow = params.model_copy(update={"width": frame.width})
    if not found.passed:
        _check_reached(architecture, found.ladders, plan, target, prices, narrow, evidence)
    return Allocated(plan, frame, found.record, found.budgets)


def removed_whole(
    architecture: Architecture,
    target: int,
    prices: Prices,
    params: Allocate,
    evidence: Evidence,
    within: Allocated | None,
) -> frozenset[Block]:
    """The blocks that go whole before the method removes units: by a measured order, or as layers that collapse.

    Args:
        target: how much of the objective to remove.
        prices: what it is counted in.
        params: limits, settled.
        evidence: the order, or what `hgsp` weighs layers by.
        within: the plan of a smaller ratio, which is removed in any case.

    Raises:
        BudgetError: if more removals are asked for than were measured, or than the target has room for.
    """
    if params.ordered:
        return _first_of_the_order(architecture, target, prices, params, evidence["depth"], within)
    if not params.collapse_below:
        return frozenset()
    require_layers_priced(prices, params)
    no_floors = params.model_copy(update={"min_groups": 0, "min_channels": 0})
    ladders = build_ladders(architecture, evidence["scores"], no_floors, prices)
    ranked = weighted(ladders, block_factors(architecture, evidence["sensitivity"], params))
    depth = allocate_global(architecture, ranked, target, params, evidence)
    gone = collapsing(architecture, ladders, depth, target, params.collapse_below)
    return frozenset(block for block in architecture.blocks() if block[0] in gone)


def _first_of_the_order(
    architecture: Architecture,
    target: int,
    prices: Prices,
    params: Allocate,
    order: Order,
    within: Allocated | None,
) -> frozenset[Block]:
    """What the first removals of an order take away: as many as asked for, or as many as fit into the target.

    What the plan of a smaller ratio removes from the layers that stay takes its share of the target, too.
    """
    plans = [without(architecture, gone) for gone, _ in order]
    costs = [prices.removed(plan if within is None else plan.and_also(within.plan)) for plan in plans]
    # the plan of a smaller ratio may have taken one step more than its own target, and so more than this one
    room = target if within is None else max(target, prices.removed(within.plan))
    fitting = max(number for number, price in enumerate(costs) if price <= room)
    require_ordered(params.layers, order)
    wanted = fitting if params.layers is None else params.layers
    if params.layers is not None and costs[wanted] > target:
        columns = prices.narrowing.get(params.ratio_of, 0)
        beside = f", with the columns beyond allocate.width = {params.width}" if columns else ""
        share, what = share_of(prices, columns + costs[wanted], params), params.objective
        raise BudgetError(
            f"allocate.layers: {wanted} would take {share:.3f} of the {params.ratio_of} {what}{beside}, more "
            f"than allocate.ratio = {params.ratio}, which has room for {fitting}; lower allocate.layers, or raise the "
            "ratio"
        )
    return order[wanted][0]


def require_layers_priced(prices: Prices, params: Allocate) -> None:
    """Stop where layers are to collapse, but the objective gains nothing by one of their parts.

    Raises:
        LibpruneError: naming the part.
    """
    free = [part for (_, part), unit in prices.unit.items() if unit == 0]
    if free:
        raise LibpruneError(
            f"allocate.collapse_below removes whole layers, but for allocate.objective: {params.objective} nothing is "
            f"gained by removing {free[0]} units; choose another objective, or collapse_below: 0"
        )


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
    cheapest = min((step.cost for steps in ladders.values() for step in free_steps(steps)), default=0)
    if target - removed <= cheapest:
        return
    deepest = METHODS[params.method].allocate(architecture, ladders, prices.total, params, evidence)
    most = prices.removed(plan_of(architecture, ladders, deepest))
    if most < target:
        narrowing, what = prices.narrowing.get(params.ratio_of, 0), params.objective
        most, target = most + narrowing, target + narrowing
        share = share_of(prices, most, params)
        held = "".join(f"; {reason}" for reason in held_whole(architecture, params.shape == "per_layer"))
        raise BudgetError(
            f"allocate.ratio = {params.ratio} of the {params.ratio_of} {what} cannot be removed: under the floors, "
            f"frozen layers and shape {params.method} removes at most {share:.3f} ({most:,} of {target:,} "
            f"{what} asked for). Lower the ratio, min_groups, min_channels or the number of frozen layers{held}"
        )
