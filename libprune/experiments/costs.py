"""Time and memory of stages, read from their output and recorded under the digest of their entry in `dvc.lock`.

So the cost of a stage is known also where DVC took its results from the cache.
"""

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
from libprune.pipeline.atomic import write_json
from libprune.pipeline.methods import REPAIRS, allocation_reads
from libprune.pipeline.params import Params
from libprune.pipeline.terminal import CONTINUES

LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader  # ten times faster; a lock file is long
_STARTS = re.compile(r"Running stage '(\w+)'")
_ENDS = re.compile(r"(\w+): (\d+\.\d) s, peak memory ([\d,]+) MB")


@dataclass(frozen=True)
class Cost:
    """Time and memory of one stage, or of several that ran one after the other.

    Attributes:
        seconds: wall-clock time.
        peak_memory_bytes: the most memory that one process held.
    """

    seconds: float
    peak_memory_bytes: int


Costs = Mapping[str, Cost]
"""Costs of stages by the digest of their entry in `dvc.lock`; see `lock_digest`."""


def total(costs: Iterable[Cost]) -> Cost:
    """The cost of several stages one after the other: their times add up, and the largest memory counts."""
    known = list(costs)
    return Cost(sum((cost.seconds for cost in known), 0.0), max((cost.peak_memory_bytes for cost in known), default=0))


def read_costs(path: Path) -> dict[str, Cost]:
    """Read the record of costs; it is empty if the file does not exist.

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
    """Write the record of costs, whole or not at all."""
    write_json(path, {digest: asdict(cost) for digest, cost in costs.items()})


def lock_stages(lock: str | None) -> dict[str, dict[str, Any]]:
    """The entries of a `dvc.lock` by stage; empty if there is no `dvc.lock` or it is not valid YAML."""
    try:
        stages: dict[str, dict[str, Any]] = (yaml.load(lock or "", LOADER) or {}).get("stages") or {}
    except yaml.YAMLError:
        return {}
    return stages


def lock_digest(entry: Mapping[str, Any]) -> str:
    """Digest of a stage's entry in `dvc.lock`, which lists its inputs and outputs; 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()[:16]


def printed_costs(log: str) -> dict[str, Cost]:
    """The costs, by stage, that the stages of a run printed into the output of `dvc exp run`.

    A stage that continued an earlier run is left out, since it timed only its last piece.
    """
    costs: dict[str, Cost] = {}
    stage, whole = "", True
    for line in log.splitlines():
        if starts := _STARTS.match(line):
            stage, whole = starts[1], True
        whole = whole and CONTINUES not in line
        if whole and (ends := _ENDS.fullmatch(line.strip())) and ends[1] == stage:
            costs[stage] = Cost(float(ends[2]), int(ends[3].replace(",", "")) * 1_000_000)
    return costs


def costs_of(log: str, lock: str | None) -> dict[str, Cost]:
    """The costs of a run by digest, from its output and the `dvc.lock` that it left."""
    stages = lock_stages(lock)
    return {lock_digest(stages[name]): cost for name, cost in printed_costs(log).items() if name in stages}


def collecting_stages(params: Params) -> tuple[str, ...]:
    """The collecting stages whose statistics these params read; the dense model's own weights need none."""
    from libprune.scoring.criteria import find_criterion
    from libprune.scoring.expression import named_criteria

    read = allocation_reads(params.allocate.method, params.allocate.worth, depth=params.allocate.depth)
    used = {
        *(stage for name in named_criteria(params.score) for stage in find_criterion(name).stages),
        *(["ablation"] if params.score.fusion in ("learned", "best") else []),
        *REPAIRS[params.slice.repair].reads,
        *read,
        *(["activations"] if {"levels", "depth"} & {*read} else []),  # for a local repair, and for cosines
        *(["gradients"] if params.allocate.gradient_fix != "none" or params.slice.fisher_share else []),
    }
    return tuple(stage for stage in ("gradients", "hessian", "activations", "ablation") if stage in used)


def pruning_stages(params: Params) -> tuple[str, ...]:
    """The stages from the scores to the pruned model that have something to do under these params."""
    allocate = params.allocate
    read = allocation_reads(allocate.method, allocate.worth, allocate.times, depth=allocate.depth)
    measuring = (stage for stage in ("sensitivity", "depth", "levels", "latency") if stage in read)
    narrowed = [] if allocate.width is None else ["width"]
    return ("score", *measuring, *narrowed, "allocate", "slice")


def recovering_stages(params: Params) -> tuple[str, ...]:
    """The stages that train the pruned model under these params; none if it is not trained."""
    return () if params.recover.method == "none" else ("teacher", "recover")


def cost_of(names: Iterable[str], lock: str | None, costs: Costs) -> Cost | None:
    """The cost of these stages in the runs that made their results; None if the cost of one is not on record."""
    stages = lock_stages(lock)
    recorded = [costs.get(lock_digest(stages[name])) if name in stages else None for name in names]
    return None if None in recorded else total(cost for cost in recorded if cost is not None)
