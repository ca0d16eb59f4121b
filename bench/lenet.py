"""LeNet on digits: every criterion, method and repair, beside Torch-Pruning in the same run.

    python -m bench.lenet --work WORK            # needs scikit-learn and torch-pruning 1.6.1
    python -m bench.lenet --work WORK --table    # what is there

A seed parts the digits, trains the network (examples/lenet.py) and says what the statistics are collected on. Neither
side trains after pruning. Torch-Pruning takes a share of the channels: it is halved towards the one whose share of
parameters lies nearest to that asked for. Times are of the processor: from the trained network to the pruned one, the
statistics of this criterion alone included, of Torch-Pruning without the search for the share.

Rows go to WORK/lenet.jsonl, one a network; those that are there are not made again.
"""

import copy
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import torch_pruning
import typer
from torch import nn
from torch_pruning.pruner import importance as peers

from bench.rows import read_rows
from examples.lenet import FAMILY, REPAIRS, accuracy, load_digits, mean_loss, train
from libprune.experiments.agreement import Interval, mean_interval
from libprune.networks import Network, Samples
from libprune.pipeline.sections import Allocate, Score
from libprune.report.markdown import markdown_table
from libprune.scoring.criteria import CRITERIA

RATIOS = (0.3, 0.5, 0.7)
EPOCHS = 20
_HALVINGS = 9
Row = dict[str, Any]


def no_data(network: nn.Module, importance: Any, samples: Samples) -> None:
    """For what reads weights only."""


def mean_gradient(network: nn.Module, importance: Any, samples: Samples) -> None:
    samples.losses(network).mean().backward()


def gradients_one_by_one(network: nn.Module, importance: Any, samples: Samples) -> None:
    """As the docstring of `HessianImportance` says."""
    for sample in samples.passes(1):
        network.zero_grad()
        sample.losses(network).sum().backward()
        importance.accumulate_grad(network)


def mean_square_gradients(network: nn.Module, importance: Any, samples: Samples) -> None:
    """What `accumulate_grad` would give if it added up: it keeps the last sample's squares only."""
    sums = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    for sample in samples.passes(1):
        network.zero_grad()
        sample.losses(network).sum().backward()
        for name, parameter in network.named_parameters():
            sums[name] += parameter.grad**2 / len(samples)
    for name, parameter in network.named_parameters():
        parameter.grad = sums[name]


@dataclass(frozen=True)
class Peer:
    """An importance of Torch-Pruning, and what gives it its data."""

    make: Callable[[], Any]
    feed: Callable[[nn.Module, Any, Samples], None] = no_data


PEERS = {
    "Magnitude, p=1": Peer(partial(peers.MagnitudeImportance, p=1)),
    "Magnitude, p=2": Peer(partial(peers.MagnitudeImportance, p=2)),
    "Taylor": Peer(peers.TaylorImportance, mean_gradient),
    "Hessian": Peer(peers.HessianImportance, gradients_one_by_one),
    "Hessian, added up": Peer(peers.HessianImportance, mean_square_gradients),
    "LAMP": Peer(peers.LAMPImportance),
    "FPGM": Peer(peers.FPGMImportance),
    "Random": Peer(peers.RandomImportance),
}


def pruner(network: nn.Module, importance: Any, share: float, everywhere: bool, samples: Samples) -> Any:
    """Torch-Pruning's, for a share of the channels."""
    return torch_pruning.pruner.BasePruner(
        network,
        samples[:1].inputs,
        importance,
        global_pruning=everywhere,
        pruning_ratio=share,
        ignored_layers=[network.fc3],
    )


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def stepped(fed: tuple[nn.Module, Any], share: float, everywhere: bool, samples: Samples) -> nn.Module:
    """A copy of a network that its gradients and importance were fed, pruned in one step."""
    network, importance = copy.deepcopy(fed)
    for own, theirs in zip(network.parameters(), fed[0].parameters(), strict=True):
        own.grad = None if theirs.grad is None else theirs.grad.clone()
    pruner(network, importance, share, everywhere, samples).step()
    return network.eval()


def fed_with(peer: Peer, dense: nn.Module, samples: Samples, seed: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    fed = copy.deepcopy(dense), peer.make()
    peer.feed(*fed, samples)
    return fed


def nearest(fed: tuple[nn.Module, Any], asked: float, everywhere: bool, samples: Samples, seed: int) -> nn.Module:
    """The network whose share of removed parameters lies nearest to the one asked for, over halvings of the other."""
    dense = parameters(fed[0])
    low, high, found = 0.0, 1.0, []
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        torch.manual_seed(seed)
        network = stepped(fed, share, everywhere, samples)
        removed = 1 - parameters(network) / dense
        found.append((abs(removed - asked), len(found), network))
        low, high = (share, high) if removed < asked else (low, share)
    return min(found)[2]


class Bench:
    """A seed's digits and network."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.digits = seed, load_digits(seed)
        self.dense = train(self.digits.train, seed, EPOCHS)
        self.folder = folder
        self.network = Network(self.dense, FAMILY, self.digits.calibration, folder / "statistics")

    def row(self, network: nn.Module, asked: float, **what: Any) -> Row:
        test = self.digits.test
        return {
            "seed": self.seed,
            "asked": asked,
            **what,
            "removed": 1 - parameters(network) / parameters(self.dense),
            "dense": accuracy(self.dense, test),
            "accuracy": accuracy(network, test),
            "loss": mean_loss(network, test),
            "actual": parameters(network),
        }

    def ours(self, criterion: str, method: str, asked: float) -> Iterator[Row]:
        plan = self.network.plan(Score(criterion=criterion, seed=self.seed), Allocate(ratio=asked, method=method))
        for repair in REPAIRS:
            pruned = self.network.prune(plan, repair)
            what = {"tool": "libprune", "criterion": criterion, "method": method, "repair": repair}
            yield self.row(pruned.network, asked, **what, predicted=pruned.parameters, **pruned.proof)

    def theirs(self, name: str, method: str, asked: float) -> Iterator[Row]:
        samples = self.digits.calibration
        fed = fed_with(PEERS[name], self.dense, samples, self.seed)
        network = nearest(fed, asked, method == "global", samples, self.seed)
        yield self.row(network, asked, tool="Torch-Pruning", criterion=name, method=method, repair="none")

    def our_time(self, criterion: str) -> float:
        """Seconds of the processor, from the trained network on; of the method that criteria are compared by."""
        method = "global" if CRITERIA[criterion].comparable else "uniform"
        start = time.process_time()
        with TemporaryDirectory() as folder:
            network = Network(self.dense, FAMILY, self.digits.calibration, Path(folder) / "statistics")
            network.prune(network.plan(Score(criterion=criterion), Allocate(ratio=0.5, method=method)), "none")
        return time.process_time() - start

    def their_time(self, name: str) -> float:
        start = time.process_time()
        samples = self.digits.calibration
        stepped(fed_with(PEERS[name], self.dense, samples, self.seed), 0.5, True, samples)
        return time.process_time() - start


def settings() -> list[tuple[str, str, str]]:
    """Tool, criterion, method."""
    ours = [("libprune", name, "uniform") for name in CRITERIA]
    ours += [("libprune", name, "global") for name, criterion in CRITERIA.items() if criterion.comparable]
    return ours + [("Torch-Pruning", name, method) for name in PEERS for method in ("uniform", "global")]


def measure(bench: Bench, path: Path, done: set[tuple[Any, ...]], timed: bool) -> None:
    with path.open("a") as file:

        def write(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        for tool, criterion, method in settings():
            run = bench.ours if tool == "libprune" else bench.theirs
            for asked in RATIOS:
                if (bench.seed, tool, criterion, method, asked) not in done:
                    for row in list(run(criterion, method, asked)):
                        write(row)
        for tool, names, clock in (
            ("libprune", CRITERIA, bench.our_time),
            ("Torch-Pruning", PEERS, bench.their_time),
        ):
            for name in names:
                if timed and (bench.seed, tool, name, "time", None) not in done:
                    what = {"seed": bench.seed, "tool": tool, "criterion": name, "method": "time", "asked": None}
                    write(what | {"seconds": clock(name)})


def table(rows: list[Row], asked: float) -> str:
    """One line a setting; differences are to the best of Torch-Pruning, paired by seed."""
    found: dict[tuple[str, str, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        if row["asked"] == asked:
            setting = row["tool"], row["criterion"], row["method"]
            found.setdefault(setting, {}).setdefault(row["repair"], {})[row["seed"]] = row
    best = max((key for key in found if key[0] != "libprune"), key=lambda key: over_seeds(found[key]["none"]).mean)
    lines = []
    for (tool, criterion, method), by_repair in found.items():
        reached = mean_interval([row["removed"] for row in by_repair["none"].values()])
        cells = [f"{100 * reached.mean:.1f} %"]
        for repair in REPAIRS:
            if repair in by_repair:
                shown = f"{text(over_seeds(by_repair[repair]))}{mark(by_repair[repair], found[best]['none'])}"
            cells.append(shown if repair in by_repair else "–")
        lines.append((tool, criterion, method, *cells))
    header = ("tool", "criterion", "method", "removed", *(f"accuracy, {repair}" for repair in REPAIRS))
    return f"{markdown_table(lines, header)}\n\nbest of Torch-Pruning: {', '.join(best[1:])}\n"


def over_seeds(rows: dict[int, Row]) -> Interval:
    return mean_interval([100 * row["accuracy"] for row in rows.values()])


def text(found: Interval) -> str:
    """Mean and half the interval, in per cent."""
    return f"{found.mean:.1f}" + (f" ± {found.high - found.mean:.1f}" if found.known else "")


def mark(rows: dict[int, Row], reference: dict[int, Row]) -> str:
    """An arrow where the interval of the differences over the seeds leaves out 0."""
    common = rows.keys() & reference.keys()
    found = mean_interval([rows[seed]["accuracy"] - reference[seed]["accuracy"] for seed in common])
    return (" ↑" if found.mean > 0 else " ↓") if found.leaves_out(0.0) else ""


def summary(rows: list[Row]) -> str:
    """The dense network, the proofs, and the times."""
    ours = [row for row in rows if row["tool"] == "libprune" and row["method"] != "time"]
    dense = {row["seed"]: row["dense"] for row in ours}
    worst = max(row["difference"] / row["scale"] for row in ours)
    off = sum(row["predicted"] != row["actual"] for row in ours)
    over = max(row["removed"] - row["asked"] for row in ours)
    short = max(row["asked"] - row["removed"] for row in ours)
    times = [row for row in rows if row["method"] == "time"]
    body = [(row["tool"], row["criterion"], str(row["seed"]), f"{row['seconds']:.2f}") for row in times]
    return (
        f"dense {text(mean_interval([100 * value for value in dense.values()]))} % over {len(dense)} seeds\n"
        f"{len(ours)} networks of libprune: sliced against masked at most {worst:.1e} of the largest output, "
        f"predicted parameters not the actual ones in {off}; share removed {100 * over:+.3f} to {-100 * short:+.3f} "
        f"points from that asked for\n\n{markdown_table(body, ('tool', 'criterion', 'seed', 'seconds'))}"
    )


def key_of(row: Row) -> tuple[Any, ...]:
    return row["seed"], row["tool"], row["criterion"], row["method"], row["asked"]


def main(
    work: Annotated[Path, typer.Option(help="Folder of rows and statistics.")],
    seed: Annotated[list[int] | None, typer.Option(help="Seeds to run; none: 0 to 4.")] = None,
    only_table: Annotated[bool, typer.Option("--table", help="Run nothing.")] = False,
) -> None:
    """Run what is missing and print the tables."""
    warnings.filterwarnings("ignore")
    work.mkdir(parents=True, exist_ok=True)
    path = work / "lenet.jsonl"
    rows = read_rows(path)
    done = {key_of(row) for row in rows}
    for number in [] if only_table else (seed or range(5)):
        measure(Bench(number, work / f"seed-{number}"), path, done, timed=number == 0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for asked in RATIOS:
        typer.echo(f"\n{asked:.0%} of the parameters\n\n{table(rows, asked)}")
    typer.echo(summary(rows))


if __name__ == "__main__":
    typer.run(main)
