"""Plans for many ratios from what was measured once, with the size, speed and loss that they promise."""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from libprune.allocation.allocate import removed_by, share_of
from libprune.allocation.decide import Decision, Ground, decide, read_ground
from libprune.allocation.evidence import read_latency
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.cost import Prices, Size
from libprune.engine.errors import BudgetError, ParamsError
from libprune.engine.plan import Plan
from libprune.engine.tables import join_blocks
from libprune.pipeline.artifacts import read_json, require
from libprune.pipeline.layout import Layout
from libprune.pipeline.methods import METHODS
from libprune.pipeline.params import Params
from libprune.pipeline.sections import Allocate

DEFAULT = tuple(number / 10 for number in range(1, 10))
"""The ratios of a curve for which none are named."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element of a weight, by the type that models are stored in."""
STATE_BYTES = 4
"""Bytes of an element of a recurrent state, which is kept in float32."""


@dataclass(frozen=True)
class Planned:
    """A plan for one ratio, and what it promises.

    Attributes:
        ratio: the share that was asked for; 0 for the dense model.
        plan: which units stay.
        shape: the shape that it would be saved in.
        removed: the share of the objective that goes, with what went with the vocabulary where the ratio is of it too.
        size: parameters, operations and cache that remain.
        weights: bytes of the weights, in the type that the pruned model is stored in.
        cache: bytes of the KV cache for a token.
        state: bytes of recurrent states for a sequence.
        seconds: of one forward pass, by the lines that the latency stage has fitted; None if it has not measured, or
            the residual stream is narrower than it measured.
        divergence: what its parts lose by measurement, summed, nats a token; None for methods that measure no levels.
        importance: the share of the summed importance that goes; None where importances do not compare between blocks.
    """

    ratio: float
    plan: Plan
    shape: str
    removed: float
    size: Size
    weights: int
    cache: int
    state: int
    seconds: float | None = None
    divergence: float | None = None
    importance: float | None = None


@dataclass(frozen=True)
class Curve:
    """Plans for several ratios of one model.

    Attributes:
        params: what they were made with; the ratio differs.
        architecture: the dense model's.
        dense: the dense model as a plan that keeps everything.
        planned: the plans, the smallest ratio first.
        skipped: by ratio that cannot be had, why.
        nested: by ratio, the smaller ratios whose cuts the plan contains; empty where that was not asked for.
        fixed: params by their full names that runs of nested plans need, whatever the file says.
    """

    params: Allocate
    architecture: Architecture
    dense: Planned
    planned: tuple[Planned, ...]
    skipped: Mapping[float, str]
    nested: Mapping[float, tuple[float, ...]]
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def points(self) -> tuple[Planned, ...]:
        """The dense model and the plans."""
        return (self.dense, *self.planned)

    @property
    def predicts(self) -> bool:
        """Whether the plans come with a predicted divergence."""
        return self.dense.divergence is not None


def parse_ratios(words: Iterable[str]) -> tuple[float, ...]:
    """Ratios from words of a command line, such as `0.1,0.2` or `0.3`, in ascending order.

    Raises:
        ParamsError: if one is no number between 0 and 1, or stands twice.
    """
    ratios: list[float] = []
    for text in (part for word in words for part in re.split(r"[,\s]+", word) if part):
        try:
            ratio = float(text)
        except ValueError:
            ratio = -1.0
        if not 0 < ratio < 1:
            raise ParamsError(f"{text!r} is no ratio; name shares to remove between 0 and 1, such as 0.1,0.2,0.3")
        if ratio in ratios:
            raise ParamsError(f"the ratio {ratio:g} is named twice; leave one out")
        ratios.append(ratio)
    return tuple(sorted(ratios))


def plan_curve(layout: Layout, params: Params, ratios: Sequence[float] = DEFAULT, nested: bool = False) -> Curve:
    """Decide several ratios as the stage `allocate` decides each of them, from artifacts that are read once.

    Where the params let a search go on by measuring whole plans (`allocate.evaluations`), the plans are those that it
    would begin with: nothing is measured here. Nothing is written.

    Args:
        layout: the artifacts, up to what the stage `allocate` reads.
        params: what is asked for; its own ratio does not matter.
        ratios: shares to remove, between 0 and 1, rising.
        nested: each smaller model is a part of the larger ones.

    Raises:
        LibpruneError: if an artifact is missing or foreign, or the scores may not be used as asked.
    """
    asked = params.allocate.model_copy(update={"evaluations": 0})
    if asked.budgets.asked:
        raise ParamsError("a curve changes allocate.ratio, but allocate.budgets sets the size; leave the budgets empty")
    ground = read_ground(layout, asked)
    fixed = shared_params(ground, asked, ratios) if nested else {}
    asked = asked.model_copy(update=fixed)
    counted = _Counting(layout, params, ground)
    planned: list[Planned] = []
    skipped: dict[float, str] = {}
    contains: dict[float, tuple[float, ...]] = {}
    for ratio in ratios:
        smaller = tuple(one.ratio for one in planned) if nested else ()
        wanted = asked.model_copy(update={"ratio": ratio, "nested": smaller})
        try:
            decision = decide(ground.scores, wanted, ground.evidence)
        except BudgetError as error:
            skipped[ratio] = str(error)
            continue
        planned.append(counted.of(decision, ratio))
        contains |= {ratio: smaller} if smaller else {}
    named = {f"allocate.{key}": value for key, value in fixed.items()}
    return Curve(asked, ground.scores.architecture, counted.dense, tuple(planned), skipped, contains, named)


def shared_params(ground: Ground, asked: Allocate, ratios: Sequence[float]) -> dict[str, Any]:
    """What plans must share to contain each other: no measuring of whole plans, and one multiple of channels.

    The multiple is the smallest that a ratio alone would be given, which divides the others.
    """
    fixed: dict[str, Any] = {"evaluations": 0} if METHODS[asked.method].improves else {}
    if asked.channel_multiple != "auto":
        return fixed
    multiples = []
    for ratio in ratios:
        with suppress(BudgetError):
            alone = decide(ground.scores, asked.model_copy(update={"ratio": ratio, "nested": ()}), ground.evidence)
            multiples.append(int(alone.params.channel_multiple))
    return fixed | {"channel_multiple": min(multiples, default=1)}


class _Counting:
    """Counts what plans promise; what does not depend on the plan is read once."""

    def __init__(self, layout: Layout, params: Params, ground: Ground) -> None:
        scores, asked = ground.scores, params.allocate
        self._architecture, self._evidence = scores.architecture, ground.evidence
        self._itemsize = _itemsize(layout, params)
        self._asked = asked
        self._times: Prices | None = None
        if layout.latency.exists() and "unit" in read_json(layout.latency, "latency"):
            self._times = cost.prices(scores.architecture, "latency", read_latency(layout, scores))
        self._importance = scores.table["importance"] if scores.compares(asked.worth) else None

    def of(self, decision: Decision, ratio: float) -> Planned:
        """The plan of a decision with what it promises."""
        removed = removed_by(decision.prices, decision.plan, decision.params)
        divergence = decision.programme.get("divergence")
        return self._counted(ratio, decision.plan, decision.shape, decision.prices, removed, divergence)

    @property
    def dense(self) -> Planned:
        """The dense model, as the plan that keeps everything."""
        prices = cost.prices(self._architecture, self._asked.objective, self._evidence.get("latency"))
        divergence = 0.0 if METHODS[self._asked.method].programme else None
        return self._counted(0.0, Plan.dense(self._architecture), "uniform", prices, 0, divergence)

    def _counted(
        self, ratio: float, plan: Plan, shape: str, prices: Prices, removed: int, divergence: float | None
    ) -> Planned:
        size, times = cost.size(self._architecture, plan), self._times if plan.width is None else None
        return Planned(
            ratio,
            plan,
            shape,
            share_of(prices, removed, self._asked),
            size,
            weights=size.total * self._itemsize,
            cache=size.cache * self._itemsize,
            state=size.state * STATE_BYTES,
            seconds=None if times is None else (times.total - times.removed(plan)) / 1e12,
            divergence=divergence,
            importance=self._lost(plan),
        )

    def _lost(self, plan: Plan) -> float | None:
        if self._importance is None:
            return None
        keep, total = join_blocks(self._architecture, plan.keep), float(self._importance.sum())
        return float(self._importance[~keep].sum()) / total if total > 0 else None


def _itemsize(layout: Layout, params: Params) -> int:
    """Bytes of an element of the pruned model as it is stored."""
    config = read_json(require(layout.model, "prepare") / "config.json", "prepare")
    stored = config.get("dtype") or config.get("torch_dtype") or "float32"
    return ITEM_BYTES[stored if params.slice.dtype == "auto" else params.slice.dtype]
