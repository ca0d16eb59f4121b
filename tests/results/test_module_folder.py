"""Pruned networks in folders: what is saved loads into the network that it was made from, and into no other."""

import pytest
import torch
from torch import Tensor, nn

from libprune.engine.errors import LibpruneError
from libprune.networks import Network, NetworkFamily, Samples
from libprune.pipeline.sections import Allocate, Score
from libprune.results.module_folder import load, stored
from tests.support.networks import CASES, LeNet

CASE = CASES["lenet"]


def test_a_folder_loads_into_no_other_network(tmp_path):
    network = Network(CASE.network(), CASE.family, CASE.samples(), tmp_path / "work")
    plan = network.plan(Score(criterion="magnitude"), Allocate(ratio=0.3, method="uniform"))
    network.prune(plan, "none").save(tmp_path / "pruned")
    other = LeNet()
    other.conv2 = nn.Conv2d(4, 5, 5, padding=2)
    with pytest.raises(
        LibpruneError, match=r"conv2.weight has shape .* which is no part of the network's \[5, 4, 5, 5\]"
    ):
        load(tmp_path / "pruned", other)


class Scaled(nn.Module):
    """Multiplies by a buffer."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("factors", factors)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


class Shared(nn.Module):
    """Two modules have one buffer."""

    def __init__(self) -> None:
        super().__init__()
        factors = torch.arange(1.0, 7.0)
        self.a, self.b, self.p, self.q = nn.Linear(3, 6), nn.Linear(6, 2), Scaled(factors), Scaled(factors)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.q(torch.tanh(self.p(self.a(x)))))


def test_modules_that_share_a_buffer_share_it_afterwards(tmp_path):
    family = NetworkFamily(family="f", prunable=["h"], modules={"a": "i -> h", "p": "h", "q": "h", "b": "h -> o"})
    samples = Samples(torch.randn(32, 3), torch.randint(2, (32,)))
    network = Network(Shared(), family, samples, tmp_path / "work")
    plan = network.plan(Score(criterion="magnitude"), Allocate(ratio=0.3, method="uniform"))
    pruned = network.prune(plan, "none")
    pruned.save(tmp_path / "pruned")
    for found in (pruned.network, load(tmp_path / "pruned", Shared())):
        assert found.q.factors is found.p.factors
        assert len(found.p.factors) == plan.kept(0, "h") < 6


def test_what_is_stored_and_no_tensor_is_refused_by_name():
    class Counting(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"seen": 1}

    with pytest.raises(LibpruneError, match="stores '_extra_state', a dict and no tensor"):
        stored(Counting(2, 2))
