"""Budgets and frames: what must go, and the whole removals and the width of the stream within which the rest is chosen.

A frame takes whole layers or parts away, as the depth stage has put them into order, and columns of the residual
stream, as the width stage has measured them. In each frame an integer programme chooses the levels of the blocks that
are left. The frame whose divergences add up to least is taken. A bound on each frame comes first, so that few of the
programmes need to be solved.
"""

import heapq
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import product
from math import ceil, floor, inf
from typing import Any

import numpy as np

from libprune.allocation.ladders import Ladders
from libprune.allocation.methods import Order
from libprune.allocation.programme import Limit, Programme, Solution, least_divergence
from libprune.engine import cost
from libprune.engine.architecture import Architecture, Block
from libprune.engine.cost import Prices
from libprune.engine.errors import BudgetError
from libprune.engine.plan import Plan
from libprune.pipeline.sections import Allocate

NEXT = 5
"""Frames beside the best one that the record holds."""
SCALES = {"latency": 1e12, "bytes": 8_000.0}
"""What prices are divided by for the reader: picoseconds to seconds, thousandths of a bit to bytes."""


@dataclass(frozen=True)
class Frame:
    """What goes before levels are chosen.

    Attributes:
        removals: how many whole removals of the order.
        gone: the blocks that they take away.
        width: the columns of the residual stream that stay; None: all.
        divergence: measured for both, nats.
    """

    removals: int
    gone: frozenset[Block]
    width: int | None
    divergence: float


@dataclass(frozen=True)
class Found:
    """The best choice.

    Attributes:
        frame: what goes whole.
        ladders: of the blocks that are left.
        solution: their depths.
        record: what `metrics/allocation.json` says of the programme.
        budgets: what it says of each budget.
        passed: whether another frame alone removes more than the ratio, so that this one misses it only since frames
            are coarse.
    """

    frame: Frame
    ladders: Ladders
    solution: Solution
    record: dict[str, Any]
    budgets: list[dict[str, Any]]
    passed: bool


def without(architecture: Architecture, removed: Collection[Block]) -> Plan:
    """The plan that removes some blocks whole, and nothing else."""
    return Plan({block: np.full(architecture.units(block[1]), block not in removed) for block in architecture.blocks()})


class Counted:
    """Something that must not pass a limit, in every frame."""

    def __init__(
        self, architecture: Architecture, params: Allocate, name: str, share: float, latency: Mapping[str, Any] | None
    ) -> None:
        """Count the dense model.

        Args:
            name: `ratio`, or the name of a budget.
            share: what may stay.
            latency: measured times, if it is a time.
        """
        self.name, self.share = name, share
        self._architecture, self._latency = architecture, latency
        self._decoder = params.ratio_of == "decoder" if name == "ratio" else name == "parameters"
        self._objective = params.objective if name == "ratio" else name
        self._bits = params.bits.model_dump() if name == "bytes" else None
        self.prices = cache(self._prices)
        before = 0 if self._decoder else self.prices(None).gone
        self.dense = self._whole(None) + before
        if name == "ratio":
            self.least = max(0, round((1 - share) * self.dense) - before)
        else:
            self.least = max(0, self.dense - self.limit - before)

    @property
    def limit(self) -> int:
        """What may stay, rounded down; the share counts as the decimal number that was written."""
        return floor(Fraction(repr(self.share)) * self.dense)

    def _prices(self, width: int | None) -> Prices:
        return cost.prices(self._architecture.narrowed(width), self._objective, self._latency, bits=self._bits)

    def _whole(self, width: int | None) -> int:
        return self.prices(width).decoder if self._decoder else self.prices(width).total

    def taken(self, frame: Frame) -> int:
        """What a frame removes."""
        gone = self.prices(frame.width).removed(without(self._architecture, frame.gone))
        return self._whole(None) - self._whole(frame.width) + gone

    def told(self, removed: int, binds: bool) -> dict[str, Any]:
        """What is said of the budget when so much is removed beyond what went with the vocabulary."""
        left = self._whole(None) - removed
        scale = SCALES.get(self.name)
        amounts = {"dense": self.dense, "limit": self.limit, "reached": left}
        shown = amounts if scale is None else {key: amount / scale for key, amount in amounts.items()}
        return {"name": self.name, **shown, "share_asked": self.share, "share": left / self.dense, "binds": binds}


def counted_of(architecture: Architecture, params: Allocate, latency: Mapping[str, Any] | None) -> list[Counted]:
    """All that must go: the ratio, or every budget."""
    if params.ratio is not None:
        return [Counted(architecture, params, "ratio", 1 - params.ratio, latency)]
    return [Counted(architecture, params, name, share, latency) for name, share in params.budgets.asked.items()]


def require_ordered(layers: int | None, order: Order) -> None:
    """Stop where more whole removals are asked for than the depth stage has put into order.

    Args:
        layers: `allocate.layers`.
        order: what goes with each number of removals, and its divergence.

    Raises:
        BudgetError: with both numbers.
    """
    if layers is not None and layers >= len(order):
        raise BudgetError(
            f"allocate.layers is {layers}, but the depth stage has put {len(order) - 1} removals into order; lower it, "
            "or raise depth.removals"
        )


def frames_of(params: Allocate, evidence: Mapping[str, Any], within: Frame | None = None) -> list[Frame]:
    """All frames that are allowed, those that take least away first.

    Args:
        within: a frame that must be part of them; None: none.
    """
    order = evidence["depth"] if params.ordered else [(frozenset(), 0.0)]
    require_ordered(params.layers, order)
    chosen = range(len(order)) if params.layers is None else [params.layers]
    measured: Mapping[int | None, float] = evidence.get("width", {})
    whole = max(measured, key=lambda width: width or 0, default=None)
    given = params.columns is not None or not measured
    widths = {params.columns: measured.get(params.columns, 0.0)} if given else measured
    frames = [
        Frame(number, order[number][0], None if width == whole else width, order[number][1] + widths[width])
        for number, width in product(chosen, sorted(widths, key=lambda width: -(width or 0)))
    ]
    if within is None:
        return frames
    most = inf if within.width is None else within.width
    return [
        frame for frame in frames if within.gone <= frame.gone and (inf if frame.width is None else frame.width) <= most
    ]


class _Choice:
    """The programmes of all frames."""

    def __init__(
        self,
        architecture: Architecture,
        ladders: Ladders,
        params: Allocate,
        evidence: Mapping[str, Any],
        within: Frame | None,
    ) -> None:
        self._architecture, self._ladders, self._params = architecture, ladders, params
        self._curves = evidence["levels"]
        self.counted = counted_of(architecture, params, evidence.get("latency"))
        self.frames = frames_of(params, evidence, within)
        self._cheapest = cache(self._step)

    def left(self, frame: Frame) -> Ladders:
        """The ladders of the blocks that a frame leaves."""
        return {block: steps for block, steps in self._ladders.items() if block not in frame.gone}

    def passes(self, frame: Frame) -> bool:
        """Whether a frame alone removes more than the ratio; budgets may be passed."""
        one = self.counted[0]
        return one.name == "ratio" and one.taken(frame) > one.least

    def programme(self, frame: Frame) -> Programme | None:
        """What is to be solved in a frame; None if a frame alone removes more than the ratio."""
        if self.passes(frame):
            return None
        limits = []
        for one in self.counted:
            least = one.least - one.taken(frame)
            most = least if one.name == "ratio" else None
            limits.append(Limit(f"allocate.{one.name}", one.prices(frame.width), max(0, least), most))
        found = self._of(self.left(frame), limits)
        if limits[0].most is None:
            return found
        return found.asking([replace(limits[0], least=max(0, limits[0].least - self._cheapest(frame.width) + 1))])

    def _of(self, ladders: Ladders, limits: Sequence[Limit]) -> Programme:
        alike = self._params.shape == "uniform"
        return Programme(self._architecture, ladders, self._curves, limits, self._params.may_empty, alike)

    def _step(self, width: int | None) -> int:
        """The cheapest step of all blocks, so that a frame without the fine ones need not come less near."""
        one = self.counted[0]
        return self._of(self._ladders, [Limit(one.name, one.prices(width), 0)]).cheapest(0)

    def nearest(self) -> tuple[Frame, Solution]:
        """The frame in which most of a ratio's target can be removed, and the solution in it.

        The target may be missed by more than the cheapest step. Of frames that come equally near, the one of least
        divergence is taken.
        """
        one, most = self.counted[0], dict[Frame, int]()
        for frame in self.frames if len(self.frames) > 1 else ():
            if (programme := self.programme(frame)) is None:
                continue
            options = programme.asking([replace(limit, least=0) for limit in programme.limits]).most(0)
            if options is not None:
                most[frame] = one.taken(frame) + programme.removed(options)[0]
        ends = [frame for frame, value in most.items() if value == max(most.values())] or self.frames[:1]
        found = [(frame, self._alone(frame)) for frame in ends]
        return min(found, key=lambda pair: pair[0].divergence + pair[1].divergence)

    def _alone(self, frame: Frame) -> Solution:
        one = self.counted[0]
        target = max(0, one.least - one.taken(frame))
        prices = one.prices(frame.width)
        return least_divergence(self._architecture, self.left(frame), self._curves, target, prices, self._params)

    def best(self) -> tuple[tuple[Frame, Solution] | None, list[tuple[float, bool, Frame]]]:
        """The frame of least divergence with its solution, and what is known of all: a bound, and whether it is met.

        Frames are looked at in the order of their bounds: first the divergence of the frame itself, then with that of
        the programme without whole numbers, then the solution.
        """
        waiting: list[tuple[float, int, int, Solution | None]] = [
            (frame.divergence, number, 0, None) for number, frame in enumerate(self.frames)
        ]
        heapq.heapify(waiting)
        programmes: dict[int, Programme] = {}
        while waiting:
            _, number, looks, solution = heapq.heappop(waiting)
            frame = self.frames[number]
            if solution is not None:
                others = [
                    (value, looked == 2, self.frames[other]) for value, other, looked, _ in sorted(waiting)[:NEXT]
                ]
                return (frame, solution), others
            if looks == 0:
                programme = self.programme(frame)
                if programme is None:
                    continue
                programmes[number] = programme
                value = programme.bound()
            else:
                solution = programmes[number].solve()
                value = inf if solution is None else solution.divergence
            if value < inf:
                heapq.heappush(waiting, (frame.divergence + value, number, looks + 1, solution))
        return None, []


def find(
    architecture: Architecture,
    ladders: Ladders,
    params: Allocate,
    evidence: Mapping[str, Any],
    within: Frame | None = None,
) -> Found:
    """Choose the frame and the levels in it that lose least within every budget.

    Args:
        ladders: the allowed removals of all blocks.
        params: budgets and limits, settled.
        evidence: `levels`; `depth` and `width` where whole removals or columns are chosen too; `latency` for a time.
        within: a frame that the choice contains; None: none.

    Raises:
        BudgetError: if the budgets cannot be met; a ratio that cannot be reached is for the caller to find.
    """
    start = time.perf_counter()
    choice = _Choice(architecture, ladders, params, evidence, within)
    best, others = choice.best() if len(choice.frames) > 1 or params.ratio is None else (None, [])
    if best is None and params.ratio is None:
        raise BudgetError(_why_not(choice))
    if best is None:
        best = choice.nearest()
    frame, solution = best
    seconds = time.perf_counter() - start
    total = frame.divergence + solution.divergence
    bound = min([frame.divergence + solution.bound, *(value for value, _, _ in others)])
    record = {
        "divergence": total,
        "bound": bound,
        "gap": (total - bound) / total if total > 0 else 0.0,
        "seconds": seconds,
        "removals": int(frame.removals),
        "width": frame.width,
        "next": [
            {"removals": one.removals, "width": one.width, "divergence": value, "exact": exact}
            for value, exact, one in others
        ],
    }
    removed = zip(choice.counted, solution.removed, solution.binding, strict=True)
    told = [one.told(one.taken(frame) + value, binds) for one, value, binds in removed]
    passed = any(map(choice.passes, choice.frames))
    return Found(frame, choice.left(frame), solution, record, [] if params.ratio is not None else told, passed)


def _why_not(choice: _Choice) -> str:
    """Which budgets cannot be met, and the most that can be removed."""
    few = choice.frames if len(choice.frames) <= NEXT else [choice.frames[0], choice.frames[-1]]
    reasons = list(_unreachable(choice, few))
    held = "under the floors, multiples, frozen layers, shape and allocate.depth"
    if reasons:
        return f"{held}, {'; '.join(reasons)}. Raise what may stay, or lower min_groups or min_channels"
    names = " and ".join(one.name for one in choice.counted)
    return (
        f"allocate.budgets: {names} can each be met alone, {held}, and not together, since a layer keeps one of its "
        "parts; raise what may stay, or set allocate.depth: units"
    )


def _unreachable(choice: _Choice, frames: Sequence[Frame]) -> Iterator[str]:
    for number, one in enumerate(choice.counted):
        most = 0
        for frame in frames:
            programme = choice.programme(frame)
            assert programme is not None, "budgets have no most"
            options = programme.most(number)
            assert options is not None, "removing nothing breaks no rule"
            most = max(most, one.taken(frame) + programme.removed(options)[number])
        if most < one.least:
            left = one.told(most, binds=True)["share"]
            yield (
                f"allocate.budgets.{one.name} = {one.share} cannot be met: at most {100 * (1 - left):.2f} % can be "
                f"removed, so that {ceil(1e4 * left) / 1e4} stays"
            )
