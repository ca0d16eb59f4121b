"""The chosen sizes of a curve as DVC experiments: the runs that are wanted, and what those that exist have measured."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from scipy.special import stdtrit

from libprune.curves.plans import Curve
from libprune.engine.errors import ArtifactError
from libprune.engine.yaml_file import read_yaml
from libprune.experiments.dvc_experiments import Experiment, gather, read_lock, show
from libprune.experiments.file import SEED, Comparison, Data, Setting, leaves_of, read_setting
from libprune.experiments.report import COSTS
from libprune.experiments.results import cache_folder, cached_file
from libprune.experiments.runs import Echo, find_experiment, missing_runs, run_all
from libprune.pipeline.artifacts import read_json
from libprune.pipeline.methods import METHODS
from libprune.pipeline.sections import Allocate, Tokenize
from libprune.project.commands import in_repository
from libprune.report.headline import ratio_interval

RATIO, NESTED = "allocate.ratio", "allocate.nested"
"""The params that the sizes of a curve differ in."""
EVALUATION = "artifacts/evaluation.json"


@dataclass(frozen=True)
class Measured:
    """What a sliced and evaluated model of the curve came to.

    Attributes:
        experiment: its figures in DVC.
        evaluation: the content of its `artifacts/evaluation.json`; None if DVC's cache does not hold it.
    """

    experiment: Experiment
    evaluation: Mapping[str, Any] | None

    def interval(self, ratio: float, error: float) -> tuple[float, float]:
        """The 95 % interval of a measure of this model, over the windows; not numbers where it is not known.

        Args:
            ratio: the measure.
            error: one standard error of it.
        """
        if self.evaluation is None:
            return math.nan, math.nan
        windows = self.evaluation["protocol"]["windows"]
        if self.experiment.measure.dense:
            return ratio_interval({"value": ratio, "se": error}, windows)
        half = float(stdtrit(windows - 1, 0.975)) * error
        return ratio - half, ratio + half

    def speed(self, name: str) -> tuple[float, float, float] | None:
        """The speed over the dense model's, with the slowest and the fastest round; None where it is not known.

        Args:
            name: `prefill` or `decode`.
        """
        found = self.evaluation["speed"] if self.evaluation else {}
        if found.get(f"{name}_ratio") is None:
            return None
        low, high = found[f"{name}_spread"]
        return found[f"{name}_ratio"], low, high


def curve_comparison(
    path: Path,
    ratios: Sequence[float],
    nested: Mapping[float, Sequence[float]],
    fixed: Mapping[str, Any] = MappingProxyType({}),
) -> Comparison:
    """The runs that slice and evaluate the models of a curve, as a comparison whose settings are the ratios.

    All other params are those of the file. Their digest is in the names of the runs, so that curves of other params
    have names of their own.

    Args:
        path: the params file.
        ratios: the ratios to run.
        nested: by ratio, the smaller ratios whose cuts it is to contain.
        fixed: params by their full names that all runs have, whatever the file says.

    Raises:
        LibpruneError: if a ratio makes the params not valid.
    """
    data = read_yaml(path)
    others = {key: str(value) for key, value in leaves_of(data).items() if key not in (RATIO, NESTED)}
    own = json.dumps([others, sorted(nested.items()), dict(fixed)], sort_keys=True)
    name = f"curve-{hashlib.sha256(own.encode()).hexdigest()[:6]}"
    seed, given = _seed(data), bool((data.get("allocate") or {}).get("nested"))

    def setting(ratio: float) -> Setting:
        smaller = list(nested.get(ratio, ()))
        changes = {RATIO: ratio, **({NESTED: smaller} if smaller or given else {}), **fixed}
        return read_setting(f"{ratio:g}", changes, data, seed, path)

    settings = tuple(map(setting, ratios))
    return Comparison(name, name, settings, (seed,), None, data)


def require_curve(path: Path, params: Allocate, ratios: Sequence[float], nested: bool) -> None:
    """Stop at params that a ratio makes wrong, before anything is measured for it.

    Args:
        path: the params file.
        params: what it says of the allocation.
        ratios: those of the curve, ascending.
        nested: whether each smaller model is to be a part of the larger ones.

    Raises:
        LibpruneError: naming the ratio and what is wrong.
    """
    smaller = {ratio: ratios[:index] for index, ratio in enumerate(ratios) if nested and index}
    fixed = {"allocate.evaluations": 0} if nested and METHODS[params.method].improves else {}
    curve_comparison(path, ratios, smaller, fixed)


def _seed(data: Data) -> int:
    key = SEED.rpartition(".")[2]
    return int((data.get("tokenize") or {}).get(key, Tokenize.model_fields[key].default))


def gather_measured(
    comparison: Comparison, rows: Sequence[Experiment], lock_of: Callable[[str], str | None], cache: Path | None
) -> tuple[dict[float, Measured], list[str]]:
    """The models of a curve that experiments have results of, by ratio, and remarks on what is not known of them.

    Args:
        comparison: the runs that are wanted.
        rows: experiments with results, under whatever names.
        lock_of: reads a revision's `dvc.lock`.
        cache: the folder of DVC's cache; None if there is none.
    """
    found: dict[float, Measured] = {}
    remarks: dict[str, None] = {}
    for run in comparison.runs():
        row = find_experiment(run, rows)
        if row is None:
            continue
        evaluation = None
        try:
            place = cached_file(EVALUATION, "evaluate", lock_of(row.revision), cache)
            evaluation = read_json(place, "evaluate")
        except ArtifactError as error:
            remarks[f"{error}."] = None
        found[float(run.changes[RATIO])] = Measured(row, evaluation)
    return found, list(remarks)


def run_curve(
    path: Path, curve: Curve, chosen: Sequence[float], out: Path, echo: Echo
) -> tuple[dict[float, Measured], dict[str, str], list[str]]:
    """Run the chosen ratios as DVC experiments where they have no results, and gather what all ratios have.

    The current folder is that of the project.

    Args:
        path: the params file.
        curve: the plans.
        chosen: ratios to run; those without a plan are left out.
        out: the folder of the curve, where the output of the runs lies.
        echo: prints a line of progress.

    Returns:
        The measured models by ratio, by experiment why it failed, and remarks on what is not known.

    Raises:
        LibpruneError: if experiments cannot be run or listed here, or a run's name is taken.
    """
    if not chosen and not in_repository(Path()):
        return {}, {}, []  # there are no experiments without git
    ratios = [one.ratio for one in curve.planned]
    wanted = curve_comparison(path, [ratio for ratio in ratios if ratio in chosen], curve.nested, curve.fixed)
    failed: dict[str, str] = {}
    if wanted.settings:
        todo = missing_runs(wanted, *gather(show(), read_lock))
        echo(f"{wanted.name}: {len(wanted.settings) - len(todo)} of {len(wanted.settings)} have results")
        failed = run_all(wanted, todo, out / "logs", out / COSTS, echo)
    rows, _ = gather(show(), read_lock)
    measured, remarks = gather_measured(
        curve_comparison(path, ratios, curve.nested, curve.fixed), rows, read_lock, cache_folder()
    )
    return measured, failed, remarks
