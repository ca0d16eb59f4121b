"""Carrying out a search for a better plan: from the artifacts to depths, resumable."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import typer

from libprune.allocation.evolution import Judge, Refined, refine
from libprune.allocation.knapsack import fill
from libprune.allocation.ladders import Ladders, spent
from libprune.allocation.methods import METHODS, Depth, Evidence
from libprune.collection.calibration import require_own_weights, set_up
from libprune.collection.resumable import sums_identity
from libprune.engine.architecture import Architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Allocate, Compute, Levels
from libprune.repair.repairs import inputs_identity, local_repair

RIVALS = ("functional", "global", "uniform")
"""Methods that need nothing measured, whose plans are tried too."""


class Search:
    """Improves a method's depths by measuring whole plans; `found` says what came of it."""

    def __init__(
        self,
        layout: Layout,
        architecture: Architecture,
        compute: Compute,
        levels: Levels,
        evidence: Evidence,
        order: str,
        comparable: bool,
    ) -> None:
        """Nothing is loaded before the search begins.

        Args:
            layout: where the artifacts are.
            architecture: the model's description.
            compute: how to run the model.
            levels: whose calibration sequences are used.
            evidence: the curves that trials are filled by, and what the `RIVALS` need.
            order: names the order in which units go.
            comparable: whether the scores compare between layers, without which `global` says nothing.
        """
        self._layout, self._architecture, self._compute = layout, architecture, compute
        self._levels, self._evidence, self._order, self._comparable = levels, evidence, order, comparable
        self.found: Refined | None = None

    def __call__(self, ladders: Ladders, depth: Depth, target: int, params: Allocate) -> Depth:
        """Search on from the given depths, or from a rival's."""
        curves = self._evidence.curves
        assert curves is not None
        run = set_up(self._layout, self._compute, self._levels.sequences, last=True)
        require_own_weights(run)
        sequences = run.sequences.to(run.device)
        repair = local_repair(self._layout, self._architecture)
        judge = Judge(run.model, self._architecture, sequences, run.at_once, repair)
        inputs = inputs_identity(self._layout)
        name = sums_identity(
            run, {"order": self._order, "sequences": len(run.sequences), "inputs": inputs}, ("repair", "allocation")
        )
        record: Path = run.work / "search" / f"{name}.jsonl"
        rivals = [method for method in RIVALS if method != "global" or self._comparable]
        starts: dict[str, Depth] = {params.method: depth}
        starts |= rival_starts(self._architecture, ladders, target, params, self._evidence, rivals)
        self.found = refine(judge, self._architecture, ladders, curves, starts, target, params, record)
        told = ", ".join(f"{method} {divergence:.4f}" for method, divergence in self.found.starts.items())
        typer.echo(f"{self.found.evaluations} trials: divergence {told}; best {self.found.divergence:.4f}")
        return dict(self.found.depth)


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
        architecture: the model's description.
        ladders: the allowed removals.
        target: how much of the objective to remove.
        params: limits, with the split settled.
        evidence: the curves, and what the methods need.
        methods: names of `libprune.allocation.methods.METHODS`.
    """
    assert evidence.curves is not None
    plain = replace(evidence, curves=None)
    found = {}
    for method in methods:
        depth = METHODS[method](architecture, ladders, target, params, plain)
        while spent(ladders, depth) > target:
            back = max((b for b in depth if depth[b]), key=lambda block: ladders[block][depth[block] - 1].rank)
            depth[back] -= 1
        found[method] = fill(architecture, ladders, evidence.curves, depth, target, params)
    return found
