"""Carrying out a search for a better plan: from the artifacts to depths, resumable."""

from collections.abc import Mapping, Sequence

from libprune.allocation.evolution import Judge, Refined, refine
from libprune.allocation.ladders import Ladders, spent
from libprune.allocation.methods import Depth, Evidence
from libprune.allocation.programme import fill
from libprune.collection.calibration import require_own_weights, set_up
from libprune.collection.resumable import sums_identity
from libprune.engine.architecture import Architecture
from libprune.pipeline.artifacts import Scores
from libprune.pipeline.layout import Layout
from libprune.pipeline.methods import METHODS, RIVALS
from libprune.pipeline.sections import Allocate, Compute, Levels
from libprune.pipeline.terminal import say
from libprune.repair.repairs import inputs_identity, local_repair
from libprune.statistics.levels import order_digest, unit_orders


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
        run = set_up(self._layout, self._compute, self._levels.sequences, last=True)
        require_own_weights(run)
        sequences = run.sequences.to(run.device)
        repair = local_repair(self._layout, architecture)
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
