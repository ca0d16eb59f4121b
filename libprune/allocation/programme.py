"""The integer programme: the levels of all blocks that lose least within every budget, from measured divergences.

Each block takes one of the depths of its ladder. What it then loses is its measured curve, what it then saves its
prices, and both add up over blocks; what goes only with a whole part is a price of its last depth, and what goes only
with a whole layer has a variable of its own. Between the bends of a curve all depths lie on a straight line. So a run
of them needs one binary variable that chooses the run and one whole number that says how far into it the block goes:
all depths are there, and there are as many binary variables as bends.

The programme is solved by HiGHS (Huangfu and Hall 2018) through `scipy.optimize.milp`, by branch and bound.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, gcd, inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.allocation.ladders import Ladders, empties_layer, spent
from libprune.engine.architecture import WITH_LAYER, Architecture, Block
from libprune.engine.cost import Prices
from libprune.engine.errors import LibpruneError
from libprune.pipeline.sections import Allocate

GAP = 1e-6
"""The relative distance to the bound at which the solver stops."""
NEAR = 1e-4
"""The relative distance to the bound at which a solution in two steps is good enough, and no other is looked for."""
FEW = 4_000
"""Depths of all blocks together up to which the programme is solved in one step."""
NODES = 20_000
"""Nodes of the search tree after which the best solution so far is taken. A limit of time would make the result depend
on the machine."""
SCALE, TOLERANCE = 1e6, 1e-6
"""The sum that a row's coefficients are brought down to, and the solver's absolute tolerance, which is then small."""
CORRECTIONS = 5
"""How often a limit is tightened by what a solution misses it by after rounding."""
COUNTED = 1_000
"""Nodes that are spent on the question how much can be removed."""

Curves = Mapping[Block, NDArray[np.float64]]
"""For every block the divergence by the number of units removed, ``[units + 1]``, nats; never falling."""


@dataclass(frozen=True)
class Limit:
    """How much of something is to go.

    Attributes:
        name: where it is asked for, such as `allocate.ratio`.
        prices: what a removal saves.
        least: at least so much is to go.
        most: no more than this may go; None: any.
    """

    name: str
    prices: Prices
    least: int
    most: int | None = None

    def missed(self, removed: int) -> tuple[int, int]:
        """By how much a removal falls short of the least, and passes the most."""
        return max(0, self.least - removed), 0 if self.most is None else max(0, removed - self.most)


Range = tuple[int | None, int | None]
"""The least and the most of something; None: any."""


@dataclass(frozen=True)
class Solution:
    """The depths that lose least.

    Attributes:
        depth: of every block.
        removed: what they remove under each limit.
        divergence: what the curves predict for them, nats.
        bound: no solution loses less, nats.
        seconds: spent on it.
        binding: for each limit, whether there is a step that cannot be given back because of it.
    """

    depth: dict[Block, int]
    removed: tuple[int, ...]
    divergence: float
    bound: float
    seconds: float
    binding: tuple[bool, ...]

    @property
    def gap(self) -> float:
        """How far the bound lies below the divergence, as a share of the latter."""
        return max(0.0, self.divergence - self.bound) / self.divergence if self.divergence > 0 else 0.0


@dataclass(frozen=True)
class _Group:
    """Blocks that go equally deep: a single one, or a part in all layers.

    Attributes:
        depths: the depths to choose from, ascending from the first that is allowed, ``[options]``.
        costs: what each saves under every limit, ``[options, limits]``.
        loss: what each loses, nats, ``[options]``.
        empties: whether the last leaves no unit.
    """

    blocks: tuple[Block, ...]
    depths: NDArray[np.int64]
    costs: NDArray[np.int64]
    loss: NDArray[np.float64]
    empties: bool

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """The first and the last option of every run on a straight line; an option that empties is one of its own."""
        last = len(self.depths) - 1
        bent = np.zeros(last + 1, dtype=bool)
        rounding = 1e-12 * float(self.loss[-1])
        bent[1:-1] = _bends(self.costs).any(axis=1) | _bends(self.loss, rounding)
        bent[last - self.empties] = True
        runs, start = [], 0
        while start <= last:
            end = start + 1 + int(np.argmax(bent[start + 1 :])) if start < last - self.empties else start
            runs.append((start, end))
            start = end + 1
        return runs


def _bends(values: NDArray[Any], tolerance: float = 0.0) -> NDArray[np.bool_]:
    """Whether the line through the values bends, at each of them but the first and the last."""
    bends: NDArray[np.bool_] = np.abs(np.diff(values, 2, axis=0)) > tolerance
    return bends


@dataclass(frozen=True)
class _Run:
    """A group's options from one to another, on a straight line."""

    group: int
    first: int
    last: int


class Programme:
    """The choice of depths under some limits.

    Attributes:
        limits: how much must go, of what.
        groups: blocks that go equally deep, each with what it saves and loses.
    """

    def __init__(
        self,
        architecture: Architecture,
        ladders: Ladders,
        curves: Curves,
        limits: Sequence[Limit],
        may_empty: bool,
        alike: bool = False,
    ) -> None:
        """Build the variables and the rows.

        Args:
            ladders: the allowed removals; a block without a ladder is gone, and one whose first step is forced loses
                that.
            curves: what each block loses.
            limits: what must go.
            may_empty: whether a layer may lose all its parts.
            alike: whether all layers go equally deep, to counts that a stock config can say.
        """
        self._architecture, self._ladders, self.limits = architecture, ladders, list(limits)
        self._may_empty = may_empty
        self.groups = [self._group(blocks, curves, alike) for blocks in _grouped(ladders, alike)]
        self._runs = [_Run(group, first, end) for group, one in enumerate(self.groups) for first, end in one.runs]
        self._sizes = np.array([run.last - run.first for run in self._runs])
        self._layers = list(self._emptiable())

    def _group(self, blocks: tuple[Block, ...], curves: Curves, alike: bool) -> _Group:
        part, steps = blocks[0][1], self._ladders[blocks[0]]
        whole, shape = self._architecture.units(part), self._architecture.parts[part]
        left = shape.left_after(whole, [step.units for step in steps])
        depths = np.arange(len(left))[int(bool(steps) and steps[0].forced) :]
        if alike:
            depths = np.array([d for d in depths if d == depths[0] or (left[d][0] > 0 and shape.says(*left[d]))])
        lost = np.array([whole - left[d][0] for d in depths])
        fewer = np.array([shape.groups - (left[d][1] or 0) for d in depths])
        saved = [sum(_saved(limit.prices, block, lost, whole, fewer) for block in blocks) for limit in self.limits]
        costs = np.array(saved, dtype=np.int64).reshape(len(self.limits), len(depths)).T
        loss = np.sum([curves[block][lost] for block in blocks], axis=0)
        return _Group(blocks, depths, costs, loss, empties=bool(lost[-1] == whole))

    def _emptiable(self) -> Iterator[tuple[int, list[int]]]:
        """Every layer that may lose all that is left of its parts, with the runs that empty them."""
        emptying = {run.group: i for i, run in enumerate(self._runs) if self._empties(run)}
        at = {block: group for group, one in enumerate(self.groups) for block in one.blocks}
        for layer in sorted({layer for layer, _ in self._ladders}):
            groups = [group for block, group in at.items() if block[0] == layer]
            if all(group in emptying for group in groups):
                yield layer, sorted({emptying[group] for group in groups})

    def _empties(self, run: "_Run") -> bool:
        group = self.groups[run.group]
        return group.empties and run.last == len(group.depths) - 1

    def removed(self, options: Sequence[int]) -> list[int]:
        """What the options, one a group, remove under every limit."""
        total = np.zeros(len(self.limits), dtype=np.int64)
        for group, option in zip(self.groups, options, strict=True):
            total += group.costs[option]
        for layer, runs in self._layers:
            if all(options[self._runs[run].group] == self._runs[run].last for run in runs):
                total += self._with_layer(layer)
        return [int(value) for value in total]

    def _with_layer(self, layer: int) -> NDArray[np.int64]:
        with_layer = (layer, WITH_LAYER)
        return np.array([limit.prices.rest.get(with_layer, 0) for limit in self.limits], dtype=np.int64)

    def lost(self, options: Sequence[int]) -> float:
        """What the options lose, nats."""
        return float(sum(group.loss[option] for group, option in zip(self.groups, options, strict=True)))

    def depth(self, options: Sequence[int]) -> dict[Block, int]:
        """The depths of the blocks, in the order of the ladders."""
        found = {
            block: int(group.depths[option])
            for group, option in zip(self.groups, options, strict=True)
            for block in group.blocks
        }
        return {block: found[block] for block in self._ladders}

    def solve(self) -> Solution | None:
        """The least loss; None if the limits cannot be met.

        Of several limits without a `most`, what is removed beyond all of them is given back.
        """
        start = time.perf_counter()
        bounds = self._asked
        for _ in range(CORRECTIONS):
            options, bound = self._least(bounds)
            if options is None:
                return None
            missed = [limit.missed(value) for limit, value in zip(self.limits, self.removed(options), strict=True)]
            if not any(map(any, missed)):
                break
            bounds = [self._tightened(number, *both) for number, both in enumerate(zip(bounds, missed, strict=True))]
        else:
            raise LibpruneError(
                f"the integer programme missed {' and '.join(limit.name for limit in self.limits)} by the solver's "
                f"rounding {CORRECTIONS} times; please report this with the params"
            )
        if all(limit.most is None for limit in self.limits):
            options = self._given_back(options)
        return self.solution(options, bound, start)

    def solution(self, options: Sequence[int], bound: float, start: float) -> Solution:
        """What options come to.

        Args:
            bound: no options lose less.
            start: when the search for them began, by `time.perf_counter`.
        """
        loss, removed = self.lost(options), tuple(self.removed(options))
        seconds = time.perf_counter() - start
        return Solution(self.depth(options), removed, loss, min(bound, loss), seconds, self._binding(options, removed))

    def _binding(self, options: Sequence[int], removed: Sequence[int]) -> tuple[bool, ...]:
        least = np.array([limit.least for limit in self.limits])
        steps = [one.costs[o] - one.costs[o - 1] for one, o in zip(self.groups, options, strict=True) if o]
        binds = [(np.array(removed) - step < least) & (step > 0) for step in steps]
        return tuple(bool(value) for value in np.any([np.zeros(len(least), dtype=bool), *binds], axis=0))

    def asking(self, limits: Sequence[Limit]) -> "Programme":
        """This choice of depths under other limits, at the same prices."""
        other = copy(self)
        other.limits = list(limits)
        return other

    def _least(self, bounds: Sequence[Range]) -> tuple[list[int] | None, float]:
        """The options of least loss, and a bound.

        Where there are many depths, the runs are chosen first, as if a block could go to any point between two depths.
        That is a bound, and nearly always the choice of runs that is best for whole steps too. Rounded down to whole
        steps, it is then a few of them away from the limits.
        """
        if sum(len(group.depths) for group in self.groups) > FEW:
            chosen, bound = self._run(self._losses, bounds, whole=(True, False))
            if chosen is None:
                return None, inf
            options = self._filled(chosen, bounds)
            if options is not None and self.lost(options) - bound <= NEAR * self.lost(options):
                return options, bound
        return self._run(self._losses, bounds)

    def _filled(self, options: Sequence[int], bounds: Sequence[Range]) -> list[int] | None:
        """The options, and single steps more until all limits are met; None if steps alone do not lead there.

        The next step is the one that loses least for the share of what is still missing that it removes.
        """
        filled = list(options)
        while True:
            removed = np.array(self.removed(filled))
            missing = np.array(
                [0 if low is None else max(0, low - v) for v, (low, _) in zip(removed, bounds, strict=True)]
            )
            if not missing.any():
                return filled
            room = np.array([inf if high is None else high - v for v, (_, high) in zip(removed, bounds, strict=True)])
            best, least = None, inf
            for number, (group, option) in enumerate(zip(self.groups, filled, strict=True)):
                if option + 1 >= len(group.depths) - group.empties:
                    continue
                saved = group.costs[option + 1] - group.costs[option]
                share = float((np.minimum(saved, missing) / np.maximum(1, missing)).sum())
                if share > 0 and (saved <= room).all():
                    price = float(group.loss[option + 1] - group.loss[option]) / share
                    best, least = (number, price) if price < least else (best, least)
            if best is None:
                return None
            filled[best] += 1

    def bound(self) -> float:
        """No solution loses less, nats; infinite where the limits cannot be met even by parts of units."""
        return self._run(self._losses, self._asked, whole=(False, False))[1]

    @property
    def _asked(self) -> list[Range]:
        return [(limit.least, limit.most) for limit in self.limits]

    def most(self, number: int) -> list[int] | None:
        """Options that remove as much as possible under one limit, which may have a `most`, whatever they lose.

        To within half of the least that a step saves, and no search beyond `COUNTED` nodes.
        """
        bounds: list[Range] = [(None, limit.most if i == number else None) for i, limit in enumerate(self.limits)]
        near = self.cheapest(number) / (2 * max(1, sum(int(group.costs[-1, number]) for group in self.groups)))
        return self._run(-self._row(number), bounds, nodes=COUNTED, gap=near)[0]

    def cheapest(self, number: int) -> int:
        """The least that a single step saves under a limit; 0 if there is none."""
        steps = [int(step) for group in self.groups for step in np.diff(group.costs[:, number]) if step > 0]
        return min(steps, default=0)

    def _given_back(self, options: Sequence[int]) -> list[int]:
        """The options less what no limit needs, from the groups whose last step loses most."""
        kept = list(options)

        def enough(group: int, option: int) -> bool:
            removed = self.removed([*kept[:group], option, *kept[group + 1 :]])
            return all(value >= limit.least for value, limit in zip(removed, self.limits, strict=True))

        last = {i: one.loss[o] - one.loss[o - 1] for i, (one, o) in enumerate(zip(self.groups, kept, strict=True)) if o}
        for group in sorted(last, key=lambda group: -last[group]):
            low, high = 0, kept[group]  # the first option that is enough lies above low - 1, and not above high
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if enough(group, middle) else (middle + 1, high)
            kept[group] = high
        return kept

    @cached_property
    def _losses(self) -> NDArray[np.float64]:
        """What each variable adds to the loss: the runs, how far into each it goes, the layers that are gone."""
        return np.concatenate([*self._of_runs([group.loss for group in self.groups]), np.zeros(len(self._layers))])

    def _row(self, number: int) -> NDArray[np.float64]:
        """What each variable adds to what is removed under a limit."""
        layers = np.array([float(self._with_layer(layer)[number]) for layer, _ in self._layers])
        return np.concatenate([*self._of_runs([group.costs[:, number] for group in self.groups]), layers])

    def _of_runs(self, values: Sequence[NDArray[Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The values of the groups' options, at the first of each run and by each further one."""
        first, last = (
            np.array([values[run.group][at] for run, at in zip(self._runs, ends, strict=True)], dtype=np.float64)
            for ends in ([run.first for run in self._runs], [run.last for run in self._runs])
        )
        return first, (last - first) / np.maximum(1, self._sizes)

    def _run(
        self,
        objective: NDArray[np.float64],
        bounds: Sequence[Range],
        whole: tuple[bool, bool] = (True, True),
        nodes: int = NODES,
        gap: float = GAP,
    ) -> tuple[list[int] | None, float]:
        """The options of the least objective, and a bound that none lies below; None if there are none.

        Args:
            objective: what each variable adds.
            bounds: of what is removed under each limit.
            whole: whether the choice of runs, and how far into them the blocks go, are whole numbers.
            nodes: after which the search ends.
            gap: at which it does.
        """
        from scipy.optimize import Bounds, milp  # which takes longer to load than methods that solve no programme

        runs, layers = len(self._runs), len(self._layers)
        if not runs:
            return [], 0.0
        rows = list(self._budgets(bounds))
        if any((row.lb > row.ub).any() for row in rows):
            return None, inf
        scale = SCALE / max(1e-300, float(np.abs(objective).sum()))
        result = milp(
            objective * scale,
            constraints=[*self._structure, *rows],
            integrality=np.repeat([int(whole[0]), int(whole[1]), int(whole[0])], [runs, runs, layers]),
            bounds=Bounds(0, np.concatenate([np.ones(runs), self._sizes, np.ones(layers)])),
            options={"mip_rel_gap": gap, "node_limit": nodes},
        )
        if result.x is None:
            return None, inf
        least = result.mip_dual_bound if any(whole) else result.fun
        options = [0] * len(self.groups)
        for run, taken, further in zip(self._runs, result.x[:runs], result.x[runs : 2 * runs], strict=True):
            if taken > 0.5:
                options[run.group] = run.first + int(further + 1e-6)
        return options, float(least if least is not None else -inf) / scale

    @cached_property
    def _structure(self) -> list[Any]:
        """Constraints: one run a group; no way into a run that is not chosen; what is needed of layers that go."""
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csc_array

        runs, layers = len(self._runs), len(self._layers)
        one = csc_array(
            (np.ones(runs), ([run.group for run in self._runs], np.arange(runs))),
            shape=(len(self.groups), 2 * runs + layers),
        )
        within = csc_array(
            (
                np.concatenate([-self._sizes.astype(np.float64), np.ones(runs)]),
                (np.tile(np.arange(runs), 2), np.arange(2 * runs)),
            ),
            shape=(runs, 2 * runs + layers),
        )
        rows = [LinearConstraint(one, 1, 1), LinearConstraint(within, -inf, 0)]
        return rows + ([LinearConstraint(*self._of_layers())] if layers else [])

    def _of_layers(self) -> tuple[Any, NDArray[np.float64], NDArray[np.float64]]:
        """A sparse matrix and its bounds: a layer is gone if all its parts are; none may be, or one must stay."""
        from scipy.sparse import csc_array

        runs, number = len(self._runs), len(self._layers)
        rows: list[tuple[dict[int, float], float, float]] = []
        for gone, (_, emptying) in enumerate(self._layers, start=2 * runs):
            rows.append(({**dict.fromkeys(emptying, 1.0), gone: -1.0}, -inf, len(emptying) - 1.0))
            rows += [({run: -1.0, gone: 1.0}, -inf, 0.0) for run in emptying]
        left = len({layer for layer, _ in self._ladders})
        most = float(min(number, left - 1) if self._may_empty else 0)
        rows.append((dict.fromkeys(range(2 * runs, 2 * runs + number), 1.0), 0.0, most))
        terms = [(row, column, value) for row, (some, _, _) in enumerate(rows) for column, value in some.items()]
        at, columns, values = zip(*terms, strict=True)
        matrix = csc_array((values, (at, columns)), shape=(len(rows), 2 * runs + number))
        return matrix, np.array([low for _, low, _ in rows]), np.array([high for _, _, high in rows])

    def _budgets(self, bounds: Sequence[Range]) -> Iterator[Any]:
        """Constraints of one row a limit, in units that keep its sum small."""
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csc_array

        for number, (low, high) in enumerate(bounds):
            if low is None and high is None:
                continue
            unit, small = self._grain(number)
            least = -inf if low is None else -(-low // unit) / small
            most = inf if high is None else high // unit / small
            yield LinearConstraint(csc_array(self._row(number)[None] / (unit * small)), least, most)

    def _grain(self, number: int) -> tuple[int, float]:
        """What all prices of a limit are a multiple of, and what a row counted in this is divided by."""
        costs = np.concatenate([group.costs[:, number] for group in self.groups])
        unit = max(
            1, gcd(int(np.gcd.reduce(costs)), *(int(self._with_layer(layer)[number]) for layer, _ in self._layers))
        )
        return unit, max(1.0, sum(int(group.costs[-1, number]) for group in self.groups) / unit / SCALE)

    def _tightened(self, number: int, pair: Range, missed: tuple[int, int]) -> Range:
        """A limit, tightened by what a solution misses it by, and by at least the solver's tolerance."""
        unit, small = self._grain(number)
        below, above = (max(by, ceil(2 * TOLERANCE * unit * small)) if by else 0 for by in missed)
        return None if pair[0] is None else pair[0] + below, None if pair[1] is None else pair[1] - above


def _saved(
    prices: Prices, block: Block, lost: NDArray[np.int64], whole: int, fewer: NDArray[np.int64]
) -> NDArray[np.int64]:
    """What a block saves by the number of units that it loses, and of groups of query heads."""
    with_groups = fewer * prices.groups[block].each if block in prices.groups else 0
    return lost * prices.unit[block] + with_groups + (lost == whole) * prices.rest.get(block, 0)


def _grouped(ladders: Ladders, alike: bool) -> list[tuple[Block, ...]]:
    """The blocks that go equally deep: each alone, or those of a part whose ladders have the same steps."""
    if not alike:
        return [(block,) for block in ladders]
    groups: dict[Any, list[Block]] = {}
    for block, steps in ladders.items():
        groups.setdefault((block[1], tuple(len(step.units) for step in steps)), []).append(block)
    return list(map(tuple, groups.values()))


def least_divergence(
    architecture: Architecture, ladders: Ladders, curves: Curves, target: int, prices: Prices, params: Allocate
) -> Solution:
    """The depths of least divergence that remove the target to within the cheapest step, and no more than it.

    Where no choice comes so near, those that come nearest, as far as that is found, and then all steps that still fit.

    Args:
        ladders: the allowed removals; a block without a ladder is gone.
        curves: what each block loses.
        target: how much is to go.
        prices: what it is counted in.
        params: whether layers may be emptied, and whether all are alike.
    """
    alike = params.shape == "uniform"

    limit = Limit("allocate.ratio", prices, 0, target)
    whole = Programme(architecture, ladders, curves, [limit], params.may_empty, alike)

    def programme(least: int) -> Programme:
        return whole.asking([replace(limit, least=max(0, least))])

    cheapest = whole.cheapest(0)
    near = programme(target - cheapest + 1).solve()
    if near is not None:
        return near
    start = time.perf_counter()
    nearest = programme(0)
    options = nearest.most(0)
    assert options is not None, "removing nothing passes no target"
    most = nearest.removed(options)[0]
    found = programme(most - cheapest + 1).solve() or nearest.solution(options, programme(most).bound(), start)
    if alike:
        return replace(found, seconds=time.perf_counter() - start)
    extra = found.removed[0] - spent(ladders, found.depth)  # of whole layers
    layers_priced = any(part == WITH_LAYER for _, part in prices.rest)
    cautious = params.model_copy(update={"depth": "none"}) if layers_priced else params
    depth = fill(architecture, ladders, curves, found.depth, target - extra, cautious)
    return replace(found, depth=depth, divergence=lost(ladders, curves, depth), seconds=time.perf_counter() - start)


def lost(ladders: Ladders, curves: Curves, depth: Mapping[Block, int]) -> float:
    """What depths lose by the curves, nats."""
    return float(sum(curves[b][sum(len(step.units) for step in ladders[b][:n])] for b, n in depth.items()))


def fill(
    architecture: Architecture,
    ladders: Ladders,
    curves: Mapping[Block, NDArray[np.float64]],
    depth: Mapping[Block, int],
    target: int,
    params: Allocate,
) -> dict[Block, int]:
    """Go on step by step where the next one loses least for what it saves, as long as it fits into the target."""
    filled = dict(depth)
    left = target - spent(ladders, filled)
    while True:
        slopes = {
            block: _slope(ladders, curves, block, filled[block])
            for block, steps in ladders.items()
            if filled[block] < len(steps)
            and steps[filled[block]].cost <= left
            and (params.may_empty or not empties_layer(architecture, ladders, filled, block))
        }
        if not slopes:
            return filled
        block = min(slopes, key=lambda block: slopes[block])
        left -= ladders[block][filled[block]].cost
        filled[block] += 1


def _slope(ladders: Ladders, curves: Mapping[Block, NDArray[np.float64]], block: Block, depth: int) -> float:
    step = ladders[block][depth]
    gone = sum(len(step.units) for step in ladders[block][:depth])
    return float(curves[block][gone + len(step.units)] - curves[block][gone]) / step.cost
