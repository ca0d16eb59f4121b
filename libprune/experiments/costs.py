"""What stages took: read from what they print, kept by what they ran with, so that a cached stage's price is known."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from libprune.engine.errors import LibpruneError
from libprune.pipeline.artifacts import read_json
from libprune.pipeline.params import Params
from libprune.pipeline.writing import write_json

_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader  # ten times faster; a lock file is long
_STARTS = re.compile(r"Running stage '(\w+)'")
_ENDS = re.compile(r"(\w+): (\d+\.\d) s, peak memory ([\d,]+) MB")
_CONTINUES = "continues from a saved state"


@dataclass(frozen=True)
class Cost:
    """Time and memory of one stage or of several after each other.

    Attributes:
        seconds: of wall clock.
        peak_memory_bytes: the most memory that one process has held.
    """

    seconds: float
    peak_memory_bytes: int


Costs = Mapping[str, Cost]
"""By the digest of a stage's entry in `dvc.lock`."""


def total(costs: Iterable[Cost]) -> Cost:
    """Of several after each other."""
    known = list(costs)
    return Cost(sum((cost.seconds for cost in known), 0.0), max((cost.peak_memory_bytes for cost in known), default=0))


def read_costs(path: Path) -> dict[str, Cost]:
    """The record; empty where there is none.

    Raises:
        LibpruneError: if the file is not one that `write_costs` wrote.
    """
    if not path.exists():
        return {}
    try:
        return {digest: Cost(**cost) for digest, cost in read_json(path, "evaluate").items()}
    except (LibpruneError, TypeError, AttributeError) as error:
        raise LibpruneError(f"{path} is no record of costs ({error}); delete it") from error


def write_costs(path: Path, costs: Costs) -> None:
    """Write the record, whole or not at all."""
    write_json(path, {digest: asdict(cost) for digest, cost in costs.items()})


def lock_stages(lock: str | None) -> dict[str, dict[str, Any]]:
    """The stages of a `dvc.lock` by name; none without one that can be read."""
    try:
        found: dict[str, dict[str, Any]] = (yaml.load(lock or "", _LOADER) or {}).get("stages") or {}
    except yaml.YAMLError:
        return {}
    return found


def digest(entry: Mapping[str, Any]) -> str:
    """Names what a stage ran with and what came out, by its entry in `dvc.lock`; 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]


def printed_costs(log: str) -> dict[str, Cost]:
    """By stage, what the stages that ran have said in the output of `dvc exp run`.

    A stage that continued an earlier run counts its last piece only, and is left out.
    """
    found: dict[str, Cost] = {}
    stage, whole = "", True
    for line in log.splitlines():
        if starts := _STARTS.match(line):
            stage, whole = starts[1], True
        whole = whole and _CONTINUES not in line
        if whole and (ends := _ENDS.fullmatch(line.strip())) and ends[1] == stage:
            found[stage] = Cost(float(ends[2]), int(ends[3].replace(",", "")) * 1_000_000)
    return found


def costs_of(log: str, lock: str | None) -> dict[str, Cost]:
    """The costs of a run by digest, from its output and the `dvc.lock` that it has left."""
    stages = lock_stages(lock)
    return {digest(stages[name]): cost for name, cost in printed_costs(log).items() if name in stages}


def collecting(params: Params) -> tuple[str, ...]:
    """The collecting stages that these params make use of, beside the dense model's own weights."""
    from libprune.scoring.criteria import find_criterion
    from libprune.scoring.expression import named_criteria

    used = {
        *(stage for name in named_criteria(params.score) for stage in find_criterion(name).stages),
        *(["ablation"] if params.score.fusion in ("learned", "best") else []),
        *(["activations"] if params.slice.repair in ("bias", "local") else []),
        *(["activations"] if params.allocate.method in ("functional", "search") else []),
        *(["activations"] if params.allocate.worth == "functional" else []),
        *(["gradients"] if params.allocate.gradient_fix != "none" else []),
    }
    return tuple(stage for stage in ("gradients", "hessian", "activations", "ablation") if stage in used)


def pruning(params: Params) -> tuple[str, ...]:
    """The stages from the scores to the pruned model that do something under these params."""
    measuring = {
        "sensitivity": params.allocate.method == "hgsp" or params.allocate.worth == "sensitivity",
        "levels": params.allocate.method == "search",
        "latency": params.allocate.objective == "latency",
    }
    return ("score", *(stage for stage, used in measuring.items() if used), "allocate", "slice")


def cost_of(names: Iterable[str], lock: str | None, costs: Costs) -> Cost | None:
    """What these stages cost where their results came from; None if that of one is not on record."""
    stages = lock_stages(lock)
    found = [costs.get(digest(stages[name])) if name in stages else None for name in names]
    return None if None in found else total(cost for cost in found if cost is not None)
