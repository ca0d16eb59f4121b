"""DVC's experiments as rows of settings and results: what `dvc exp show` lists, checked against `dvc.lock`.

DVC shows the metrics that lie in a revision, whether or not its params made them: a queued, running or failed
experiment carries those it started from, and so does a workspace whose params were edited since. Each revision's
`dvc.lock` says which params, and which inputs of each stage, its results belong to.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from libprune.engine.errors import LibpruneError
from libprune.experiments.costs import LOADER
from libprune.experiments.file import leaves_of

Shown = Sequence[Mapping[str, Any]]
"""The output of `dvc exp show --json`: the workspace and the chosen commits, each with its experiments."""

WORKSPACE = "workspace"
_UNFINISHED = ("queued", "running", "failed")


@dataclass(frozen=True)
class Measure:
    """What results are compared by; less of it is better.

    Attributes:
        name: its name, in texts and tables.
        scale: what is drawn of it, as the label of an axis.
        column: its name in CSV.
        dense: its value for the dense model.
        sign: what stands before its values.
    """

    name: str
    scale: str
    column: str
    dense: float
    sign: str


PERPLEXITY = Measure("perplexity", "perplexity ÷ dense", "perplexity_ratio", 1.0, "× ")
DISTANCE = Measure("1 - cosine", "1 - cosine to the dense embedding", "cosine_distance", 0.0, "")
"""One minus the mean cosine to the dense model's embeddings, by which embeddings are compared."""


@dataclass(frozen=True)
class Recovered:
    """What training after pruning came to.

    Attributes:
        ratio: the measure of the trained model: perplexity divided by that of the dense model, or `DISTANCE`.
        error: one standard error of it, over paired windows.
        tokens: tokens that were trained on.
        seconds: time of the training.
        parameters: number of trained parameters.
    """

    ratio: float
    error: float
    tokens: int
    seconds: float
    parameters: int


@dataclass(frozen=True)
class Experiment:
    """The settings of an experiment and their results, on the evaluation windows."""

    names: tuple[str, ...]
    """Its names in DVC: an experiment, a branch, a short commit, or `workspace`; several if all else is equal."""
    params: Mapping[str, Any]
    """Every param by its full name, such as `allocate.ratio`."""
    ratio: float
    """The measure of the pruned model, before any recovery: its perplexity divided by the dense model's, or another."""
    error: float
    """One standard error of it, over paired windows."""
    dense: float
    """Perplexity of the dense model; 0 where it has none."""
    removed: float
    """Share of the decoder's parameters that was removed."""
    prefill: float
    """Tokens a second in prefill, divided by those of the dense model."""
    size: int | None
    """Bytes of the pruned model's folder; None if its revision has no `dvc.lock`."""
    proved: bool = True
    """Whether a `dvc.lock` says that the results were made with these params."""
    revision: str = ""
    """The commit, or `workspace`, that holds its `dvc.lock`; one of them if several are equal."""
    recovered: Recovered | None = None
    """The figures after recovery; None if the pruned model was not trained."""
    made: str = ""
    """When its commit was made, as DVC writes it; the latest of several equal ones, empty for the workspace alone."""
    measure: Measure = PERPLEXITY
    """What the results are compared by."""
    rank_correlation: float | None = None
    """Rank correlation of the similarities of pairs with the dense model's, after recovery if there was one; None of
    models without embeddings."""

    @property
    def label(self) -> str:
        """The first two names, and how many more there are."""
        more = len(self.names) - 2
        return " = ".join(self.names[:2]) + (f" (+{more})" if more > 0 else "")


def compared_figures(rows: Sequence[Experiment]) -> Sequence[Experiment | Recovered]:
    """The figures by which rows are compared: those after recovery if every row has them, else those before it."""
    after = [row.recovered for row in rows if row.recovered is not None]
    return after if len(after) == len(rows) else rows


def gather_comparable(all_commits: bool = False) -> tuple[list[Experiment], dict[str, str]]:
    """Gather the experiments of the current folder's project, which must be at least two.

    Args:
        all_commits: the experiments of every commit, not only of HEAD.

    Raises:
        LibpruneError: if fewer than two different rows have results, or there is no project or no DVC.
    """
    rows, left_out = gather(show(all_commits), read_lock)
    if len(rows) < 2:
        only = f"only {rows[0].label} has results" if rows else "nothing has results"
        others = "".join(f"; {name}: {reason}" for name, reason in left_out.items())
        raise LibpruneError(
            f"there is nothing to compare: {only}{others}. Run an experiment, such as "
            "`dvc exp run -S allocate.ratio=0.3`, or choose --all-commits for those of earlier commits"
        )
    return rows, left_out


def show(all_commits: bool = False) -> Shown:
    """The output of `dvc exp show` for the project in the current folder, of HEAD or of all commits.

    Raises:
        LibpruneError: if this is no project folder, or DVC cannot be run here.
    """
    if not Path("dvc.yaml").exists():
        raise LibpruneError(f"{Path.cwd()} has no dvc.yaml; run `libprune compare` in the project's folder")
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json", *(["--all-commits"] if all_commits else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise LibpruneError(f"DVC cannot be run ({error}); install it beside libprune: pip install dvc") from error
    if done.returncode != 0:
        raise LibpruneError(f"`dvc exp show` failed in {Path.cwd()}: {done.stderr.strip()}")
    shown: Shown = json.loads(done.stdout)
    return shown


def read_lock(revision: str) -> str | None:
    """The `dvc.lock` of the workspace or of a commit; None where there is none."""
    if revision == WORKSPACE:
        path = Path("dvc.lock")
        return path.read_text() if path.exists() else None
    done = subprocess.run(["git", "show", f"{revision}:./dvc.lock"], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def gather(shown: Shown, lock_of: Callable[[str], str | None]) -> tuple[list[Experiment], dict[str, str]]:
    """Experiments with results, the best first, and by name why each other one has none.

    The best has the lowest perplexity, or what else is measured, before recovery, unless every experiment has one after
    it. Experiments that differ only in their names become one: after `dvc exp run` the workspace is the experiment
    itself.

    Args:
        shown: what `show` returns.
        lock_of: the text of a revision's `dvc.lock`, or None; `read_lock`.
    """
    by_content: dict[str, Experiment] = {}
    left_out: dict[str, str] = {}
    for name, state in _states(shown):
        result = _result(name, state, lock_of)
        if isinstance(result, str):
            left_out[name] = result
            continue
        content = repr(replace(result, names=(), revision="", made=""))
        if (equal := by_content.get(content)) is not None:
            names = sorted((*equal.names, name), key=lambda one: one == WORKSPACE)
            result = replace(result, names=tuple(names), made=max(equal.made, result.made))
        by_content[content] = result
    rows = list(by_content.values())
    order = sorted(zip(compared_figures(rows), rows, strict=True), key=lambda pair: pair[0].ratio)
    return [row for _, row in order], left_out


def _states(shown: Shown) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names and states of all commits and experiments; the state of a queued experiment has its `executor`."""
    for commit in shown:
        yield commit["name"] or (WORKSPACE if commit["rev"] == WORKSPACE else commit["rev"][:7]), commit
        for experiment in commit["experiments"] or []:
            tip = experiment["revs"][0]
            yield experiment["name"] or tip["rev"][:7], {**tip, "executor": experiment["executor"]}


def _result(name: str, state: Mapping[str, Any], lock_of: Callable[[str], str | None]) -> Experiment | str:
    """The experiment, or why it has no result."""
    progress = (state.get("executor") or {}).get("state")
    if progress in _UNFINISHED:
        return str(progress)
    if state["error"]:
        return str(state["error"]["msg"])
    try:
        experiment = replace(_experiment(name, state["data"]), revision=state["rev"])
    except KeyError:
        return "no results in metrics/evaluation.json"
    for figures in (experiment, experiment.recovered):
        if figures is not None and not isfinite(figures.ratio):
            return f"{experiment.measure.name} {figures.ratio}"
    lock = lock_of(state["rev"])
    if lock is None:
        return replace(experiment, proved=False)
    return outdated(experiment.params, lock) or experiment


def _experiment(name: str, data: Mapping[str, Any]) -> Experiment:
    evaluation = data["metrics"]["metrics/evaluation.json"]["data"]
    pruned, final = evaluation["pruned"], evaluation.get("recovered") or evaluation["pruned"]
    ratio, error = _measured(evaluation)
    return Experiment(
        names=(name,),
        params=leaves_of(data["params"]["params.yaml"]["data"]),
        ratio=ratio,
        error=error,
        dense=0.0 if "cosine" in pruned else evaluation["dense"]["perplexity"],
        removed=pruned["decoder_share_removed"],
        prefill=evaluation["speed"]["prefill_ratio"],
        size=data["outs"].get("artifacts/pruned", {}).get("size"),
        recovered=_recovered(evaluation["recovered"]) if "recovered" in evaluation else None,
        made=data.get("timestamp") or "",
        measure=DISTANCE if "cosine" in pruned else PERPLEXITY,
        rank_correlation=final.get("rank_correlation"),
    )


def _measured(figures: Mapping[str, Any]) -> tuple[float, float]:
    """What a model is compared by, with its standard error, from the metrics of all or of the recovered model."""
    of_embeddings = figures.get("pruned", figures)
    if "cosine" in of_embeddings:
        return max(_NO_DISTANCE, 1 - of_embeddings["cosine"]), of_embeddings["cosine_se"]
    return figures["perplexity_ratio"]["value"], figures["perplexity_ratio"]["se"]


_NO_DISTANCE = 1e-7
"""One minus the cosine of embeddings that are equal up to rounding, which leaves it 0 or a little less: distances are
compared by their logarithm."""


def _recovered(figures: Mapping[str, Any]) -> Recovered:
    ratio, error = _measured(figures)
    return Recovered(
        ratio=ratio,
        error=error,
        tokens=figures["tokens"],
        seconds=figures["seconds"],
        parameters=figures["trained_parameters"],
    )


_CHECKS = "sources"
"""The stage that reads all params only to look for mistakes; no result depends on them by it."""


def outdated(params: Mapping[str, Any], lock: str) -> str | None:
    """Why the results beside a `dvc.lock` are not those of these params; None if they are.

    Args:
        params: leaves of params.yaml by their full names.
        lock: the text of `dvc.lock`, in which every stage that has run has left its params and the hashes of its
            inputs and outputs.
    """
    try:
        stages = (yaml.load(lock, LOADER) or {}).get("stages") or {}
    except yaml.YAMLError:
        return "its dvc.lock is not valid YAML, as after a merge conflict; run `dvc repro`"
    made = {out["path"]: out.get("md5") for stage in stages.values() for out in stage.get("outs", [])}
    for name, stage in stages.items():
        read = {} if name == _CHECKS else stage.get("params", {}).get("params.yaml", {})
        ran, now = leaves_of(read), {key: value for key, value in params.items() if _is_of(key, read)}
        for key in {**ran, **now}:
            if str(now.get(key)) != str(ran.get(key)):  # as text: YAML 1.1 and 1.2 disagree whether 1e-05 is a number
                return f"{name} last ran with {key} {ran.get(key)}, not {now.get(key)}"
        for dep in stage.get("deps", []):
            if made.get(dep["path"], dep.get("md5")) != dep.get("md5"):
                return f"{name} has not run since {dep['path']} changed"
    return None


def _is_of(leaf: str, read: Container[str]) -> bool:
    """Whether a leaf is one of the params that a stage reads, or a part of one, such as `prepare.vocabulary.text`."""
    parts = leaf.split(".")
    return any(".".join(parts[:number]) in read for number in range(1, len(parts) + 1))
