"""Whether plans rank the same behind the local repair, by which `search` measures them, and behind the repair in use.

    python -m bench.plan_repair --base /tmp/recovery/base --work /tmp/plan_repair
    python -m bench.plan_repair --work /tmp/plan_repair --table

BASE from `bench.recovery`. The plans are those of some methods for the same target, and random moves away from the two
of them with the least divergence behind the local repair, 1, 4 and 16 moves of `search` each (`functional + 4`). As no
levels are measured, moves are filled by the summed importance. Each plan is repaired locally, and by the sequential
repair on `--sequences` of the repair text. Behind each repair the divergence from the dense model is measured on the
last `--last` calibration sequences, as `search` does it, and the loss on `--windows` evaluation windows at even
distances, which judge. Rows go to WORK/rows.jsonl; those that are there are not measured again.
"""

import time
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from bench.rows import add_row, read_rows
from libprune.allocation.allocate import left_to_go
from libprune.allocation.decide import read_ground
from libprune.allocation.ladders import Step, build_ladders, plan_of
from libprune.allocation.search import _move, rival_starts
from libprune.engine import cost
from libprune.engine.architecture import Architecture, Block
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.models.compute import resolve_device, resolve_dtype
from libprune.models.folder import load_model
from libprune.models.layers import replaced
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.methods import REPAIRS
from libprune.pipeline.sections import Allocate, Compute, Slice
from libprune.repair.least_squares import new_parameters
from libprune.repair.repairs import discard_fits, local_repair
from libprune.report.markdown import markdown_table
from libprune.results.perplexity import estimate_mean, estimate_ratio, window_losses
from libprune.scoring.ranks import spearman
from libprune.statistics.divergence import Divergence
from libprune.statistics.losses import Prefix

METHODS = ("uniform", "functional", "global", "retention")
MOVES = (1, 4, 16)
SEQUENTIAL = "sequential"
Row = dict[str, Any]


class Plans:
    """The candidates for a ratio, all filled to the same target."""

    def __init__(self, layout: Layout, ratio: float, methods: list[str], seed: int) -> None:
        asked = Allocate(ratio=ratio, method="functional", split="importance", channel_multiple=1, seed=seed)
        ground = read_ground(layout, asked)
        self.architecture, self.params = ground.scores.architecture, asked
        prices = cost.prices(self.architecture, "parameters", None, None)
        self.ladders = build_ladders(self.architecture, ground.scores.table, asked, prices)
        self.target = left_to_go(prices, asked)
        self.curves = {block: _summed(steps) for block, steps in self.ladders.items()}
        evidence = {**ground.evidence, "scores": ground.scores.table, "levels": self.curves}
        self.starts = rival_starts(self.architecture, self.ladders, self.target, asked, evidence, methods)

    def of_methods(self) -> dict[str, Plan]:
        """The plan of each method."""
        return {method: plan_of(self.architecture, self.ladders, depth) for method, depth in self.starts.items()}

    def moved(self, method: str) -> dict[str, Plan]:
        """Plans that are some moves away from that of a method."""
        return {f"{method} + {moves}": self._after(self.starts[method], moves) for moves in MOVES}

    def _after(self, depth: Mapping[Block, int], moves: int) -> Plan:
        rng = np.random.default_rng([self.params.seed, moves])
        for _ in range(moves):
            depth = _move(self.architecture, self.ladders, self.curves, depth, self.target, self.params, rng)
        return plan_of(self.architecture, self.ladders, depth)


def _summed(steps: tuple[Step, ...]) -> NDArray[np.float64]:
    """The importance that is gone by the number of units removed, one a step."""
    return np.concatenate([[0.0], np.cumsum([step.importance for step in steps])])


class Bench:
    """The dense model, repairs of plans, and what they are measured on."""

    def __init__(self, layout: Layout, windows: int, last: int, sequences: int) -> None:
        self.layout, self.sequences, self.compute = layout, sequences, Compute()
        self.architecture: Architecture = read_architecture(layout)
        device = resolve_device("auto")
        self.model = load_model(layout.model, resolve_dtype("auto", device)).to(device)
        found, _ = read_tokens(layout.evaluation_tokens, self.architecture.fingerprint)
        self.windows = found[torch.linspace(0, len(found) - 1, windows).round().long()]
        found, _ = read_tokens(layout.calibration_tokens, self.architecture.fingerprint)
        measured, at_once = found[-last:].to(device), self.compute.batch_tokens // found.length
        self.prefix = Prefix(self.model, self.architecture, measured, at_once, [], Divergence(self.model))
        self._local = local_repair(layout, self.architecture, device)

    def losses(self) -> list[float]:
        """What the model as it is now loses on each evaluation window."""
        return window_losses(self.model, self.windows, self.compute.batch_tokens, "evaluate").tolist()

    def repaired(self, plan: Plan, repair: str) -> dict[str, Tensor]:
        """New weights for a plan."""
        if repair == "local":
            return self._local(plan)
        section = Slice(repair=SEQUENTIAL, sequences=self.sequences, producer_steps=0)
        fits = REPAIRS[SEQUENTIAL].repair(self.layout, self.architecture, plan, self.compute, section)
        discard_fits(self.layout)
        return new_parameters(fits)

    def measure(self, plan: Plan, repair: str) -> Row:
        """The divergences and losses of a plan behind a repair, with the CPU seconds of all three."""
        seconds = [time.process_time()]
        weights = self.repaired(plan, repair)
        seconds.append(time.process_time())
        with replaced(self.model, weights):
            nats = self.prefix.losses_of(plan).tolist()
            seconds.append(time.process_time())
            with masked(self.model, self.architecture, plan):
                losses = self.losses()
        seconds.append(time.process_time())
        return {"nats": nats, "losses": losses, "seconds": np.diff(seconds).round(1).tolist()}


class Rows:
    """What was measured, by ratio, plan and repair; what was not is measured when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[tuple[float, str, str], Row] = {self._key(row): row for row in read_rows(path)}

    @staticmethod
    def _key(row: Row) -> tuple[float, str, str]:
        return row["ratio"], row["plan"], row["repair"]

    def measured(self, bench: Bench, ratio: float, name: str, plan: Plan, repair: str) -> Row:
        """A row that is there, or a new one."""
        names = {"ratio": ratio, "plan": name, "repair": repair}
        if (key := self._key(names)) not in self.found:
            self.add(names | {"digest": plan.digest} | bench.measure(plan, repair))
        assert self.found[key]["digest"] == plan.digest
        return self.found[key]

    def add(self, row: Row) -> None:
        """Keep a new row."""
        self.found[self._key(row)] = row
        add_row(self._path, row)
        print({key: value for key, value in row.items() if key != "losses"}, flush=True)

    @property
    def dense(self) -> NDArray[np.float64]:
        """What the dense model loses on each evaluation window."""
        return np.array(self.found[DENSE]["losses"])

    def of(self, ratio: float, repair: str) -> dict[str, Row]:
        """The rows of a ratio and a repair, by plan."""
        return {plan: row for (share, plan, by), row in self.found.items() if (share, by) == (ratio, repair)}


DENSE = (0.0, "dense", "none")


def measure_ratio(bench: Bench, rows: Rows, ratio: float, plans: Plans) -> None:
    """Measure all candidates of a ratio: behind the local repair first, which says where the moves begin."""
    candidates = plans.of_methods()
    nats = {name: _nats(rows.measured(bench, ratio, name, plan, "local")) for name, plan in candidates.items()}
    for method in sorted(nats, key=lambda name: nats[name])[:2]:
        candidates |= plans.moved(method)
    for repair in ("local", SEQUENTIAL):
        for name, plan in candidates.items():
            rows.measured(bench, ratio, name, plan, repair)


def _nats(row: Row) -> float:
    return float(np.mean(row["nats"]))


def _paired(values: list[float], others: list[float]) -> str:
    """A mean difference with its standard error over the same sequences or windows."""
    found = estimate_mean(np.array(values) - np.array(others))
    return f"{found.value:+.4f} ± {found.error:.4f}"


def table(rows: Rows, ratio: float) -> str:
    """A line a plan, those that lose least on the evaluation windows first; differences are to the first."""
    local, real = rows.of(ratio, "local"), rows.of(ratio, SEQUENTIAL)
    plans = sorted(local.keys() & real.keys(), key=lambda plan: float(np.mean(real[plan]["losses"])))
    lines = []
    for plan in plans:
        ratios = (estimate_ratio(rows.dense, np.array(found[plan]["losses"])) for found in (local, real))
        cells = [f"{one.value:.3f} ± {one.error:.3f}" for one in ratios]
        change = _paired(real[plan]["losses"], real[plans[0]]["losses"]) if plan != plans[0] else ""
        lines.append((plan, f"{_nats(local[plan]):.4f}", f"{_nats(real[plan]):.4f}", *cells, change))
    header = ("plan", "nats, local", "nats, sequential", "× dense, local", "× dense, sequential", "nats to the first")
    return markdown_table(lines, header)


def verdict(rows: Rows, ratio: float) -> Iterator[str]:
    """The rank correlations, and what is lost behind a repair by choosing by the local figure."""
    local, real = rows.of(ratio, "local"), rows.of(ratio, SEQUENTIAL)
    plans = sorted(local.keys() & real.keys())
    figures = {
        "local nats": np.array([_nats(local[plan]) for plan in plans]),
        "sequential nats": np.array([_nats(real[plan]) for plan in plans]),
        "sequential losses on windows": np.array([np.mean(real[plan]["losses"]) for plan in plans]),
    }
    (a, x), (b, y), (c, z) = figures.items()
    for first, second, pair in ((a, b, (x, y)), (a, c, (x, z)), (b, c, (y, z))):
        yield f"Spearman of {first} and {second}: {spearman(*pair):.3f} over {len(plans)} plans"
    chosen, other, best = (plans[int(values.argmin())] for values in figures.values())
    yield f"chosen by {a}: {chosen}; by {b}: {other}; best on the windows: {best}"
    for than in (other, best):
        yield f"{chosen} loses more than {than} by {_paired(real[chosen]['losses'], real[than]['losses'])} nats"
    yield f"on the calibration sequences by {_paired(real[chosen]['nats'], real[other]['nats'])} nats"


def main(
    base: Path = Path("/tmp/recovery/base"),
    work: Path = Path("/tmp/plan_repair"),
    ratio: list[float] = [0.5, 0.2],  # noqa: B006
    method: list[str] = list(METHODS),  # noqa: B006
    windows: int = 12,
    last: int = 8,
    sequences: int = 24,
    seed: int = 0,
    show: Annotated[bool, typer.Option("--table", help="Only print what was measured.")] = False,
) -> None:
    """Measure all candidates, and say how well the local figure chooses."""
    rows = Rows(work / "rows.jsonl")
    if not show:
        bench = Bench(_linked(base, work / "artifacts"), windows, last, sequences)
        if DENSE not in rows.found:
            names = dict(zip(("ratio", "plan", "repair"), DENSE, strict=True))
            rows.add(names | {"losses": bench.losses(), "seconds": []})
        for share in ratio:
            measure_ratio(bench, rows, share, Plans(bench.layout, share, method, seed))
    for share in ratio:
        if rows.of(share, SEQUENTIAL):
            print(f"\n{100 * share:g} %\n\n{table(rows, share)}\n", *verdict(rows, share), sep="\n")
    print(f"\n{sum(chain(*(row['seconds'] for row in rows.found.values()))):.0f} CPU seconds")


def _linked(base: Path, root: Path) -> Layout:
    """A layout with the artifacts of another, and a folder of unfinished work of its own."""
    root.mkdir(parents=True, exist_ok=True)
    for path in base.iterdir():
        if not (root / path.name).exists():
            (root / path.name).symlink_to(path.resolve())
    return Layout(root)


if __name__ == "__main__":
    typer.run(main)
