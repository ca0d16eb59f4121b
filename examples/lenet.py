"""LeNet on handwritten digits, pruned by every criterion.

    python -m examples.lenet --ratio 0.5

Trains LeNet in seconds on the digits that ship with scikit-learn, prunes it without repair, with `local` and with
`sequential` repair, prints what is left of the accuracy, saves the best network, and draws its filters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from examples.lenet_picture import filters
from libprune.engine.errors import LibpruneError
from libprune.networks import Network, Pruned, Samples, load
from libprune.pipeline import stage
from libprune.pipeline.atomic import remove, writing
from libprune.pipeline.sections import Allocate, Score
from libprune.pipeline.terminal import Rows, text_table
from libprune.report.canvas import png
from libprune.scoring.criteria import CRITERIA

FAMILY = Path(__file__).with_name("lenet.yaml")
REPAIRS = ("none", "local", "sequential")
SIDE = 28
"""Pixels of a side of an image."""
TRAINED, JUDGED, CALIBRATED = 900, 300, 512
"""Digits that are trained on, that choose the best network, and, of the first, that statistics are collected on; the
others are the test."""
DRAWN = ("magnitude", "taylor", "obs_fisher", "random")
"""Criteria whose filters are drawn."""


class LeNet(nn.Module):
    """LeCun et al. 1998, with kernels of 3 x 3, maxima for pooling, and rectifiers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.conv2 = nn.Conv2d(6, 16, 3)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[images, 10]`` of images ``[images, 1, 28, 28]``."""
        x = nn.functional.max_pool2d(self.conv1(images).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2).flatten(1)
        x = self.fc1(x).relu()
        logits: Tensor = self.fc3(self.fc2(x).relu())
        return logits


@dataclass(frozen=True)
class Digits:
    """Images ``[digits, 1, 28, 28]`` and what they show, in parts that have no digit in common.

    Attributes:
        train: what is trained on.
        judge: what the best of several networks is chosen by.
        test: what accuracies are of.
    """

    train: Samples
    judge: Samples
    test: Samples

    @property
    def calibration(self) -> Samples:
        """What statistics are collected on: the first of those that were trained on."""
        return self.train[:CALIBRATED]


def load_digits(seed: int) -> Digits:
    """The 1,797 digits of 8 x 8 pixels that ship with scikit-learn, bilinearly enlarged, in the seed's order.

    Pixels have mean 0 and standard deviation 1 over those that are trained on.
    """
    from sklearn import datasets

    found = datasets.load_digits()
    small = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    images = nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear", align_corners=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    mean, deviation = images[order[:TRAINED]].mean(), images[order[:TRAINED]].std()
    whole = Samples((images[order] - mean) / deviation, torch.tensor(found.target)[order])
    end = TRAINED + JUDGED
    return Digits(whole[:TRAINED], whole[TRAINED:end], whole[end:])


def train(samples: Samples, seed: int, epochs: int, batch: int = 32) -> LeNet:
    """A network trained by Adam at a rate that falls to 0, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LeNet()
        steps = epochs * -(-len(samples) // batch)
        optimizer = torch.optim.Adam(network.parameters(), 2e-3)
        rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(epochs):
            for part in samples[torch.randperm(len(samples))].passes(batch):
                optimizer.zero_grad()
                part.losses(network).mean().backward()
                optimizer.step()
                rate.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, samples: Samples) -> float:
    """The share of samples whose largest logit is the target's."""
    return float((network(samples.inputs).argmax(1) == samples.targets).double().mean())


@torch.no_grad()
def mean_loss(network: nn.Module, samples: Samples) -> float:
    """In nats."""
    return float(samples.losses(network).double().mean())


@dataclass(frozen=True)
class Result:
    """What a criterion leaves.

    Attributes:
        criterion: its name.
        method: how units were compared: with all others (`global`), or with those of their part (`uniform`).
        pruned: by repair the smaller network.
        bytes: of the file of its weights, as `Pruned.save` writes it; the same for all repairs.
    """

    criterion: str
    method: str
    pruned: dict[str, Pruned]
    bytes: int

    @property
    def kept(self) -> str:
        """The units left of each part."""
        return " ".join(str(count) for count in kept_units(next(iter(self.pruned.values()))).values())


def kept_units(pruned: Pruned) -> dict[str, int]:
    """By part how many units are left."""
    return {part: pruned.plan.kept(layer, part) for layer, part in pruned.dense.blocks()}


def prune_by(network: Network, criterion: str, ratio: float) -> Result:
    """Prune by a criterion, `global` where its values compare between parts, otherwise `uniform`."""
    allocate = Allocate(ratio=ratio, method="global" if CRITERIA[criterion].comparable else "uniform")
    plan = network.plan(Score(criterion=criterion), allocate)
    pruned = {repair: network.prune(plan, repair) for repair in REPAIRS}
    return Result(criterion, allocate.method, pruned, _saved_bytes(pruned["none"]))


def _saved_bytes(pruned: Pruned) -> int:
    with TemporaryDirectory() as folder:
        pruned.save(Path(folder) / "pruned")
        return (Path(folder) / "pruned" / "model.safetensors").stat().st_size


def table(results: Sequence[Result], dense: nn.Module, test: Samples) -> str:
    """One line a criterion, below that of the dense network."""
    header = ("criterion", "compares", *(f"accuracy, {repair}" for repair in REPAIRS), "parameters", "kept", "bytes")
    number = sum(parameter.numel() for parameter in dense.parameters())
    rows: Rows = [("dense", "", f"{accuracy(dense, test):.3f}", "", "", f"{number:,}", "6 16 120 84", "")]
    for result in results:
        accuracies = [f"{accuracy(result.pruned[repair].network, test):.3f}" for repair in REPAIRS]
        size = f"{result.pruned['none'].parameters:,}"
        rows.append((result.criterion, result.method, *accuracies, size, result.kept, f"{result.bytes:,}"))
    return text_table(rows, header)


def best_of(results: Sequence[Result], judge: Samples) -> tuple[Result, str]:
    """The result and the repair of the least mean loss on samples that are neither trained on nor tested."""
    every = [(result, repair) for result in results for repair in REPAIRS]
    return min(every, key=lambda one: mean_loss(one[0].pruned[one[1]].network, judge))


def save(pruned: Pruned, folder: Path, test: Samples) -> float:
    """Write a network anew and load it again; the accuracy of what was loaded."""
    remove(folder)
    pruned.save(folder)
    return accuracy(load(folder, LeNet()), test)


def demo(out: Path, ratio: float, seed: int, epochs: int) -> list[Result]:
    """Train, prune, print, save, draw.

    Raises:
        LibpruneError: for a ratio that is no share, or cannot be removed.
    """
    if not 0 < ratio < 1:
        raise LibpruneError(f"--ratio {ratio:g} is no share; give a number above 0 and below 1, such as 0.5")
    digits = load_digits(seed)
    dense = train(digits.train, seed, epochs)
    network = Network(dense, FAMILY, digits.calibration, out / "statistics")
    results = [prune_by(network, name, ratio) for name, criterion in CRITERIA.items() if criterion.only is None]
    typer.echo(f"{table(results, dense, digits.test)}\n")
    best, repair = best_of(results, digits.judge)
    loaded = save(best.pruned[repair], out / "best", digits.test)
    with writing(out / "filters.png") as path:
        plans = {one.criterion: one.pruned["none"].plan for one in results if one.criterion in DRAWN}
        path.write_bytes(png(filters(dense.conv1.weight, dense.conv2.weight, plans)))
    typer.echo(f"best on other digits: {best.criterion}, repair {repair}; loaded again its accuracy is {loaded:.3f}")
    typer.echo(f"network:  {out / 'best'}\nload:     libprune.networks.load(Path({str(out / 'best')!r}), LeNet())")
    typer.echo(f"filters:  {out / 'filters.png'}")
    return results


def main(
    ratio: Annotated[float, typer.Option(help="Share of the parameters to remove.")] = 0.5,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("artifacts/lenet"),
    seed: Annotated[int, typer.Option(help="Of the parts of the digits and of the training.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the digits that are trained on.")] = 15,
) -> None:
    """Train LeNet on handwritten digits and prune it by every criterion."""
    with stage.user_errors():
        demo(out, ratio, seed, epochs)


if __name__ == "__main__":
    typer.run(main)
