"""Allocation: which units go, so that a given share of the parameters is removed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.allocation.advice import held_whole
from libprune.allocation.hgsp import above_floors
from libprune.allocation.ladders import Ladders, build_ladders, plan_of
from libprune.allocation.methods import METHODS, Depth, Evidence
from libprune.allocation.retention import wanted_removals, wanted_total
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.cost import Prices
from libprune.engine.errors import BudgetError, LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns
from libprune.pipeline.sections import Allocate

NO_EVIDENCE = Evidence()


def target_of(prices: Prices, params: Allocate) -> int:
    """How much of the objective is to go; the ratio is settled."""
    assert params.ratio is not None
    return round(params.ratio * base_of(prices, params))


def base_of(prices: Prices, params: Allocate) -> int:
    """How much of the objective the ratio is of."""
    return prices.decoder if params.ratio_of == "decoder" else prices.total


def settle_ratio(architecture: Architecture, scores: Columns, params: Allocate, evidence: Evidence) -> Allocate:
    """The params with a ratio: as given, or where it is null what `retention` finds that the scores allow.

    Raises:
        BudgetError: if they allow nothing to go.
    """
    if params.ratio is not None:
        return params
    prices = cost.prices(architecture, params.objective, evidence.latency)
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
        architecture: the model's description.
        scores: the importance table, rows in the order of `libprune.engine.tables.unit_index`.
        params: budget, method and limits.
        evidence: what else the method needs.
        improve: goes on from what the method found; None to leave it there.

    Raises:
        BudgetError: if the target cannot be reached under the floors, or not in the asked shape.
        LibpruneError: if layers may be removed that the model cannot do without.
    """
    if architecture.layers_stay and params.allow_layer_removal:
        raise LibpruneError(
            f"allocate.allow_layer_removal is true, but no layer of family {architecture.family!r} can be deleted: its "
            "norms work on the residual stream itself; set it to false"
        )
    prices = cost.prices(architecture, params.objective, evidence.latency)
    if params.method == "retention":
        evidence = replace(evidence, wanted=wanted_removals(architecture, scores, params.network_type))
    return descend(architecture, _ladders(architecture, scores, params, prices), prices, params, evidence, improve)


def descend(
    architecture: Architecture,
    ladders: Ladders,
    prices: Prices,
    params: Allocate,
    evidence: Evidence = NO_EVIDENCE,
    improve: Improve | None = None,
) -> Plan:
    """The same from ladders that are built already, for several ratios.

    Raises:
        BudgetError: as `allocate`.
    """
    target = target_of(prices, params)
    depth = METHODS[params.method](architecture, ladders, target, params, evidence)
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


def result_shape(architecture: Architecture, plan: Plan, params: Allocate) -> str:
    """`uniform` or `per_layer`, as asked for or as the plan allows.

    Raises:
        BudgetError: if `uniform` is asked for and the plan is not.
    """
    reason = _not_uniform(architecture, plan)
    if params.shape == "uniform" and reason:
        raise BudgetError(
            f"allocate.shape is uniform, but {reason}; choose allocate.method: uniform without frozen layers, "
            "or allocate.shape: per_layer"
        )
    return "per_layer" if reason or params.shape == "per_layer" else "uniform"


def _not_uniform(architecture: Architecture, plan: Plan) -> str | None:
    if not plan.uniform:
        return "the layers of this plan differ in width"
    layer = plan.layers[0]
    for part, shape in architecture.parts.items():
        if not shape.says(plan.kept(layer, part)):
            return f"the stock config of this family cannot say {plan.kept(layer, part)} {part} units"
    return None


@dataclass(frozen=True)
class Decision:
    """A plan, the shape it is to be saved in, how it split the budget, its overlap with the plans of
    the criterion's components, and the prices that the budget was counted in.
    """

    plan: Plan
    shape: str
    split: str
    overlap: Mapping[str, float]
    prices: Prices

    @property
    def keep_column(self) -> NDArray[np.bool_]:
        """The plan as a column of the importance table."""
        return np.concatenate(list(self.plan.keep.values()))


def decide(
    architecture: Architecture,
    scores: Columns,
    meta: Mapping[str, Any],
    params: Allocate,
    evidence: Evidence = NO_EVIDENCE,
    improve: Improve | None = None,
) -> Decision:
    """Check that the scores may be used as asked, allocate, and settle the shape.

    Raises:
        LibpruneError: if the scores do not compare across layers and the method needs that, or the
            budget or shape cannot be had.
    """
    comparable = compares(meta, params)
    require_comparable(meta, params)
    prices = cost.prices(architecture, params.objective, evidence.latency)
    unit = scores["cost"]
    if comparable and params.objective != "parameters":
        unit = np.concatenate([np.full(architecture.units(block[1]), prices.unit[block]) for block in prices.unit])
        unit = np.maximum(unit, 1)  # a unit without a price is in no ladder
        scores = scores | {"score": scores["importance"] / unit}
    if params.split == "auto":
        params = params.model_copy(update={"split": "importance" if comparable else "proportional"})
    plan = allocate(architecture, scores, params, evidence, improve)
    components = [name for name in scores if name in COMPARED_COMPONENTS and meta["scaling"] == "none"]
    overlap = {}
    for name in components if len(components) > 1 else []:
        alone = scores | {"importance": scores[name], "score": scores[name] / unit}
        overlap[name] = jaccard(plan, allocate(architecture, alone, params, evidence))
    return Decision(plan, result_shape(architecture, plan, params), params.split, overlap, prices)


def compares(meta: Mapping[str, Any], params: Allocate) -> bool:
    """Whether the scores compare between layers and types as they are."""
    return params.worth != "none" or (meta["comparable"] and meta["scaling"] == "none")


COMPARED_COMPONENTS = ("taylor", "fisher")
"""Parts of a second-order criterion: a kept set equal to the first's says that the second did nothing."""


def require_comparable(meta: Mapping[str, Any], params: Allocate) -> None:
    """Stop where a method would rank unlike things.

    Raises:
        LibpruneError: saying what to set.
    """
    method, scaling = params.method, meta["scaling"]
    if method in {"global", "hgsp"} and not meta["comparable"] and scaling == "none":
        scalings = "zscore, minmax or rank" if method == "global" else "rank"
        raise LibpruneError(
            f"{meta['criterion']} compares only within a layer and type, so allocate.method: {method} would rank "
            f"unlike things; set score.scaling to {scalings}, or allocate.method to uniform"
        )
    if method == "global" and scaling != "none" and params.worth == "none" and meta["fusion"] not in {"none", "best"}:
        raise LibpruneError(
            f"{meta['criterion']} is fused from criteria with one scale in every layer, which leaves no layer a level "
            "of its own for allocate.method: global; with score.scaling: rank set allocate.worth to sensitivity or "
            "functional, or allocate.method to hgsp; with another choose uniform or functional"
        )
    if method == "hgsp" and scaling not in {"none", "rank"}:
        raise LibpruneError(
            "allocate.method: hgsp multiplies scores by what their block is worth, so they must be positive, but "
            f"score.scaling: {scaling} makes the lowest of every block 0 or less; set it to rank"
        )


def summary(architecture: Architecture, decision: Decision, params: Allocate) -> dict[str, Any]:
    """The content of `metrics/allocation.json`."""
    prices, parameters = decision.prices, cost.prices(architecture, "parameters").removed(decision.plan)
    return {
        "objective": params.objective,
        "ratio": params.ratio,
        "target": target_of(prices, params),
        "removed": prices.removed(decision.plan),
        "share_removed": prices.removed(decision.plan) / base_of(prices, params),
        "removed_parameters": parameters,
        "decoder_share_removed": parameters / architecture.decoder_parameters,
        "total_share_removed": parameters / architecture.total_parameters,
        "kept_set_overlap": dict(decision.overlap),
    }


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
    """The most that the method removes; of collapsed layers those that the plan has chosen for its own target."""
    if params.collapse_below:
        bounded = above_floors(architecture, ladders, params)
        deepest = {b: len((bounded if b[0] in plan.layers else ladders)[b]) for b in ladders}
    else:
        deepest = METHODS[params.method](architecture, ladders, prices.total, params, evidence)
    return prices.removed(plan_of(architecture, ladders, deepest))


def jaccard(one: Plan, two: Plan) -> float:
    """Overlap of the kept sets of two plans: kept in both over kept in either."""
    both = sum(int((one.keep[block] & two.keep[block]).sum()) for block in one.keep)
    either = sum(int((one.keep[block] | two.keep[block]).sum()) for block in one.keep)
    return both / either
