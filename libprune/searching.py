"""Carrying out a search for a better plan: from the artifacts to depths, resumable."""

from pathlib import Path

import typer

from libprune.architecture import Architecture
from libprune.artifacts import Layout
from libprune.calibration import require_own_weights, set_up
from libprune.collection import fingerprint
from libprune.ladders import Ladders
from libprune.methods import Depth, Evidence
from libprune.refine import Judge, Refined, refine
from libprune.repairing import inputs_identity, local_repair
from libprune.sections import Allocate, Compute, Levels


class Search:
    """Improves a method's depths by measuring whole plans; `found` says what came of it."""

    def __init__(
        self,
        layout: Layout,
        architecture: Architecture,
        compute: Compute,
        levels: Levels,
        params: Allocate,
        evidence: Evidence,
        order: str,
    ) -> None:
        """Nothing is loaded before the search begins.

        Args:
            layout: where the artifacts are.
            architecture: the model's description.
            compute: how to run the model.
            levels: whose calibration sequences are used.
            params: evaluations, minutes and seed.
            evidence: the curves that trials are filled by.
            order: names the order in which units go.
        """
        self._layout, self._architecture, self._compute = layout, architecture, compute
        self._levels, self._params, self._evidence, self._order = levels, params, evidence, order
        self.found: Refined | None = None

    def __call__(self, ladders: Ladders, depth: Depth, target: int) -> Depth:
        """Search on from the given depths."""
        assert self._evidence.curves is not None
        run = set_up(self._layout, self._compute, self._levels.sequences, last=True)
        require_own_weights(run)
        sequences = run.sequences.to(run.device)
        repair = local_repair(self._layout, self._architecture)
        judge = Judge(run.model, self._architecture, sequences, run.at_once, repair)
        inputs = inputs_identity(self._layout)
        name = fingerprint(run, {"order": self._order, "sequences": len(run.sequences), "inputs": inputs})
        record: Path = run.work / "search" / f"{name}.jsonl"
        curves, params = self._evidence.curves, self._params
        self.found = refine(judge, self._architecture, ladders, curves, depth, target, params, record)
        typer.echo(f"{self.found.evaluations} trials: divergence {self.found.first:.4f} to {self.found.divergence:.4f}")
        return dict(self.found.depth)
