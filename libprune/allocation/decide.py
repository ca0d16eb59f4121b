"""The decision of a layout: from the scores and the params to the plan, its shape, and what is said of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from libprune.allocation.advice import Fixed, advise, fixed_scores
from libprune.allocation.allocate import (
    NO_EVIDENCE,
    Improve,
    allocate,
    allocation,
    removed_by,
    settle,
    share_of,
    target_of,
)
from libprune.allocation.block_worth import require_comparable, require_meaningful, with_worth
from libprune.allocation.evidence import read_evidence
from libprune.allocation.methods import Evidence
from libprune.allocation.widths import explain_multiple, tensor_parallel_sizes
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.cost import Prices
from libprune.engine.errors import BudgetError
from libprune.engine.plan import Plan, jaccard
from libprune.engine.tables import Columns, join_blocks
from libprune.pipeline.artifacts import Scores, read_scores
from libprune.pipeline.layout import Layout
from libprune.pipeline.methods import METHODS
from libprune.pipeline.sections import Allocate, Compute, Levels


@dataclass(frozen=True)
class Decision:
    """A plan, and what it was decided by.

    Attributes:
        plan: which units stay.
        shape: the shape that it is to be saved in.
        params: the params with all that they had left open.
        overlap: the plan's overlap with those of the criterion's components, by their names.
        prices: what the ratio, or the sizes told beside budgets, are counted in.
        programme: what an integer programme predicts, and how far that is from optimal; empty without one.
        budgets: what was asked for and reached of each; empty without budgets.
    """

    plan: Plan
    shape: str
    params: Allocate
    overlap: Mapping[str, float]
    prices: Prices
    programme: Mapping[str, Any]
    budgets: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What was decided for a layout, ready to be written and printed.

    Attributes:
        decision: the plan, and the shape that it is to be saved in.
        table: the importance table with the column `keep`.
        meta: how the scores and the plan were made.
        summary: the content of `metrics/allocation.json`.
        lines: what was asked for and removed, and advice, in sentences.
    """

    decision: Decision
    table: Columns
    meta: dict[str, Any]
    summary: dict[str, Any]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Ground:
    """What a decision for a layout rests on; decisions for several ratios can share it.

    Attributes:
        fixed: the scores under the gradient fix.
        scores: these scores with the worth of their blocks.
        evidence: what else the method needs.
    """

    fixed: Fixed
    scores: Scores
    evidence: Evidence


def read_ground(layout: Layout, asked: Allocate) -> Ground:
    """Read what the decision for any ratio rests on.

    Args:
        layout: where the artifacts are.
        asked: budget, method and limits; the ratio does not matter.

    Raises:
        LibpruneError: if an artifact is missing or foreign, or the scores may not be used as asked.
    """
    fixed = fixed_scores(layout, read_scores(layout), asked)
    require_meaningful(asked, fixed.scores.meta["scaling"])
    evidence = read_evidence(layout, fixed.scores, asked)
    return Ground(fixed, with_worth(fixed.scores, asked, evidence), evidence)


def decide_layout(layout: Layout, asked: Allocate, compute: Compute, levels: Levels) -> Outcome:
    """Turn the scores of a layout and a budget into a plan.

    The gradient fix and the worth of blocks change the scores first; then the method decides, and goes on by measuring
    whole plans where `allocate.evaluations` asks for it.

    Args:
        layout: where the artifacts are; nothing is written.
        asked: budget, method and limits.
        compute: how a search runs the model.
        levels: whose calibration sequences a search uses.

    Raises:
        LibpruneError: if an artifact is missing or foreign, the scores may not be used as asked, or the budget or the
            shape cannot be had.
    """
    ground = read_ground(layout, asked)
    fixed, scores, evidence = ground.fixed, ground.scores, ground.evidence
    search = None
    if METHODS[asked.method].improves and asked.evaluations:
        from libprune.allocation.search import Search  # needs transformers, which the other decisions do not

        search = Search(layout, scores, compute, levels, evidence)
    decision = decide(scores, asked, evidence, search)
    settled = decision.params
    diagnosis = advise(fixed, decision.plan, settled)
    result = summary(scores.architecture, decision) | {"diagnosis": diagnosis}
    result |= whole_removals(scores.architecture, decision.plan, evidence)
    if search is not None and (best := search.refined) is not None:
        result |= {"divergence": best.divergence, "divergence_of": dict(best.starts), "trials": best.evaluations}
    made = {
        "ratio_asked": asked.ratio,
        "shape": decision.shape,
        "tensor_parallel": result["tensor_parallel"],
        "kept_set_overlap": dict(decision.overlap),
        "diagnosis": diagnosis,
        # without the seconds, so that the same decision is the same file
        "programme": {key: value for key, value in decision.programme.items() if key != "seconds"},
        "reached": [dict(one) for one in decision.budgets],
    }
    if scores.architecture.heads == "queries":
        made["heads"] = {part: shape.groups for part, shape in scores.architecture.parts.items() if shape.outer}
    return Outcome(
        decision,
        scores.table | {"keep": join_blocks(scores.architecture, decision.plan.keep)},
        {**scores.meta, **settled.model_dump(), **made},
        result,
        tuple(_lines(scores.architecture, result, asked, decision)),
    )


def _lines(architecture: Architecture, result: Mapping[str, Any], asked: Allocate, decision: Decision) -> Iterator[str]:
    yield _removed(result, asked, decision.params, decision.shape)
    if asked.ratio and not result["share_removed"]:
        yield (
            f"note: nothing is removed, since one step of allocate.method: {asked.method} takes more than the ratio "
            f"{asked.ratio:.3g}; raise it, lower allocate.channel_multiple, or set allocate.shape: per_layer"
        )
    yield from map(budget_line, decision.budgets)
    if decision.programme:
        yield programme_line(decision.programme)
    if "depth" in result:
        yield _whole(architecture, result["depth"])
    if why := explain_multiple(architecture, asked, result["channel_multiple"], result["share_removed"]):
        yield why
    if result["tensor_parallel"] is not None:
        sizes = ", ".join(map(str, result["tensor_parallel"]))
        yield f"tensor parallelism: {sizes} (numbers of devices that heads and channels can be divided over)"
    yield from (f"note: {text}" for text in result["diagnosis"]["advice"])


def whole_removals(architecture: Architecture, plan: Plan, evidence: Evidence) -> dict[str, Any]:
    """What `metrics/allocation.json` says of the layers and parts that go whole, in the order of the depth stage."""
    if "depth" not in evidence:
        return {}
    steps = [(step, divergence) for step, (gone, divergence) in enumerate(evidence["depth"]) if gone <= plan.removed]
    number, divergence = steps[-1]
    order = [gone for gone, _ in evidence["depth"][: number + 1]]
    taken = [sorted(after - before) for before, after in pairwise(order)]
    named = [{"layer": blocks[0][0], "parts": [part for _, part in blocks]} for blocks in taken]
    return {"depth": {"removals": named, "divergence": divergence}}


def _removed(result: Mapping[str, Any], asked: Allocate, settled: Allocate, shape: str) -> str:
    shares = [100 * result[f"{what}share_removed"] for what in ("decoder_", "total_")]
    sizes = "{:.2f} % of the decoder's parameters, {:.2f} % of all".format(*shares) + f"; shape {shape}"
    if result["ratio"] is None:
        return f"under the budgets, removed {sizes}"
    source = "asked for" if asked.ratio is not None else "retention allows"
    return (
        f"{source} {100 * result['ratio']:.2f} % of the {settled.ratio_of} {settled.objective}, removed "
        f"{100 * result['share_removed']:.2f} %: {sizes}"
    )


def budget_line(budget: Mapping[str, Any]) -> str:
    """What was asked for and reached of one budget, in a sentence."""
    binds = "binds" if budget["binds"] else "does not bind"
    return (
        f"budget {budget['name']}: {100 * budget['share_asked']:g} % may stay, {100 * budget['share']:.2f} % stays "
        f"({_amount(budget['reached'])} of {_amount(budget['dense'])} {cost.COUNTED[budget['name']]}; it {binds})"
    )


def _amount(value: int | float) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and value < 1000 else f"{value:,.0f}"


def programme_line(programme: Mapping[str, Any]) -> str:
    """What an integer programme predicts, how far that is from optimal, and what took how long, in a sentence."""
    frame = f", with {programme['removals']} whole removals" if programme["removals"] else ""
    frame += f", {programme['width']} columns of the residual stream" if programme["width"] is not None else ""
    return (
        f"integer programme: predicted divergence {programme['divergence']:.4f} nats a token{frame}, optimal to "
        f"{100 * programme['gap']:.2f} %, {programme['seconds']:.1f} s"
    )


def _whole(architecture: Architecture, depth: Mapping[str, Any]) -> str:
    """What goes whole, in the order in which it was decided."""
    named = [
        str(layer) if len(parts) == len(architecture.parts_of(layer)) else f"{layer} ({', '.join(parts)})"
        for layer, parts in ((one["layer"], one["parts"]) for one in depth["removals"])
    ]
    if not named:
        return "no whole layer or part fits into the ratio"
    return (
        f"whole layers or parts that go, in the order of the depth stage: {', '.join(named)}; divergence without them "
        f"{depth['divergence']:.4f} nats per token"
    )


def result_shape(architecture: Architecture, plan: Plan, params: Allocate) -> str:
    """`uniform` or `per_layer`, as asked for or as the plan allows.

    Raises:
        BudgetError: if `uniform` is asked for, or nothing else can be written, and the plan is not.
    """
    reason = _not_uniform(architecture, plan)
    if architecture.alike and (reason or params.shape == "per_layer"):
        raise BudgetError(
            f"the layers of a {architecture.family} model can only be written all alike, but "
            f"{reason or 'allocate.shape is per_layer'}; choose allocate.method: uniform without frozen layers, and "
            "allocate.shape: auto"
        )
    if params.shape == "uniform" and reason:
        raise BudgetError(
            f"allocate.shape is uniform, but {reason}; choose allocate.method: uniform without frozen layers, "
            "or allocate.shape: per_layer"
        )
    return "per_layer" if reason or params.shape == "per_layer" else "uniform"


def _not_uniform(architecture: Architecture, plan: Plan) -> str | None:
    sizes = {axis_and_size for layer in plan.layers for axis_and_size in plan.sizes(architecture, layer).items()}
    if not plan.uniform or len(sizes) > len(dict(sizes)):
        return "the layers of this plan differ in width"
    for layer, part in plan.keep:
        shape, kept = architecture.parts[part], plan.kept(layer, part)
        groups = int(shape.groups_left(plan.keep[layer, part]).sum()) if shape.outer else None
        if layer in plan.layers and not shape.says(kept, groups):
            in_groups = f" in {groups} groups" if groups is not None else ""
            return f"the stock config of this family cannot say {kept} {part} units{in_groups}"
    return None


def decide(
    scores: Scores, params: Allocate, evidence: Evidence = NO_EVIDENCE, improve: Improve | None = None
) -> Decision:
    """Check that the scores may be used as asked, settle what the params leave open, allocate, and settle the shape.

    Raises:
        LibpruneError: if the scores do not compare across layers and the method needs that, or the
            budget or shape cannot be had.
    """
    architecture, table, comparable = scores.architecture, scores.table, scores.compares(params.worth)
    require_comparable(scores.meta, params)
    priced = params.objective, evidence.get("latency")
    prices = cost.prices(architecture, *priced, params.columns)
    unit = table["cost"]
    if comparable and params.objective != "parameters":
        unit = np.concatenate([np.full(architecture.units(block[1]), prices.unit[block]) for block in prices.unit])
        unit = np.maximum(unit, 1)  # a unit without a price is in no ladder, but for a query head in a group with one
        table = table | {"score": table["importance"] / unit}
    if params.split == "auto":
        params = params.model_copy(update={"split": "importance" if comparable else "proportional"})
    params = settle(architecture, table, params, evidence)
    found = allocation(architecture, table, params, evidence, improve)
    plan = found.plan
    components = [name for name in table if name in COMPARED_COMPONENTS and scores.meta["scaling"] == "none"]
    overlap = {}
    for name in components if len(components) > 1 else []:
        alone = table | {"importance": table[name], "score": table[name] / unit}
        overlap[name] = jaccard(plan.column, allocate(architecture, alone, params, evidence).column)
    shape, prices = result_shape(architecture, plan, params), cost.prices(architecture, *priced, plan.width)
    settled = params.model_copy(update={"width": plan.width})
    return Decision(plan, shape, settled, overlap, prices, found.programme, found.budgets)


COMPARED_COMPONENTS = ("taylor", "fisher")
"""Parts of a second-order criterion: a kept set equal to the first's says that the second did nothing."""


def summary(architecture: Architecture, decision: Decision) -> dict[str, Any]:
    """The content of `metrics/allocation.json`."""
    prices, params = decision.prices, decision.params
    left, gone = cost.size(architecture, decision.plan), cost.prices(architecture, "parameters").gone
    removed, decoder = architecture.total_parameters - left.total, architecture.decoder_parameters - left.decoder
    taken = removed_by(prices, decision.plan, params)
    uniform = decision.shape == "uniform"
    return {
        "objective": params.objective,
        "ratio": params.ratio,
        "target": None if params.ratio is None else target_of(prices, params),
        "removed": taken,
        "share_removed": share_of(prices, taken, params),
        "removed_parameters": removed,
        "decoder_share_removed": decoder / architecture.decoder_parameters,
        "total_share_removed": (removed + gone) / architecture.given_parameters,
        "width": decision.plan.width,
        "channel_multiple": params.channel_multiple,
        "tensor_parallel": tensor_parallel_sizes(architecture, decision.plan) if uniform else None,
        "kept_set_overlap": dict(decision.overlap),
        **({"programme": dict(decision.programme)} if decision.programme else {}),
        **({"budgets": [dict(one) for one in decision.budgets]} if decision.budgets else {}),
    }
