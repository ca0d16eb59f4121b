"""Small networks that are not transformers, with their families and samples."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from libprune.engine.architecture import Architecture
from libprune.engine.plan import Plan
from libprune.networks import NetworkFamily, Samples
from libprune.networks.recurrent import RecurrentLM
from libprune.results.module_folder import sliced
from tests.support.closure import ROOT


class LeNet(nn.Module):
    def __init__(self, c1: int = 4, c2: int = 5, f1: int = 12, classes: int = 3) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, c1, 3), nn.Conv2d(c1, c2, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(c2 * 9, f1), nn.Linear(f1, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = nn.functional.avg_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.tanh(self.fc1(x.flatten(1))))


LENET = {
    "family": "lenet",
    "prunable": ["c1", "c2", "f1"],
    "modules": {"conv1": "pixel -> c1", "conv2": "c1 -> c2", "fc1": "c2 place -> f1", "fc2": "f1 -> classes"},
}


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The shape of ResNet-18 (He et al. 2016) for small images; widths by stage."""

    def __init__(self, widths: tuple[int, ...] = (3, 4, 5, 6), blocks: int = 2, classes: int = 4) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0])
        before = (widths[0], *widths)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                BasicBlock(before[i] if block == 0 else width, width, 2 if i and block == 0 else 1)
                for block in range(blocks)
            )
            for i, width in enumerate(widths)
        )
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.fc(x.mean((2, 3)))


def resnet_family(stages: int = 4) -> dict[str, object]:
    """The residual axis of a stage is `r`; what lies inside a block is `m`."""
    modules = {"conv": "pixel -> r0", "bn": "r0"}
    for i in range(stages):
        for block in ("0", "1"):
            reads = f"r{max(0, i - 1)}" if block == "0" else f"r{i}"
            modules |= {
                f"stages.{i}.{block}.conv1": f"{reads} -> m{i}_{block}",
                f"stages.{i}.{block}.bn1": f"m{i}_{block}",
                f"stages.{i}.{block}.conv2": f"m{i}_{block} -> r{i}",
                f"stages.{i}.{block}.bn2": f"r{i}",
            }
        if i:
            modules |= {f"stages.{i}.0.shortcut.0": f"r{i - 1} -> r{i}", f"stages.{i}.0.shortcut.1": f"r{i}"}
    return {"family": "resnet", "prunable": ["r*", "m*"], "modules": modules | {"fc": f"r{stages - 1} -> classes"}}


class Depthwise(nn.Module):
    """A pointwise, a depthwise and a pointwise convolution, one-dimensional, with one activation for all channels."""

    def __init__(self, width: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.expand = nn.Conv1d(2, width, 1)
        self.depth = nn.Conv1d(width, width, 3, padding=2, dilation=2, groups=width)
        self.act = nn.PReLU()
        self.project = nn.Conv1d(width, classes, 3, stride=2, padding="valid")

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.act(self.depth(self.expand(x)))).mean(2)


DEPTHWISE = {
    "family": "depthwise",
    "prunable": ["w"],
    "modules": {"expand": "pixel -> w", "depth": "w", "act": "w", "project": "w -> classes"},
}


class Recurrent(nn.Module):
    """A recurrent layer, whose hidden state is beside a feed-forward path: two axes in one map."""

    def __init__(self, tied: bool = False, vocab: int = 7, hidden: int = 6, side: int = 4) -> None:
        super().__init__()
        self.embedding, self.side = nn.Embedding(vocab, hidden + side), nn.Linear(hidden + side, side)
        self.read, self.again = nn.Linear(hidden + side, hidden), nn.Linear(hidden, hidden, bias=False)
        self.mix, self.decoder = nn.Linear(hidden + side, hidden + side), nn.Linear(hidden + side, vocab, bias=False)
        if tied:
            self.decoder.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        state = x.new_zeros(len(ids), self.again.weight.shape[1])
        states = []
        for step in self.read(x).unbind(1):
            state = torch.tanh(step + self.again(state))
            states.append(state)
        return self.decoder(self.mix(torch.cat([torch.stack(states, 1), torch.relu(self.side(x))], 2)))


RECURRENT = {
    "family": "recurrent",
    "prunable": ["h", "s", "e"],
    "modules": {
        "embedding": "vocab -> e",
        "side": "e -> s",
        "read": "e -> h",
        "again": "h -> h",
        "mix": "h + s -> e",
        "decoder": "e -> vocab",
    },
}


def recurrent_lm(snn_ratio: float) -> RecurrentLM:
    """Two layers of 6 units, whose LIF units fire about half of the time."""
    model = RecurrentLM(7, 5, 6, 2, snn_ratio)
    for layer in model.layers:
        if layer.spiking:
            nn.init.normal_(layer.current_input.weight, 0, 2)
            nn.init.normal_(layer.current_input.bias, 1)
    return model


LSTM = ROOT / "examples/recurrent_lstm.yaml"

MIXED = {
    "family": "recurrent",
    "prunable": ["h0", "s0", "h1", "s1"],
    "modules": {
        "embedding": "vocab -> e",
        "layers.0.gates_input": "e -> h0 + h0 + h0 + h0",
        "layers.0.gates_recurrent": "h0 + s0 -> h0 + h0 + h0 + h0",
        "layers.0.current_input": "e -> s0",
        "layers.0.current_recurrent": "h0 + s0 -> s0",
        "layers.0.neuron": "s0",
        "layers.1.gates_input": "h0 + s0 -> h1 + h1 + h1 + h1",
        "layers.1.gates_recurrent": "h1 + s1 -> h1 + h1 + h1 + h1",
        "layers.1.current_input": "h0 + s0 -> s1",
        "layers.1.current_recurrent": "h1 + s1 -> s1",
        "layers.1.neuron": "s1",
        "decoder": "h1 + s1 -> vocab",
    },
}


@dataclass(frozen=True)
class Case:
    """A network, its family and how to make samples."""

    make: Callable[[], nn.Module]
    family: NetworkFamily
    inputs: Callable[[int], Tensor]
    targets: Callable[[int], Tensor]
    smooth: bool = True
    """Whether its gradient is the slope of its loss; a spike's is a surrogate."""

    def network(self, seed: int = 0) -> nn.Module:
        """With random weights, and running statistics that are not those of a fresh batch norm."""
        torch.manual_seed(seed)
        network = self.make()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        return network.eval()

    def samples(self, number: int = 24, seed: int = 1) -> Samples:
        torch.manual_seed(seed)
        return Samples(self.inputs(number), self.targets(number))


CASES = {
    "lenet": Case(LeNet, NetworkFamily(**LENET), lambda n: torch.randn(n, 1, 14, 14), lambda n: torch.randint(3, (n,))),
    "resnet": Case(
        ResNet, NetworkFamily(**resnet_family()), lambda n: torch.randn(n, 3, 8, 8), lambda n: torch.randint(4, (n,))
    ),
    "depthwise": Case(
        Depthwise, NetworkFamily(**DEPTHWISE), lambda n: torch.randn(n, 2, 12), lambda n: torch.randint(3, (n,))
    ),
    "recurrent": Case(
        Recurrent,
        NetworkFamily(**RECURRENT),
        lambda n: torch.randint(7, (n, 5)),
        lambda n: torch.randint(7, (n, 5)),
    ),
    "tied": Case(
        partial(Recurrent, tied=True),
        NetworkFamily(**(RECURRENT | {"prunable": ["h", "s"]})),
        lambda n: torch.randint(7, (n, 5)),
        lambda n: torch.randint(7, (n, 5)),
    ),
    "lstm": Case(
        partial(recurrent_lm, 0.0),
        NetworkFamily.read(LSTM),
        lambda n: torch.randint(7, (n, 5)),
        lambda n: torch.randint(7, (n, 5)),
    ),
    "mixed": Case(
        partial(recurrent_lm, 0.5),
        NetworkFamily(**MIXED),
        lambda n: torch.randint(7, (n, 5)),
        lambda n: torch.randint(7, (n, 5)),
        smooth=False,
    ),
}


def random_plan(architecture: Architecture, seed: int) -> Plan:
    """Every part keeps between one unit and all of them."""
    rng = np.random.default_rng(seed)
    keep = {}
    for block in architecture.blocks():
        number = architecture.units(block[1])
        keep[block] = np.zeros(number, dtype=bool)
        keep[block][rng.permutation(number)[: rng.integers(1, number + 1)]] = True
    return Plan(keep)


def cut(case: Case, network: nn.Module, architecture: Architecture, plan: Plan) -> nn.Module:
    return sliced(network, architecture, plan, case.family.numbers(network))[0]
