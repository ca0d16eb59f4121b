"""What a run tells about itself: what it will do, which of how many stages is at work, and what each stage took.

DVC starts every stage as a process of its own. What the stages of one run have to know of each other lies in
`.dvc/tmp/libprune`, in a file by the number of DVC's process.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libprune.engine.errors import LibpruneError
from libprune.engine.yaml_file import parsed
from libprune.pipeline.atomic import write_json
from libprune.pipeline.methods import allocation_reads
from libprune.pipeline.params import Params, load_params
from libprune.pipeline.processes import dvc_of, runs
from libprune.pipeline.terminal import continued, logging_to, note, say, say_last, ticking

STEPS = {
    "prepare": "reading the model",
    "tokenize": "drawing the texts",
    "gradients": "measuring gradients",
    "hessian": "measuring curvature",
    "activations": "measuring activations",
    "ablation": "measuring what single units are worth",
    "score": "scoring all units",
    "sensitivity": "measuring what whole layers are worth",
    "depth": "measuring which layers can go whole",
    "levels": "measuring what it costs to narrow each block",
    "width": "measuring what it costs to narrow the residual stream",
    "latency": "timing layers of several widths",
    "allocate": "deciding which units go",
    "slice": "cutting the model, repairing it, and loading the result",
    "teacher": "drawing the text to train on",
    "recover": "training the pruned model",
    "export": "writing the formats of other programs",
    "evaluate": "measuring the dense and the pruned model",
    "report": "writing the report",
}
"""What each stage does, in the order in which they run; `sources`, which only sets links, is not told of."""
MEMORY = Path("libprune")
"""The folder, below `.dvc/tmp`, of what runs remember."""
COSTS = "costs.json"
"""The file in `MEMORY` of the seconds, the memory and the work of the last run of each stage."""
_FORECAST = "libprune.cli.forecast"
"""The program that says what a run will take. It is run, not imported: what is printed beforehand is no input of any
stage, and a stage would otherwise run again whenever a line of that program changes."""


def working(params: Params) -> list[str]:
    """The stages that have something to do under some params, in the order in which they run."""
    allocate = params.allocate
    reads = allocation_reads(allocate.method, allocate.worth, allocate.times)
    idle = {
        "hessian": params.hessian.estimator == "none",
        "ablation": params.ablation.units == 0,
        "sensitivity": "sensitivity" not in reads,
        "depth": not allocate.ordered,
        "levels": "levels" not in reads,
        "width": allocate.width is None,
        "latency": "latency" not in reads,
        "teacher": params.recover.method == "none",
        "recover": params.recover.method == "none",
        "export": not params.export.formats,
    }
    return [stage for stage in STEPS if not idle.get(stage, False)]


@contextmanager
def telling(stage: str, params: Path, artifacts: Path, peak: Any) -> Iterator[None]:
    """Tell what a stage does: which of how many it is, the time while it is silent, and what it took.

    The first stage of a run of DVC says before what the run will do and take. A stage that has nothing to do is silent.
    Details go to `logs/<stage>.log`.

    Args:
        stage: its name.
        params: the params file, which may not exist for a stage that reads none.
        artifacts: the folder of all artifacts.
        peak: gives the most memory that the process has held, in bytes.
    """
    settings = load_params(params) if params.exists() else None
    silent = stage == "sources" or (settings is not None and stage in STEPS and stage not in working(settings))
    run = None if silent or settings is None else _Run.of_dvc(settings)
    with logging_to(Path("logs", f"{stage}.log")):
        if silent:
            yield
            return
        number = "" if run is None else f"[{run.enter(stage, params, artifacts)}] "
        note(time.strftime(f"{stage}, %Y-%m-%d %H:%M:%S"))
        say(f"{number}{stage}: {STEPS.get(stage, 'at work')}")
        start = time.perf_counter()
        with ticking(stage):
            yield
        seconds, memory = time.perf_counter() - start, peak()
        say(f"{stage}: {seconds:.1f} s, peak memory {memory / 1e6:,.0f} MB")
        if run is not None:
            run.leave(stage, seconds, memory)
        say_last()


class _Run:
    """One run of DVC, as its stages see it."""

    def __init__(self, home: Path, dvc: int, words: list[str], settings: Params) -> None:
        self._home, self._path, self._words, self._settings = home, home / f"run-{dvc}.json", words, settings
        self._state: dict[str, Any] = {"done": [], "ahead": [], "work": {}}
        with suppress(OSError, ValueError):
            self._state = json.loads(self._path.read_text())

    @classmethod
    def of_dvc(cls, settings: Params) -> "_Run | None":
        """The run that this process belongs to; None if no DVC has started it."""
        dvc, home = dvc_of(), memory_of(Path())
        if dvc is None or home is None:
            return None
        for path in home.glob("run-*.json"):
            if not runs(int(path.stem.partition("-")[2])):
                path.unlink(missing_ok=True)
        words: list[str] = []
        with suppress(Exception):  # the words of a process of another user cannot be read
            words = dvc.cmdline()
        return cls(home, dvc.pid, words, settings)

    def enter(self, stage: str, params: Path, artifacts: Path) -> str:
        """Announce the run if this is its first stage; return which of how many stages this is."""
        done, order = self._state["done"], list(dict.fromkeys([*STEPS, stage]))
        expected = stages_ahead(stage, done, self._words) | {*self._state["ahead"]}
        works = expected & {*working(self._settings), stage}
        ahead = [name for name in order[order.index(stage) :] if name in works]  # DVC keeps to this order
        if not done:
            self._announce(ahead, params, artifacts)
        self._state |= {"done": [*done, stage], "ahead": ahead}
        remember(self._path, self._state)
        return f"{len(done) + 1}/{len(done) + len(ahead)}"

    def _announce(self, stages: list[str], params: Path, artifacts: Path) -> None:
        command = [sys.executable, "-m", _FORECAST, str(params), str(artifacts), str(self._home / COSTS), *stages]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        told = None
        with suppress(ValueError, IndexError):
            told = json.loads(done.stdout.splitlines()[-1])  # code of the model may print lines of its own before
        if done.returncode or not isinstance(told, dict):
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            say(f"{len(stages)} stages will run. What they take cannot be told: {last}")
            return
        self._state["work"] = told["work"]
        for line in told["lines"]:
            say(line)

    def leave(self, stage: str, seconds: float, memory: int) -> None:
        """Remember what a stage took, for the next forecast; of one that went on from a saved state it is unknown."""
        if not continued() and (work := self._state["work"].get(stage)):
            costs = read_memory(self._home / COSTS)
            remember(self._home / COSTS, costs | {stage: {"seconds": seconds, "work": work, "memory": memory}})


def memory_of(folder: Path) -> Path | None:
    """The folder of what runs remember, for a project or a folder in it; None if that is no project of DVC."""
    here = folder.resolve()
    root = next((place for place in (here, *here.parents) if (place / ".dvc/tmp").is_dir()), None)
    return None if root is None else root / ".dvc/tmp" / MEMORY


def remember(path: Path, content: Mapping[str, Any]) -> None:
    """Write what runs remember; where that cannot be done it is forgotten, since no stage may fail for it."""
    with suppress(LibpruneError, OSError):
        write_json(path, content)


def read_memory(path: Path) -> dict[str, Any]:
    """Read what runs remember; what cannot be read is as if it had never been written."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


RESULTS = "results.json"
"""The file in `MEMORY` of the figures and the params of the last two results that differ."""


@dataclass(frozen=True)
class Earlier:
    """The result before the present one.

    Attributes:
        figures: by name.
        changed: params that were others, by key: the value then and now.
    """

    figures: dict[str, float]
    changed: dict[str, tuple[Any, Any]]


def earlier_result(
    figures: Mapping[str, float], params: Path = Path("params.yaml"), keep: bool = False
) -> Earlier | None:
    """The last result of this project with other figures; None if none is remembered.

    Args:
        figures: of the present result.
        params: the file that it was made with.
        keep: remember the present result too.
    """
    home = memory_of(Path())
    if home is None:
        return None
    now = _leaves(parsed(params.read_text())) if params.exists() else {}
    runs_kept = read_memory(home / RESULTS).get("results", [])
    others = [one for one in runs_kept if one["figures"] != dict(figures)]
    if keep:
        entry = {"figures": dict(figures), "params": now}
        remember(home / RESULTS, {"results": [*others[-1:], entry]})
    if not others:
        return None
    then = others[-1]["params"]
    keys = [key for key in (then | now) if then.get(key) != now.get(key)]
    return Earlier(others[-1]["figures"], {key: (then.get(key), now.get(key)) for key in keys})


def _leaves(data: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a params file by their dotted keys."""
    if not isinstance(data, dict):
        return {prefix.removesuffix("."): data}
    return {key: leaf for name, value in data.items() for key, leaf in _leaves(value, f"{prefix}{name}.").items()}


_CHECKS = "sources"
"""The stage that reads all params, and whose outputs other stages read only where they read the same params."""


def stages_ahead(stage: str, done: list[str], words: list[str]) -> set[str]:
    """The stages that the run still comes to, the present one included, as far as it can be known.

    These are the stages whose params differ from those in `dvc.lock` or that are not in it, and all that depend on such
    a stage or on the present one. A stage further on may still be skipped, if what it reads has come out the same.

    Args:
        stage: the present one.
        done: stages that have run.
        words: of DVC's command line, which may name targets.
    """
    if not Path("dvc.yaml").exists():
        return {stage}
    graph = parsed(Path("dvc.yaml").read_text())["stages"]
    graph.pop(_CHECKS, None)
    lock = Path("dvc.lock")
    locked = (parsed(lock.read_text()) or {}).get("stages", {}) if lock.exists() else {}
    before = {name: _before(name, graph) for name in graph}
    changed = {name for name in graph if name not in done and _changed(locked.get(name))} | {stage}
    ahead = {name for name in graph if name in changed or before[name] & changed} - set(done)
    if (targets := {name for name in graph if name in words}) and "--downstream" not in words:
        ahead &= targets | set().union(*(before[name] for name in targets))
    return ahead | {stage}


def _changed(entry: Mapping[str, Any] | None) -> bool:
    """Whether a stage is not in `dvc.lock`, or was run with other params."""
    if entry is None:
        return True
    for file, values in entry.get("params", {}).items():
        now = parsed(Path(file).read_text()) if Path(file).exists() else {}
        if any(_value(now, key) != value for key, value in values.items()):
            return True
    return False


def _value(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _before(stage: str, graph: Mapping[str, Any]) -> set[str]:
    """The stages that a stage depends on, at whatever distance."""
    found: set[str] = set()
    todo = [stage]
    while todo:
        deps = [dep for dep in graph[todo.pop()].get("deps", []) if isinstance(dep, str)]
        for name, other in graph.items():
            if name not in found and any(_within(dep, out) for dep in deps for out in _outs(other)):
                found.add(name)
                todo.append(name)
    return found


def _within(dep: str, out: str) -> bool:
    return dep == out or dep.startswith(f"{out}/") or out.startswith(f"{dep}/")


def _outs(stage: Mapping[str, Any]) -> list[str]:
    entries = [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]
    return [entry if isinstance(entry, str) else str(next(iter(entry))) for entry in entries]
