"""The runs that a comparison lacks, carried out by DVC one after the other; the workspace is left as it was."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from libprune.engine.errors import LibpruneError
from libprune.experiments.costs import costs_of, lock_stages, read_costs, write_costs
from libprune.experiments.dvc_experiments import WORKSPACE, Experiment, read_lock
from libprune.experiments.file import Comparison, ExperimentRun, leaves_of
from libprune.pipeline.atomic import writing
from libprune.pipeline.processes import environment

Echo = Callable[[str], None]

PARAMS, LOCK = Path("params.yaml"), Path("dvc.lock")
_PATIENCE = 60  # seconds for DVC to end after an interrupt


def missing_runs(
    comparison: Comparison, rows: Sequence[Experiment], left_out: Mapping[str, str]
) -> list[ExperimentRun]:
    """The runs of a comparison that have no results yet.

    Results count if an experiment or a commit has them; those of the workspace alone would not last.

    Args:
        comparison: the settings and seeds that are wanted.
        rows: experiments with results.
        left_out: why each other experiment has none.

    Raises:
        LibpruneError: if a run's name is taken by an experiment with other params, or one without results.
    """
    lasting = [row for row in rows if row.revision != WORKSPACE]
    done = {run.experiment for run in comparison.runs() if find_experiment(run, lasting)}
    todo = [run for run in comparison.runs() if run.experiment not in done]
    taken = [f"{run.experiment} ({why})" for run in todo if (why := _taken(run, rows, left_out))]
    if taken:
        raise LibpruneError(
            f"experiments of these names exist: {'; '.join(taken)}. Remove them with `dvc exp remove NAME`, "
            "or give the comparison another name"
        )
    return todo


def find_experiment(run: ExperimentRun, rows: Sequence[Experiment]) -> Experiment | None:
    """The experiment, under whatever name, whose params are those of a run; None if there is none.

    Of several, such as one before and one after an edit of the text, it is the one that was made last: rows come with
    the best first, and the best of several would be too good.
    """
    return max((row for row in rows if run.is_of(row.params)), key=lambda row: row.made, default=None)


def _taken(run: ExperimentRun, rows: Sequence[Experiment], left_out: Mapping[str, str]) -> str | None:
    """Why a run cannot have its name; None if it can."""
    for row in rows:
        if run.experiment in row.names:
            differ = [key for key, value in run.leaves.items() if str(row.params.get(key)) != str(value)]
            gone = [key for key in row.params if key not in run.leaves]
            shown = [f"{key} {row.params.get(key)}, not {run.leaves.get(key)}" for key in (differ + gone)[:3]]
            return "with " + ", ".join(shown)
    reason = left_out.get(run.experiment)
    return None if reason in (None, "failed") else reason


def run_all(
    comparison: Comparison, todo: Sequence[ExperimentRun], logs: Path, costs: Path, echo: Echo
) -> dict[str, str]:
    """Run experiments one after the other, going on after one that fails, and restore the workspace.

    Args:
        comparison: the comparison of these runs.
        todo: the runs, in this order.
        logs: the folder for the output of each run, under its name.
        costs: the file that records what stages cost, to which this adds.
        echo: prints a line of progress.

    Returns:
        By experiment, why it failed.
    """
    failed: dict[str, str] = {}
    if not todo:
        return failed
    seconds: list[float] = []
    present = leaves_of(comparison.data)
    with workspace_kept(echo):
        content = PARAMS.read_bytes()
        for i, run in enumerate(todo, 1):
            changes = ", ".join(f"{key}={value}" for key, value in run.changes.items())
            echo(f"[{i} of {len(todo)}] {run.experiment}: {changes}")
            _write(PARAMS, content)  # without the changes of the experiment before
            log, start = logs / f"{run.experiment}.txt", time.monotonic()
            settings = [one for key, value in run.changes.items() for one in overrides(key, value, key in present)]
            reason = run_experiment(run.experiment, settings, log)
            seconds.append(time.monotonic() - start)
            write_costs(costs, read_costs(costs) | costs_of(log.read_text(errors="replace"), read_lock(WORKSPACE)))
            if reason is not None:
                failed[run.experiment] = f"{reason} (log: {log})"
            left = f"; about {duration(remaining(todo[:i], todo[i:], seconds))} left" if todo[i:] else ""
            echo(f"    {f'failed: {reason}; ' if reason else ''}{duration(seconds[-1])}{left}")
    return failed


def run_experiment(name: str, settings: Sequence[str], log: Path) -> str | None:
    """Run `dvc exp run` in the workspace, with its output in a file.

    DVC has a process group of its own, so that an interrupt reaches it once, from here, and it can clear up.

    Returns:
        None, or why the run failed.

    Raises:
        LibpruneError: if DVC cannot be run here.
        KeyboardInterrupt: after DVC has ended.
    """
    options = [part for setting in settings for part in ("-S", setting)]
    command = [sys.executable, "-m", "dvc", "exp", "run", "--name", name, *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        try:
            # A job in the background ignores interrupts, and so would DVC, which must hear the one from here.
            with _interrupted_by(signal.SIGINT, even_ignored=True):
                process = subprocess.Popen(
                    command,
                    env=environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
        except OSError as error:
            raise LibpruneError(f"DVC cannot be run ({error}); install it beside libprune: pip install dvc") from error
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _end(process)
            raise
    return None if code == 0 else reason_of(log.read_text(errors="replace"), code)


def _end(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
            return


def reason_of(log: str, code: int) -> str:
    """Why a run failed: the error of a stage in the output of DVC, or else DVC's own."""
    for begins in ("error: ", "ERROR: "):
        lines = [line for line in log.splitlines() if line.startswith(begins)]
        if lines:
            return lines[-1].removeprefix(begins)
    return f"DVC ended with {code}"


def overrides(name: str, value: Any, present: bool) -> list[str]:
    """Arguments of `dvc exp run -S` that set a param, in the grammar of Hydra's overrides.

    `++` adds what the file does not have. A mapping would be merged into one that stands there, which goes first.

    Args:
        name: the full name of the param.
        value: as YAML can say it.
        present: whether the file has this param, and not as a mapping.
    """
    if isinstance(value, Mapping):
        return [f"++{name}=null", f"++{name}={_quoted(value)}"]
    return [f"{'' if present else '++'}{name}={_quoted(value)}"]


def _quoted(value: Any) -> str:
    if isinstance(value, str):
        doubled = re.sub(r"(\\+)('|\Z)", r"\1\1\2", value)  # before a quote alone a backslash means more than itself
        return "'" + doubled.replace("'", "\\'") + "'"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_quoted(one) for one in value) + "]"
    if isinstance(value, Mapping):  # whose keys take no quotes
        return "{" + ",".join(f"{key}:{_quoted(one)}" for key, one in value.items()) + "}"
    return json.dumps(value)


def remaining(done: Sequence[ExperimentRun], todo: Sequence[ExperimentRun], seconds: Sequence[float]) -> float:
    """Seconds that the rest will take: each run as its setting took with an earlier seed, or else the mean of all."""
    known = {run.setting: value for run, value in zip(done, seconds, strict=True)}
    mean = sum(seconds) / len(seconds)
    return sum(known.get(run.setting, mean) for run in todo)


def duration(seconds: float) -> str:
    """A time in words: seconds, from two minutes on minutes, from two hours on hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def workspace_kept(echo: Echo) -> Iterator[None]:
    """At the end put back params.yaml, dvc.lock and the metrics, and the artifacts that this dvc.lock names.

    SIGTERM, and SIGHUP of a terminal that closes, end what is inside as Ctrl-C does: DVC would otherwise go on alone.
    """
    kept = {path: path.read_bytes() for path in _tracked()}
    try:
        with _interrupted_by(signal.SIGTERM, signal.SIGHUP):
            yield
    finally:
        for path in _tracked():
            if path not in kept:
                path.unlink()
        for path, content in kept.items():
            _write(path, content)
        if LOCK in kept and (reason := _check_out(kept[LOCK].decode())) is not None:
            echo(f"params.yaml, dvc.lock and metrics are restored, but not all artifacts: {reason}; run `dvc repro`")


@contextmanager
def _interrupted_by(*signs: signal.Signals, even_ignored: bool = False) -> Iterator[None]:
    """Inside the context these signals raise KeyboardInterrupt; those that are ignored, as under `nohup`, if asked."""
    if threading.current_thread() is not threading.main_thread():  # the only one that may handle signals
        yield
        return
    before = {sign: signal.getsignal(sign) for sign in signs}
    kept = {None} if even_ignored else {None, signal.SIG_IGN}  # None: set by code that is not Python
    heard = [sign for sign, handler in before.items() if handler not in kept]
    for sign in heard:
        signal.signal(sign, signal.default_int_handler)
    try:
        yield
    finally:
        for sign in heard:
            signal.signal(sign, before[sign])


def _check_out(lock: str) -> str | None:
    """Put back the artifacts that a `dvc.lock` names, and remove others; why that failed, or None.

    DVC counts it as a failure if stages have never run; so those that have are asked for alone then.
    """
    for stages in ([], list(lock_stages(lock))):
        command = [sys.executable, "-m", "dvc", "checkout", *stages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return None
    return reason_of(done.stderr, done.returncode)


def _tracked() -> list[Path]:
    """The files under git that an experiment changes."""
    figures = (path for ending in ("json", "csv") for path in sorted(Path("metrics").glob(f"*.{ending}")))
    return [path for path in (PARAMS, LOCK, *figures) if path.exists()]


def _write(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        with writing(path) as partial:
            partial.write_bytes(content)
