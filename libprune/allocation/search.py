"""Refinement: whole plans are measured, and a plan that diverges less takes the place of the one before.

What single blocks lose adds up only roughly, so from the integer programme's plan on the search goes by the
divergence of the whole pruned and locally repaired model. The first trials are the plans of other methods. Each
one after them moves some of the budget of the best plan so far from one block to another and is kept if it is better: a
(1 + 1) evolutionary search as in EvoPress (Sieberling et al. 2024) and Tyr-the-Pruner (Li et al. 2025). The best plan
so far is always at hand, and what was measured is written down at once, so that an interrupted search goes on where it
stopped.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from libprune.allocation.ladders import Ladders, empties_layer, plan_of, spent
from libprune.allocation.methods import Depth, Evidence
from libprune.allocation.programme import fill
from libprune.collection.calibration import require_own_weights, set_up
from libprune.collection.resumable import sums_identity
from libprune.engine.architecture import Architecture, Block
from libprune.engine.plan import Plan
from libprune.models.layers import replaced
from libprune.models.sequences import Sequences
from libprune.pipeline.artifacts import Scores
from libprune.pipeline.layout import Layout
from libprune.pipeline.methods import METHODS, RIVALS
from libprune.pipeline.sections import Allocate, Compute, Levels
from libprune.pipeline.terminal import Bar, say
from libprune.repair.repairs import inputs_identity, local_repair
from libprune.statistics.divergence import Divergence
from libprune.statistics.levels import order_digest, unit_orders
from libprune.statistics.losses import Prefix

LARGEST_MOVE = 8
"""A trial moves at most one eighth of the steps of a block."""


class Judge:
    """The divergence of plans, each with its local repair."""

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        sequences: Sequences,
        at_once: int,
        repair: Callable[[Plan], Mapping[str, Tensor]],
    ) -> None:
        """Run the dense model once.

        Args:
            model: the dense model, with its weights whole on its device.
            sequences: on the model's device.
            at_once: sequences in one pass.
            repair: new weights for a plan.
        """
        self._model, self._architecture, self._repair = model, architecture, repair
        self._dense = Plan.dense(architecture).keep
        self._prefix = Prefix(model, architecture, sequences, at_once, [], Divergence(model))
        self._weights: dict[tuple[Block, bytes], Mapping[str, Tensor]] = {}

    def __call__(self, plan: Plan) -> float:
        """The divergence of the repaired model under a plan: mean over sequences, nats per token."""
        weights: dict[str, Tensor] = {}
        used = {}
        for block, keep in plan.keep.items():
            key = block, keep.tobytes()
            if key not in self._weights:
                self._weights[key] = self._repair(Plan({**self._dense, block: keep}))
            used[key] = self._weights[key]
            weights |= used[key]
        self._weights = used
        with replaced(self._model, weights):
            return float(self._prefix.losses_of(plan).mean())


@dataclass(frozen=True)
class Refined:
    """The best plan that a search has measured.

    Attributes:
        depth: its depths.
        divergence: its divergence, nats per token.
        starts: the divergence of each plan that was there to start from, by method, as far as measured; the programme's
            is the first.
        evaluations: how many plans were tried beside the first.
    """

    depth: Mapping[Block, int]
    divergence: float
    starts: Mapping[str, float]
    evaluations: int


def refine(
    judge: Callable[[Plan], float],
    architecture: Architecture,
    ladders: Ladders,
    curves: Mapping[Block, NDArray[np.float64]],
    starts: Mapping[str, Mapping[Block, int]],
    target: int,
    params: Allocate,
    trials: Path,
) -> Refined:
    """Improve the best of several plans by trials that move budget between blocks.

    Args:
        judge: the divergence of a plan, nats.
        ladders: the allowed removals.
        curves: as in `libprune.allocation.programme`, to fill what a trial leaves of the target.
        starts: depths by the method that found them; the first are measured however few the evaluations.
        target: how much of the objective to remove.
        params: evaluations, minutes and seed.
        trials: a file that every measured divergence is appended to, and read from after an interruption.
    """
    known = _read(trials)
    rng = np.random.default_rng(params.seed)
    end = time.monotonic() + 60 * params.minutes if params.minutes else math.inf

    def measure(trial: Mapping[Block, int]) -> float:
        plan = plan_of(architecture, ladders, trial)
        key = plan.digest
        if key not in known:
            known[key] = judge(plan)
            with trials.open("a") as file:
                file.write(json.dumps({"plan": key, "divergence": known[key]}) + "\n")
        return known[key]

    (method, depth), *others = starts.items()
    best = dict(depth)
    least = first = measure(best)
    measured = {method: first}
    tried = 0
    with Bar(total=params.evaluations, desc="search", unit="plan") as bar:
        while tried < params.evaluations and time.monotonic() < end:
            if tried < len(others):
                method, trial = others[tried]
                divergence = measured[method] = measure(trial)
            else:
                trial = _move(architecture, ladders, curves, best, target, params, rng)
                divergence = measure(trial)
            tried += 1
            if divergence < least:
                best, least = dict(trial), divergence
            bar.set_postfix_str(f"divergence {first:.4f} to {least:.4f}", refresh=False)
            bar.update()
    return Refined(best, least, measured, tried)


def _read(trials: Path) -> dict[str, float]:
    trials.parent.mkdir(parents=True, exist_ok=True)
    text = trials.read_text() if trials.exists() else ""
    if text and not text.endswith("\n"):
        with trials.open("a") as file:
            file.write("\n")  # an interruption cut the last line off
    known = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        known[entry["plan"]] = entry["divergence"]
    return known


def _move(
    architecture: Architecture,
    ladders: Ladders,
    curves: Mapping[Block, NDArray[np.float64]],
    depth: Mapping[Block, int],
    target: int,
    params: Allocate,
    rng: np.random.Generator,
) -> dict[Block, int]:
    """Give some steps of one block back, and take as much from another."""
    blocks = [block for block, steps in ladders.items() if steps]
    trial = dict(depth)
    giving = [block for block in blocks if depth[block] > 0]
    taking = [block for block in blocks if depth[block] < len(ladders[block])]
    if not giving or not taking:
        return trial
    back, on = giving[rng.integers(len(giving))], taking[rng.integers(len(taking))]
    most = max(1, len(ladders[back]) // LARGEST_MOVE)
    trial[back] -= min(trial[back], int(rng.integers(1, most + 1)))
    room = target - spent(ladders, trial)
    while trial[on] < len(ladders[on]) and ladders[on][trial[on]].cost <= room and on != back:
        if not params.may_empty and empties_layer(architecture, ladders, trial, on):
            break
        room -= ladders[on][trial[on]].cost
        trial[on] += 1
    return fill(architecture, ladders, curves, trial, target, params)


class Search:
    """Improves a method's depths by measuring whole plans; `refined` says what came of it."""

    def __init__(self, layout: Layout, scores: Scores, compute: Compute, levels: Levels, evidence: Evidence) -> None:
        """Keep what the search will need; the model is loaded when the search begins.

        Args:
            scores: the importance of the units, which orders them.
            levels: whose calibration sequences are used.
            evidence: the curves that trials are filled by, and what the `RIVALS` need.
        """
        self._layout, self._scores, self._evidence = layout, scores, evidence
        self._compute, self._levels = compute, levels
        self.refined: Refined | None = None

    def __call__(self, ladders: Ladders, depth: Depth, target: int, params: Allocate) -> Depth:
        """Search on from the given depths, or from a rival's.

        Args:
            ladders: the allowed removals.
            depth: what the method has chosen.
            target: how much of the objective to remove.
            params: limits, with the ratio and the split settled.
        """
        architecture = self._scores.architecture
        run = set_up(self._layout, self._compute, self._levels.sequences, last=True, alone="allocate")
        require_own_weights(run)
        sequences = run.sequences.to(run.device)
        repair = local_repair(self._layout, architecture, keep=run.keep)
        judge = Judge(run.model, architecture, sequences, run.at_once, repair)
        identity = {
            "order": order_digest(unit_orders(architecture, self._scores.table)),
            "sequences": len(run.sequences),
            "inputs": inputs_identity(self._layout),
        }
        trials = run.work / "search" / f"{sums_identity(run, identity, ('statistics', 'repair', 'allocation'))}.jsonl"
        comparable = self._scores.compares(params.worth)
        rivals = [name for name in RIVALS if comparable or not METHODS[name].between]
        starts: dict[str, Depth] = {params.method: depth}
        starts |= rival_starts(architecture, ladders, target, params, self._evidence, rivals)
        curves = self._evidence["levels"]
        self.refined = refine(judge, architecture, ladders, curves, starts, target, params, trials)
        of_starts = ", ".join(f"{method} {divergence:.4f}" for method, divergence in self.refined.starts.items())
        say(f"{self.refined.evaluations} trials: divergence {of_starts}; best {self.refined.divergence:.4f}")
        return dict(self.refined.depth)


def rival_starts(
    architecture: Architecture,
    ladders: Ladders,
    target: int,
    params: Allocate,
    evidence: Evidence,
    methods: Sequence[str],
) -> Mapping[str, Depth]:
    """The depths that other methods find for the same target, by method.

    What one of them removes beyond the target is given back, the highest ranks first, and what is then left of it is
    filled by the curves.

    Args:
        ladders: the allowed removals.
        target: how much of the objective to remove.
        params: limits, with the split settled.
        evidence: the curves, and what the methods need.
        methods: names of `libprune.pipeline.methods.METHODS`.
    """
    plain = {artifact: read for artifact, read in evidence.items() if artifact != "levels"}
    starts = {}
    for method in methods:
        depth = METHODS[method].allocate(architecture, ladders, target, params, plain)
        while spent(ladders, depth) > target:
            back = max((b for b in depth if depth[b]), key=lambda block: ladders[block][depth[block] - 1].rank)
            depth[back] -= 1
        starts[method] = fill(architecture, ladders, evidence["levels"], depth, target, params)
    return starts
