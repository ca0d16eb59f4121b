"""The results of a comparison: the figures of each run, and the kept units and scores from DVC's cache."""

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from libprune.engine.errors import ArtifactError, LibpruneError
from libprune.engine.tables import Columns, column
from libprune.experiments.costs import (
    Cost,
    Costs,
    collecting_stages,
    cost_of,
    lock_stages,
    pruning_stages,
    recovering_stages,
)
from libprune.experiments.dvc_experiments import Experiment
from libprune.experiments.file import Comparison, Setting
from libprune.experiments.runs import find_experiment
from libprune.pipeline.artifacts import read_table
from libprune.scoring.ranks import spearman

Locks = Callable[[str], str | None]
"""Gives the text of a revision's `dvc.lock`, or None; see `libprune.experiments.dvc_experiments.read_lock`."""


@dataclass(frozen=True)
class Result:
    """The result of one run.

    Attributes:
        experiment: its figures, and what DVC calls it.
        kept: which units stay, ``[units]`` in the order of the per-unit tables; None if not in the cache.
        correlations: Spearman's correlation of importances and measured loss increases, by part; empty if unknown.
        collecting: the cost of the statistics that the setting reads; None if not on record.
        pruning: the cost of the stages from the scores to the pruned model; None if not on record.
        recovering: the cost of training the pruned model; None if it is not trained, or the cost is not on record.
    """

    experiment: Experiment
    kept: NDArray[np.bool_] | None
    correlations: Mapping[str, float]
    collecting: Cost | None
    pruning: Cost | None
    recovering: Cost | None = None


Results = dict[str, dict[int, Result]]
"""Results by setting, in the comparison's order, and by seed."""


@dataclass(frozen=True)
class Gathered:
    """A comparison with the results that there are.

    Attributes:
        comparison: the settings and seeds that were wanted.
        results: the results of the settings that have any.
        missing: by run without a result, why it has none.
        remarks: sentences on what else is not known, and what to do about it.
    """

    comparison: Comparison
    results: Results
    missing: Mapping[str, str]
    remarks: Sequence[str]

    def setting(self, name: str) -> Setting:
        """The setting of this name, with its changes."""
        return next(setting for setting in self.comparison.settings if setting.name == name)


def gather_results(
    comparison: Comparison,
    rows: Sequence[Experiment],
    reasons: Mapping[str, str],
    lock_of: Locks,
    cache: Path | None,
    costs: Costs,
) -> Gathered:
    """Find the results of every run.

    Args:
        comparison: the settings and seeds that are wanted.
        rows: experiments with results, under whatever names.
        reasons: by experiment without results, why it has none.
        lock_of: reads a revision's `dvc.lock`.
        cache: the folder of DVC's cache; None if there is none.
        costs: the record of what stages cost.

    Raises:
        LibpruneError: if no run has a result.
    """
    results: Results = {}
    missing, remarks = {}, dict[str, None]()
    params = {setting.name: setting for setting in comparison.settings}
    for run in comparison.runs():
        row = find_experiment(run, rows)
        if row is None:
            missing[run.experiment] = reasons.get(run.experiment, "not run")
            continue
        result, notes = _result(row, params[run.setting], lock_of(row.revision), cache, costs)
        results.setdefault(run.setting, {})[run.seed] = result
        remarks |= dict.fromkeys(notes)
    if not results:
        raise LibpruneError(_nothing(comparison, missing))
    ordered = {name: results[name] for name in params if name in results}
    return Gathered(comparison, ordered, missing, tuple(remarks))


def _nothing(comparison: Comparison, missing: Mapping[str, str]) -> str:
    why = "; ".join(f"{name}: {reason}" for name, reason in list(missing.items())[:3])
    return (
        f"no experiment of HEAD has results with the params of {comparison.name} ({why}); run `libprune compare run` "
        "with its file, or gather with --all-commits those of earlier commits"
    )


def _result(
    row: Experiment, setting: Setting, lock: str | None, cache: Path | None, costs: Costs
) -> tuple[Result, list[str]]:
    """The result of a run, and remarks on what is not known of it."""
    notes: list[str] = []
    tables = {}
    for path, stage in ((PLAN, "allocate"), (SCORES, "score"), (ABLATION, "ablation")):
        try:
            tables[path] = cached_table(path, stage, lock, cache)
        except ArtifactError as error:
            notes.append(f"{error}.")
    kept = tables[PLAN]["keep"].astype(np.bool_) if PLAN in tables else None
    correlations: dict[str, float] = {}
    if SCORES in tables and ABLATION in tables:
        if len(tables[ABLATION]["layer_idx"]):
            correlations = correlations_by_part(tables[SCORES], tables[ABLATION])
        else:
            notes.append(NOT_MEASURED)
    read, cut, trained = (
        cost_of(stages(setting.params), lock, costs)
        for stages in (collecting_stages, pruning_stages, recovering_stages)
    )
    return Result(row, kept, correlations, read, cut, trained if row.recovered else None), notes


PLAN, SCORES, ABLATION = "artifacts/plan.parquet", "artifacts/scores.parquet", "artifacts/ablation.parquet"

NOT_MEASURED = (
    "How the scores rank the units beside measured loss increases is unknown, since no unit was measured: set "
    "`ablation.units`, such as 200, under `set:` in the comparison file or in params.yaml, and run it again."
)


def cached_table(path: str, stage: str, lock: str | None, cache: Path | None) -> Columns:
    """Read a table that a revision's `dvc.lock` names from DVC's cache.

    Raises:
        ArtifactError: if the revision has none, or the cache does not hold it.
    """
    return read_table(cached_file(path, stage, lock, cache), stage)[0]


def cached_file(path: str, stage: str, lock: str | None, cache: Path | None) -> Path:
    """The place in DVC's cache of an output that a revision's `dvc.lock` names.

    Raises:
        ArtifactError: if the revision has none, or the cache does not hold it.
    """
    outs = lock_stages(lock).get(stage, {}).get("outs", [])
    md5 = next((out.get("md5") for out in outs if out["path"] == path), None)
    if md5 is None:
        raise ArtifactError(f"{path} of some runs is in no dvc.lock, so that columns about it are empty")
    place = cache / "files" / "md5" / md5[:2] / md5[2:] if cache else None
    if place is None or not place.exists():
        raise ArtifactError(
            f"{path} of some runs is no longer in DVC's cache, so that columns about it are empty; "
            "`dvc exp remove` such an experiment and run it again"
        )
    return place


def correlations_by_part(scores: Columns, measured: Columns) -> dict[str, float]:
    """Spearman's correlation of importance and measured loss increase over the measured units of each part.

    Each part has a correlation of its own, since not every criterion compares units of different parts.
    """
    keys = ("layer_idx", "group_type", "group_idx")
    units = zip(*(column(scores, key, SCORES).tolist() for key in keys), strict=True)
    importance = dict(zip(units, column(scores, "importance", SCORES).tolist(), strict=True))
    rows = list(zip(*(column(measured, key, ABLATION).tolist() for key in keys), strict=True))
    predicted = np.array([importance[row] for row in rows], dtype=np.float64)
    parts, increase = measured["group_type"], measured["loss_increase"]
    correlations = {part: spearman(predicted[parts == part], increase[parts == part]) for part in dict.fromkeys(parts)}
    return {part: value for part, value in correlations.items() if np.isfinite(value)}


def cache_folder() -> Path | None:
    """The folder of DVC's cache for the current folder's project; None if DVC does not say."""
    done = subprocess.run([sys.executable, "-m", "dvc", "cache", "dir"], capture_output=True, text=True, check=False)
    return Path(done.stdout.strip()) if done.returncode == 0 else None
