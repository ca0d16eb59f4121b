"""Pruning recurrent and spiking language models: classical against mixed criteria, with and without repair.

    python -m bench.recurrent --text wiki.valid.raw --work WORK            # trains once, then measures
    python -m bench.recurrent --work WORK --table                          # what there is so far

Two byte-level models of 2 x 256 units, of LSTM units (`lstm`) and of as many LIF units among them (`mixed`), by
`examples.recurrent` with its defaults and 3 epochs. 30 and 50 % of all parameters are removed, in the calibrations of
one seed after another; all settings of `compare` without and with a local repair, some with a sequential one. Seconds
are of the processor. Rows go to WORK/recurrent.jsonl; those that are there are not measured again.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, cast

import torch
import typer

from examples.byte_text import Parts, read_bytes, split
from examples.recurrent import train
from examples.recurrent_comparison import (
    REFERENCE,
    SETTINGS,
    Calibration,
    Judge,
    NetworkType,
    Setting,
    network_of,
    network_type,
    pruned,
    shown,
)
from examples.recurrent_training import load
from libprune.experiments.agreement import Interval, paired_factor, ratio_interval
from libprune.networks import Network, Pruned
from libprune.networks.recurrent import RecurrentLM
from libprune.pipeline.sections import Allocate, Score
from libprune.report.markdown import markdown_table

MODELS = {"lstm": 0.0, "mixed": 0.5}
"""By name the share of spiking units."""
RATIOS = (0.5, 0.3)
EPOCHS = 3
REPAIRS = ("none", "local", "sequential")
SEQUENTIAL: tuple[Setting, ...] = (REFERENCE, ("four views, adaptive", "uniform"), ("random", "uniform"))
CALIBRATION = Calibration(sequences=64, length=128)
STREAMS, EVALUATED = 64, 16384
ROUNDS = 15
"""How often passes are timed."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """Rows of a file, each with what names it and what was measured."""

    path: Path

    def rows(self, what: str) -> list[Row]:
        """Those of one kind."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [row for row in map(json.loads, lines) if row["what"] == what]

    def add(self, key: Row, make: Callable[[], Row]) -> None:
        """Measure and append, unless there is a row of that key."""
        if any(row.items() >= key.items() for row in self.rows(key["what"])):
            return
        with self.path.open("a") as file:
            file.write(json.dumps(key | make()) + "\n")


def trained(name: str, text: str, work: Path) -> RecurrentLM:
    """The model of a name, which is trained if the folder is not there."""
    if not (work / name).exists():
        train(out=work / name, text=text, snn_ratio=MODELS[name], epochs=EPOCHS)
    return load(work / name)


def measure(name: str, model: RecurrentLM, parts: Parts, store: Store, seed: int) -> None:
    """Prune a model by all settings of a seed."""
    judge, kind = Judge.of(parts, STREAMS, EVALUATED), network_type(model)
    dense, samples = judge.loss(model), CALIBRATION.draw(parts.training, seed)
    network = network_of(model, samples, store.path.parent / f"{name}-{seed}")
    for ratio in RATIOS:
        for repair in REPAIRS:
            for setting in SEQUENTIAL if repair == "sequential" else SETTINGS:
                key = {"what": "pruned", "model": name, "seed": seed, "removed": ratio, "repair": repair}
                make = partial(_row, network, judge, dense, setting, ratio, repair, kind, seed)
                store.add(key | {"importance": setting[0], "method": setting[1]}, make)
    store.add({"what": "retention", "model": name, "seed": seed}, partial(_retained, network, judge, dense, kind))
    if seed == 0:
        store.add({"what": "speed", "model": name}, partial(_speed, network, model, samples.inputs, kind))


def _row(
    network: Network,
    judge: Judge,
    dense: float,
    setting: Setting,
    ratio: float,
    repair: str,
    kind: NetworkType,
    seed: int,
) -> Row:
    start = time.process_time()
    smaller = pruned(network, setting, ratio, repair, kind, seed)
    return {"seconds": time.process_time() - start} | _outcome(smaller, judge, dense)


def _outcome(smaller: Pruned, judge: Judge, dense: float) -> Row:
    return {
        "dense": math.exp(dense),
        "ratio": math.exp(judge.loss(cast("RecurrentLM", smaller.network)) - dense),
        "predicted": smaller.parameters,
        "actual": sum(weight.numel() for weight in smaller.network.parameters()),
        "difference": smaller.proof["difference"] / smaller.proof["scale"],
        "kept": {part: smaller.plan.kept(0, part) for part in smaller.dense.parts},
    }


def _retained(network: Network, judge: Judge, dense: float, kind: NetworkType) -> Row:
    """By `retention` without a ratio, repaired locally."""
    score = Score(criterion=REFERENCE[0])
    plan = network.plan(score, Allocate(ratio=None, method="retention", network_type=kind))
    return _outcome(network.prune(plan, "local"), judge, dense)


def _speed(network: Network, model: RecurrentLM, inputs: torch.Tensor, kind: NetworkType) -> Row:
    """Seconds of the processor for a pass, dense and sliced by turns, over one sequence and over 32; medians."""
    found: Row = {}
    for ratio in RATIOS:
        both = {"dense": model.eval(), "sliced": pruned(network, REFERENCE, ratio, "none", kind, 0).network}
        for batch in (1, 32):
            times: dict[str, list[float]] = {one: [] for one in both}
            for _ in range(ROUNDS):
                for one, module in both.items():
                    start = time.process_time()
                    with torch.no_grad():
                        module(inputs[:batch])
                    times[one].append(time.process_time() - start)
            for one, seconds in times.items():
                found[f"{one}, {ratio} removed, batch {batch}"] = median(seconds) / batch
    return found


def tables(rows: list[Row]) -> str:
    """Two tables of a line a setting, and a column for each model, share and repair: perplexity over the dense one's,
    and the paired factor to the reference.
    """
    ratios: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for row in rows:
        column = f"{row['model']} {row['removed']:.0%}, {row['repair']}"
        seeds = ratios.setdefault((row["importance"], row["method"]), {}).setdefault(column, {})
        seeds[row["seed"]] = row["ratio"]
    columns = [f"{model} {removed:.0%}, {repair}" for removed in RATIOS for model in MODELS for repair in REPAIRS]

    def factor(own: dict[str, dict[int, float]], column: str) -> Interval | None:
        return paired_factor(own[column], ratios[REFERENCE].get(column, {}))

    def overall(own: dict[str, dict[int, float]], column: str) -> Interval:
        return ratio_interval(list(own[column].values()))

    def table(cell: Callable[[dict[str, dict[int, float]], str], Interval | None]) -> str:
        body = [
            (*setting, *(shown(cell(own, column)) if column in own else "" for column in columns))
            for setting, own in ratios.items()
        ]
        return markdown_table(body, ("importance", "allocation", *columns))

    return f"{table(overall)}\n\nover {' / '.join(REFERENCE)}:\n\n{table(factor)}"


def units(rows: list[Row]) -> str:
    """Parameters and units that are left by the methods that choose how many go where, first seed."""
    own = [row for row in rows if row["seed"] == 0 and row["repair"] == "none"]
    body = [
        (
            row["model"],
            f"{row['removed']:.0%}",
            f"{row['importance']}, {row['method']}",
            f"{row['actual']:,}",
            ", ".join(f"{axis} {number}" for axis, number in row["kept"].items()),
        )
        for row in own
        if row["method"] != "uniform" or row["importance"] == REFERENCE[0]
    ]
    return markdown_table(body, ("model", "removed", "setting", "parameters", "units kept"))


def summary(rows: list[Row]) -> str:
    """What holds for all pruned models, and seconds of each repair."""
    wrong = sum(row["predicted"] != row["actual"] for row in rows)
    lines = [f"{len(rows)} pruned models; parameters other than predicted in {wrong}"]
    for model in MODELS:
        own = [row for row in rows if row["model"] == model]
        if own:
            differences = sorted(row["difference"] for row in own)
            lines.append(
                f"{model}: dense perplexity per byte {own[0]['dense']:.3f}; sliced less masked, of the largest output: "
                f"{median(differences):.1e} in the median, {differences[-1]:.1e} at most"
            )
            for repair in REPAIRS:
                seconds = [row["seconds"] for row in own if row["repair"] == repair]
                if seconds:
                    lines.append(f"{model}, {repair}: {median(seconds):.1f} s to decide, repair, slice and prove")
    return "\n".join(lines)


def main(
    text: Annotated[str, typer.Option(help="What to train on and to judge by.")] = "",
    work: Path = Path("/tmp/recurrent"),
    seeds: int = 3,
    table_only: Annotated[bool, typer.Option("--table")] = False,
) -> None:
    """Train, measure, print."""
    work.mkdir(parents=True, exist_ok=True)
    store = Store(work / "recurrent.jsonl")
    if not table_only:
        assert text, "name a text"
        parts = split(read_bytes(text))
        for seed in range(seeds):
            for name in MODELS:
                measure(name, trained(name, text, work), parts, store, seed)
    rows = store.rows("pruned")
    print(tables(rows), units(rows), summary(rows), sep="\n\n")
    for row in store.rows("retention") + store.rows("speed"):
        print(json.dumps(row))


if __name__ == "__main__":
    typer.run(main)
