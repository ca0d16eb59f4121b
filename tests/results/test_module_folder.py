"""Folders of networks: what is collected there is of one network, its samples and its loss; what is saved loads."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from libprune.engine.errors import LibpruneError
from libprune.networks import Network, Samples, load
from libprune.pipeline.sections import Allocate, Hessian, Score
from tests.support.networks import CASES, LeNet

CASE = CASES["lenet"]


def importance(network: Network, criterion: str) -> list[float]:
    return network.scores(Score(criterion=criterion))[0]["importance"].tolist()


def test_a_folder_keeps_what_is_not_of_a_network(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    Network(CASE.network(), CASE.family, CASE.samples(), tmp_path)
    Network(LeNet(c1=3), CASE.family, CASE.samples(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("path", "content"), [("model/weights", "mine"), ("architecture.json", '{"head": "causal_lm"}')]
)
def test_a_folder_where_something_else_is_in_the_way_is_refused(path, content, tmp_path):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(content)
    with pytest.raises(LibpruneError, match="is not of a network that was pruned here; name another folder"):
        Network(CASE.network(), CASE.family, CASE.samples(), tmp_path)
    assert (tmp_path / path).read_text() == content


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "obs"])
def test_two_networks_can_take_turns_in_one_folder(criterion, tmp_path):
    first = Network(CASE.network(), CASE.family, CASE.samples(), tmp_path / "work")
    expected = importance(first, criterion)
    torch.manual_seed(9)
    second = Network(LeNet(), CASE.family, CASE.samples(), tmp_path / "work")
    assert importance(second, criterion) != expected
    np.testing.assert_allclose(importance(first, criterion), expected, rtol=1e-6)


def test_statistics_are_those_of_the_loss_that_is_given(tmp_path):
    """Functions of one name, a module and a partial function."""
    samples, found = CASE.samples(), []
    losses = (
        nn.CrossEntropyLoss(reduction="none"),
        partial(nn.functional.cross_entropy, reduction="none", label_smoothing=0.3),
        lambda outputs, targets: (outputs.mean(1) - targets).square(),
        lambda outputs, targets: (outputs.mean(1) - targets).abs(),
    )
    for loss in losses:
        given = Samples(samples.inputs, samples.targets, loss)
        found.append(importance(Network(CASE.network(), CASE.family, given, tmp_path / "work"), "taylor"))
    assert len(set(map(tuple, found))) == len(losses)


def test_a_hessian_is_collected_anew_for_another_estimator(tmp_path):
    estimators = (Hessian(estimator="fisher"), Hessian(estimator="hutchinson"), Hessian(estimator="hutchinson", seed=1))
    found = {
        tuple(importance(Network(CASE.network(), CASE.family, CASE.samples(), tmp_path, hessian=hessian), "taylor_2nd"))
        for hessian in estimators
    }
    assert len(found) == len(estimators)


def test_a_plan_of_another_network_is_refused(tmp_path):
    wider = Network(LeNet(c1=6), CASE.family, CASE.samples(), tmp_path / "wider")
    plan = wider.plan(Score(criterion="magnitude"), Allocate(ratio=0.3, method="uniform"))
    network = Network(CASE.network(), CASE.family, CASE.samples(), tmp_path / "work")
    with pytest.raises(LibpruneError, match="the plan is of units c1 6, c2 5, f1 12, but the network has c1 4"):
        network.prune(plan, "none")


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
