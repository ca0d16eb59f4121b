"""Pruned networks in folders: what is saved loads into the network that it was made from, and into no other."""

import pytest
from torch import nn

from libprune.engine.errors import LibpruneError
from libprune.networks import Network
from libprune.pipeline.sections import Allocate, Score
from libprune.results.module_folder import load
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
