"""Small networks of several kinds with their families, ways to mask their units, and files of a masked one."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune
from typer.testing import CliRunner, Result

from libprune.cli.main import app
from libprune.engine.architecture import Architecture
from libprune.engine.plan import Plan
from libprune.networks import NetworkFamily


class LeNet(nn.Module):
    """Two convolutions without padding, a flattened map, two linear maps."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, bias=False)
        self.fc1, self.fc2 = nn.Linear(16, 6), nn.Linear(6, 3)
        self.pool, self.act = nn.AvgPool2d(2), activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv2(self.act(self.conv1(x))))
        return self.fc2(self.act(self.fc1(self.pool(x).flatten(1))))


class Residual(nn.Module):
    """A stem and a block that write the same channels, with batch norms and zero padding."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.a, self.norm_a = nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.b, self.norm_b = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc, self.act = nn.Linear(4, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = self.act(x + self.norm_b(self.b(self.act(self.norm_a(self.a(x))))))
        return self.fc(x.mean((2, 3)))


class Depthwise(nn.Module):
    """A depthwise convolution between two of kernel 1, in one dimension of space."""

    def __init__(self, activation: nn.Module, padding: int = 0) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv1d(2, 5, 1), nn.BatchNorm1d(5)
        self.deep = nn.Conv1d(5, 5, 3, padding=padding, groups=5)
        self.project, self.fc, self.act = nn.Conv1d(5, 4, 1), nn.Linear(4, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.deep(self.act(self.norm(self.expand(x)))))
        return self.fc(self.act(self.project(x)).mean(2))


class Recurrent(nn.Module):
    """An LSTM of two linear maps, one of which reads and writes the hidden units at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.x2h, self.h2h, self.head = nn.Linear(2, 20), nn.Linear(5, 20), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.h2h.in_features)
        for step in x.unbind(1):
            i, f, g, o = (self.x2h(step) + self.h2h(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


def family(prunable: list[str], **modules: str) -> NetworkFamily:
    return NetworkFamily(family="tested", prunable=prunable, modules=modules)


LENET = family(["c1", "c2", "f"], conv1="pixel -> c1", conv2="c1 -> c2", fc1="c2 place -> f", fc2="f -> classes")
RESIDUAL = family(
    ["s", "h"], stem="pixel -> s", norm="s", a="s -> h", norm_a="h", b="h -> s", norm_b="s", fc="s -> classes"
)
DEPTHWISE = family(["c", "d"], expand="in -> c", norm="c", deep="c", project="c -> d", fc="d -> classes")
RECURRENT = family(["h"], x2h="in -> gate h", h2h="h -> gate h", head="h -> classes")

NETS: dict[str, tuple[Callable[[nn.Module], nn.Module], NetworkFamily, list[tuple[int, ...]]]] = {
    "lenet": (LeNet, LENET, [(1, 8, 8)]),
    "residual": (Residual, RESIDUAL, [(1, 6, 6), (1, 3, 5), (1, 1, 1)]),
    "depthwise": (Depthwise, DEPTHWISE, [(2, 7), (2, 4)]),
    "padded depthwise": (lambda act: Depthwise(act, 1), DEPTHWISE, [(2, 7), (2, 2)]),
    "recurrent": (lambda act: Recurrent(), RECURRENT, [(6, 2), (3, 2), (1, 2)]),
}
"""How a network is made, its family, and shapes of a sample, the first of which is what libprune sees."""


def built(name: str, activation: nn.Module, seed: int = 0) -> tuple[nn.Module, NetworkFamily, Tensor]:
    make, described, shapes = NETS[name]
    torch.manual_seed(seed)
    network = make(activation).eval()
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
                tensor.normal_()
            norm.running_var.uniform_(0.5, 2)
    return network, described, torch.randn(6, *shapes[0])


def computed(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x)


def removed(plan: Plan) -> dict[str, list[int]]:
    return {part: np.flatnonzero(~keep).tolist() for (_, part), keep in plan.keep.items() if not keep.all()}


# Ways to mask a unit

WAYS = ("not", "columns", "rows", "all but columns", "some of the rows", "rows and columns")


def cut(network: nn.Module, architecture: Architecture, part: str, unit: int, way: str) -> None:
    """Register masks of a unit's weights."""
    weights = {entry.weight for entry in architecture.maps}
    for parameter, dim, units in architecture.carriers(0, part):
        of_map, reads = parameter.name in weights, parameter.name in weights and dim == 1
        wanted = {
            "columns": reads,
            "rows": of_map and not reads,
            "all but columns": not reads,
            "some of the rows": of_map and not reads,
            "rows and columns": of_map,
        }
        if wanted.get(way):
            positions = np.flatnonzero(units == unit)
            if way.startswith("some"):
                positions = positions[: len(positions) // 2]
            zero(network, parameter.name, dim, positions)


def zero(network: nn.Module, name: str, dim: int, positions: Iterable[int]) -> None:
    """Register a mask of some rows or columns of a parameter."""
    module, _, parameter = name.rpartition(".")
    owner = network.get_submodule(module)
    mask = torch.ones_like(getattr(owner, parameter))
    mask.index_fill_(dim, torch.tensor(list(positions), dtype=torch.int64), 0)
    prune.custom_from_mask(owner, parameter, mask)


def randomly_cut(network: nn.Module, architecture: Architecture, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _, part in architecture.blocks():
        for unit in range(architecture.units(part)):
            cut(network, architecture, part, unit, str(rng.choice(WAYS)))


# On the command line

CODE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

def broken():
    raise KeyError("no such size")

number = int
"""

YAML = 'family: net\nprunable: [h]\nmodules: {"0": x -> h, "2": h -> y}\n'


def write_files() -> dict[str, str]:
    """Write code, family, inputs and weights into the current folder; the options that name them."""
    Path("usernet.py").write_text(CODE)
    Path("net.yaml").write_text(YAML)
    save_file({"inputs": torch.randn(5, 3)}, "inputs.safetensors")
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    zero(network, "0.weight", 0, [1])
    zero(network, "2.weight", 1, [2])
    save_file(network.state_dict(), "masked.safetensors")
    for module in (network[0], network[2]):
        prune.remove(module, "weight")
    save_file(network.state_dict(), "zeroed.safetensors")
    return {"--family": "net.yaml", "--network": "usernet:Net", "--inputs": "inputs.safetensors"}


@pytest.fixture
def here(tmp_path, monkeypatch) -> dict[str, str]:
    """The files of a network in a folder of the test's own, which is the current one; the options that name them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "usernet", raising=False)
    return write_files()


def run(*words: object, **options: str) -> Result:
    return CliRunner().invoke(app, ["masks", *map(str, words), *(word for pair in options.items() for word in pair)])
