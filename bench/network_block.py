"""Networks trained behind the local repair, to give the dense network's outputs: LeNet and a small ResNet on digits.

    python -m bench.network_block --work WORK            # needs scikit-learn
    python -m bench.network_block --work WORK --table    # what is there

A seed parts the digits and trains the network (examples/lenet.py; the ResNet of tests/support/networks.py, 8, 16, 32
and 32 wide, on images of half the side). 512 of the digits that were trained on are the calibration samples. Selection
is `unit_fisher` with `global`. The others are the test: accuracy, and the squared error of the outputs as a share of
the dense network's squared outputs. Seconds are of the processor, of `prune`; those of `local`, which runs first, hold
the collecting of the activations, those of the others do not.

Rows go to WORK/network_block.jsonl, one a network; those that are there are not made again.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch import nn

from bench.rows import read_rows
from examples.lenet import FAMILY, Digits, accuracy, load_digits, train
from libprune.experiments.agreement import paired_factor
from libprune.networks import Network, NetworkFamily, Samples
from libprune.pipeline.sections import Allocate, Score
from libprune.report.markdown import markdown_table
from tests.support.networks import ResNet, resnet_family

RATIOS = (0.5, 0.6, 0.7, 0.8)
REPAIRS = ("none", "local", "sequential", "block")
COMPARED = ("local", "sequential")
EPOCHS = 20
Made = tuple[Digits, nn.Module, NetworkFamily]


def lenet(seed: int) -> Made:
    digits = load_digits(seed)
    return digits, train(digits.train, seed, EPOCHS), NetworkFamily.read(FAMILY)


def resnet(seed: int) -> Made:
    whole = load_digits(seed)
    digits = Digits(*(_smaller(samples) for samples in (whole.train, whole.judge, whole.test)))
    torch.manual_seed(seed)
    network = ResNet((8, 16, 32, 32), classes=10)
    batches = -(-len(digits.train) // 32)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, EPOCHS * batches)
    for _ in range(EPOCHS):
        for part in digits.train[torch.randperm(len(digits.train))].passes(32):
            optimizer.zero_grad()
            part.losses(network).mean().backward()
            optimizer.step()
            rate.step()
    return digits, network.eval(), NetworkFamily(**resnet_family())


def _smaller(samples: Samples) -> Samples:
    """Three equal colours, every other pixel of each row and column."""
    return Samples(samples.inputs.expand(-1, 3, -1, -1)[..., ::2, ::2].contiguous(), samples.targets, samples.loss)


NETWORKS: dict[str, Callable[[int], Made]] = {"lenet": lenet, "resnet": resnet}


@torch.no_grad()
def missed(network: nn.Module, dense: nn.Module, test: Samples) -> float:
    """The share of the dense outputs that is missed."""
    wanted = dense(test.inputs)
    return float((network(test.inputs) - wanted).square().sum() / wanted.square().sum())


def rows_of(name: str, seed: int, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Of the settings that are not done."""
    digits, dense, family = NETWORKS[name](seed)
    with TemporaryDirectory() as folder:
        network = Network(dense, family, digits.calibration, folder)
        for ratio in RATIOS:
            plan = network.plan(Score(criterion="unit_fisher"), Allocate(ratio=ratio, method="global"))
            for repair in REPAIRS:
                if (name, seed, ratio, repair) in done:
                    continue
                start = time.process_time()
                pruned = network.prune(plan, repair).network
                yield {
                    "network": name,
                    "seed": seed,
                    "ratio": ratio,
                    "repair": repair,
                    "seconds": time.process_time() - start,
                    "accuracy": 100 * accuracy(pruned, digits.test),
                    "dense": 100 * accuracy(dense, digits.test),
                    "missed": 100 * missed(pruned, dense, digits.test),
                }


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each network and ratio, over the seeds: accuracies and missed shares in %, factors of the latter."""
    header = ["network", "removed", "seeds", "dense", *(f"accuracy, {repair}" for repair in REPAIRS)]
    header += [f"missed, {repair}" for repair in REPAIRS] + [f"block / {other}" for other in COMPARED]
    header += [f"seconds, {repair}" for repair in REPAIRS[1:]]
    lines = []
    for name in NETWORKS:
        for ratio in RATIOS:
            own = [row for row in rows if (row["network"], row["ratio"]) == (name, ratio)]
            by = {repair: {row["seed"]: row for row in own if row["repair"] == repair} for repair in REPAIRS}
            if not all(by.values()):
                continue

            def average(repair: str, key: str) -> float:
                return mean(row[key] for row in by[repair].values())  # noqa: B023 - called at once

            shares = {repair: {seed: row["missed"] for seed, row in found.items()} for repair, found in by.items()}
            factors = [paired_factor(shares["block"], shares[other]) for other in COMPARED]
            cells = [name, f"{ratio:.0%}", str(len(by["block"])), f"{average('none', 'dense'):.1f}"]
            cells += [f"{average(repair, 'accuracy'):.1f}" for repair in REPAIRS]
            cells += [f"{average(repair, 'missed'):.3g}" for repair in REPAIRS]
            cells += [f"{one.mean:.2f} ({one.low:.2f} to {one.high:.2f})" if one else "" for one in factors]
            lines.append(cells + [f"{average(repair, 'seconds'):.1f}" for repair in REPAIRS[1:]])
    return markdown_table(lines, header)


def main(
    work: Annotated[Path, typer.Option(help="Folder of the rows.")],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds, from 0.")] = 5,
    network: Annotated[list[str] | None, typer.Option(help="Of `NETWORKS`; none: all.")] = None,
    only_table: Annotated[bool, typer.Option("--table", help="Run nothing.")] = False,
) -> None:
    """Run what is missing and print the table."""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    path = work / "network_block.jsonl"
    done = {(row["network"], row["seed"], row["ratio"], row["repair"]) for row in read_rows(path)}
    for seed in [] if only_table else range(seeds):
        for name in network or NETWORKS:
            if len(RATIOS) * len(REPAIRS) > sum(key[:2] == (name, seed) for key in done):
                for row in rows_of(name, seed, done):
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(table(read_rows(path)))


if __name__ == "__main__":
    typer.run(main)
