"""Made-up comparisons: runs with figures, kept sets and scores in a cache, without DVC."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from libprune.experiments.costs import Cost, lock_digest
from libprune.experiments.dvc_experiments import Experiment
from libprune.experiments.file import Comparison, ExperimentRun, read_comparison
from libprune.experiments.results import ABLATION, PLAN, SCORES, Gathered, gather_results
from libprune.pipeline.artifacts import write_table
from tests.support.params import untrained
from tests.support.swept import recovered

UNREAD = ("gradients", "activations", "slice", "teacher", "recover")
"""Stages of which a comparison reads nothing but the cost."""
UNITS = 40
"""The number of units, all of one layer; the first eight are attention groups."""
Ratios = Mapping[str, Sequence[float]]
"""Perplexity ratios by setting, one for each seed."""
RATIOS: Ratios = {"good": [1.20, 1.22, 1.21], "same": [1.205, 1.215, 1.21], "bad": [2.0, 2.3, 2.1]}
PRICED: Ratios = {
    "cheap": [2.0, 2.3, 2.1],
    "dear": [1.20, 1.22, 1.21],
    "twin": [1.205, 1.215, 1.21],
    "worst": [9.0, 9.5, 8.7],
}
AFTER: Ratios = {"good": [1.15, 1.16, 1.14], "same": [1.155, 1.17, 1.15], "bad": [1.10, 1.11, 1.09]}
"""Ratios after recovery for the settings of `RATIOS`, which put the worst of them first."""
SECONDS = {"cheap": 4.0, "dear": 100.0, "twin": 50.0, "worst": 60.0}
"""The seconds that each of the `PRICED` settings takes."""


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
    """A comparison of two settings and three seeds, or of what is given instead, on params that do not train."""
    params = folder / "untrained.yaml"
    params.write_text(yaml.safe_dump(untrained(), sort_keys=False))
    return read_comparison(write_comparison(folder, **content), params)


def experiment(
    run: ExperimentRun, ratio: float, error: float = 0.01, removed: float = 0.2, dense: float = 20.0
) -> Experiment:
    """An experiment with a run's params."""
    return Experiment(
        (run.experiment,), run.leaves, ratio, error, dense, removed, prefill=1.1, size=1, revision=run.experiment
    )


def unit_table(**columns: Sequence[Any] | np.ndarray) -> dict[str, np.ndarray]:
    """A per-unit table: the index of all units with these columns."""
    parts = np.array(["attention"] * 8 + ["mlp"] * (UNITS - 8), dtype=object)
    index = {"layer_idx": np.zeros(UNITS, dtype=np.int64), "group_type": parts, "group_idx": np.arange(UNITS)}
    return index | {name: np.asarray(values) for name, values in columns.items()}


def store(cache: Path, table: Mapping[str, np.ndarray]) -> str:
    """Put a table into a folder that is laid out as DVC's cache, and return its hash."""
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
    stages: dict[str, Any] = {name: {"cmd": name, "outs": []} for name in UNREAD}
    for stage, (name, path) in made.items():
        stages[stage] = {"cmd": stage, "outs": [{"path": path, "md5": outs[name]}] if name in outs else []}
    return yaml.safe_dump({"stages": stages})


def gathered(
    folder: Path,
    ratios: Ratios,
    kept: Mapping[str, Sequence[np.ndarray]] | None = None,
    error: float = 0.01,
    seconds: Mapping[str, float] | None = None,
    after: Ratios | None = None,
    **content: Any,
) -> Gathered:
    """A comparison with these ratios by seed, kept sets, and seconds of collecting and of pruning by setting.

    Settings that have ratios after recovery, in `after`, train for as many seconds as they prune.
    """
    after = after or {}
    settings: dict[str, dict[str, Any]] = {
        name: {"score.seed": i, "score.criterion": "unit_fisher"} for i, name in enumerate(ratios)
    }
    for name in after:
        settings[name]["recover.method"] = "full"
    content = {"settings": settings, "seeds": list(range(max(map(len, ratios.values()))))} | content
    made = comparison(folder, **content)
    rows, locks, costs = [], {}, {}
    for run in made.runs():
        if run.seed >= len(ratios[run.setting]):
            continue
        row = experiment(run, ratios[run.setting][run.seed], error)
        rows.append(replace(row, recovered=recovered(after[run.setting][run.seed])) if run.setting in after else row)
        hashes = {"plan": store(folder, unit_table(keep=kept[run.setting][run.seed]))} if kept else {}
        stages = yaml.safe_load(lock(**hashes))["stages"]
        for entry in stages.values():
            entry["run"] = run.experiment
        locks[run.experiment] = yaml.safe_dump({"stages": stages})
        if seconds and run.setting in seconds:
            for stage in ("gradients", "score", "allocate", "slice", "teacher", "recover"):
                costs[lock_digest(stages[stage])] = Cost(seconds[run.setting] / 4, 2_000_000)
    return gather_results(made, rows, {}, locks.get, folder, costs)


def kept_sets(ratios: Ratios = RATIOS) -> dict[str, list[np.ndarray]]:
    """Random sets of kept units, one for each ratio, each of some 80 % of the units."""
    rng = np.random.default_rng(0)
    return {name: [rng.random(UNITS) < 0.8 for _ in values] for name, values in ratios.items()}


def priced(folder: Path) -> Gathered:
    """A comparison of the `PRICED` settings with kept sets and costs."""
    return gathered(folder, PRICED, kept_sets(PRICED), seconds=SECONDS, title="A *title*")
