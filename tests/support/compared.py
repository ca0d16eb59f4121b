"""Made-up comparisons: runs with figures, kept sets and scores in a cache, without DVC."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from libprune.experiments.costs import Cost, lock_digest
from libprune.experiments.dvc_experiments import Experiment
from libprune.experiments.file import Comparison, ExperimentRun, read_comparison
from libprune.experiments.results import ABLATION, PLAN, SCORES, Gathered, gather_results
from libprune.pipeline.artifacts import write_table
from tests.support.closure import ROOT

UNITS = 40
"""Of one layer; the first eight are attention groups."""


def write_comparison(folder: Path, **content: Any) -> Path:
    """A comparison file of two settings and three seeds, or of what is given instead."""
    base = {
        "name": "made-up",
        "settings": {"fisher": {"score.criterion": "unit_fisher"}, "plain": {"score.criterion": "magnitude"}},
        "seeds": [0, 1, 2],
    }
    path = folder / "made-up.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (base | content).items() if v is not None}, sort_keys=False))
    return path


def comparison(folder: Path, **content: Any) -> Comparison:
    """The same, read for the repository's params.yaml."""
    return read_comparison(write_comparison(folder, **content), ROOT / "params.yaml")


def experiment(
    run: ExperimentRun, ratio: float, error: float = 0.01, removed: float = 0.2, dense: float = 20.0
) -> Experiment:
    """An experiment with a run's params."""
    return Experiment(
        (run.experiment,), run.leaves, ratio, error, dense, removed, prefill=1.1, size=1, revision=run.experiment
    )


def unit_table(**columns: Sequence[Any] | np.ndarray) -> dict[str, np.ndarray]:
    """The index of all units with these columns."""
    parts = np.array(["attention"] * 8 + ["mlp"] * (UNITS - 8), dtype=object)
    index = {"layer_idx": np.zeros(UNITS, dtype=np.int64), "group_type": parts, "group_idx": np.arange(UNITS)}
    return index | {name: np.asarray(values) for name, values in columns.items()}


def store(cache: Path, table: Mapping[str, np.ndarray]) -> str:
    """Put a table into a folder that is laid out as DVC's cache; its hash."""
    write_table(cache / "new", dict(table), {})
    content = (cache / "new").read_bytes()
    md5 = hashlib.md5(content).hexdigest()
    place = cache / "files/md5" / md5[:2] / md5[2:]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return md5


def lock(**outs: str) -> str:
    """A dvc.lock whose stages have made these tables: hashes of `plan`, `scores` and `ablation`."""
    made = {"allocate": ("plan", PLAN), "score": ("scores", SCORES), "ablation": ("ablation", ABLATION)}
    stages: dict[str, Any] = {name: {"cmd": name, "outs": []} for name in ("gradients", "activations", "slice")}
    for stage, (name, path) in made.items():
        stages[stage] = {"cmd": stage, "outs": [{"path": path, "md5": outs[name]}] if name in outs else []}
    return yaml.safe_dump({"stages": stages})


def gathered(
    folder: Path,
    ratios: Mapping[str, Sequence[float]],
    kept: Mapping[str, Sequence[np.ndarray]] | None = None,
    error: float = 0.01,
    seconds: Mapping[str, float] | None = None,
    **content: Any,
) -> Gathered:
    """A comparison with these ratios by seed, kept sets, and seconds of collecting and of pruning by setting."""
    settings = {name: {"score.seed": i, "score.criterion": "unit_fisher"} for i, name in enumerate(ratios)}
    content = {"settings": settings, "seeds": list(range(max(map(len, ratios.values()))))} | content
    made = comparison(folder, **content)
    rows, locks, costs = [], {}, {}
    for run in made.runs():
        if run.seed >= len(ratios[run.setting]):
            continue
        rows.append(experiment(run, ratios[run.setting][run.seed], error))
        hashes = {"plan": store(folder, unit_table(keep=kept[run.setting][run.seed]))} if kept else {}
        stages = yaml.safe_load(lock(**hashes))["stages"]
        for entry in stages.values():
            entry["run"] = run.experiment
        locks[run.experiment] = yaml.safe_dump({"stages": stages})
        if seconds and run.setting in seconds:
            for stage in ("gradients", "score", "allocate", "slice"):
                costs[lock_digest(stages[stage])] = Cost(seconds[run.setting] / 4, 2_000_000)
    return gather_results(made, rows, {}, locks.get, folder, costs)
