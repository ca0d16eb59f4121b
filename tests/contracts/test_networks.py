"""The contract that every network passes: sliced equals masked, described equals what torch holds."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from libprune.collection.module_hooks import watched_inputs
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe_module import describe_module
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.engine.tables import split_blocks
from libprune.networks import Network, load
from libprune.pipeline.sections import Allocate, Score
from tests.support.networks import CASES, Case, cut, random_plan

TOLERANCE = 1e-5
"""Of the largest output."""


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def network(case) -> nn.Module:
    return case.network()


@pytest.fixture(scope="module")
def architecture(case, network) -> Architecture:
    return describe_module(network, case.family, case.samples().inputs)


@pytest.fixture(scope="module")
def pruner(case, network, tmp_path_factory) -> Network:
    return Network(network, case.family, case.samples(), tmp_path_factory.mktemp("network") / "work", batch=10)


@settings(max_examples=12)
@given(st.integers(0, 2**31))
def test_a_sliced_network_computes_what_the_masked_one_does(case, network, architecture, seed):
    plan, inputs = random_plan(architecture, seed), case.samples(6, seed=2).inputs
    smaller = cut(case, network, architecture, plan)
    with masked(network, architecture, plan), torch.no_grad():
        expected = network(inputs)
    with torch.no_grad():
        found = smaller(inputs)
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


@settings(max_examples=12)
@given(st.integers(0, 2**31))
def test_parameters_and_multiplications_are_as_predicted(case, network, architecture, seed):
    plan, inputs = random_plan(architecture, seed), case.samples(3, seed=2).inputs
    smaller = cut(case, network, architecture, plan)
    predicted = cost.size(architecture, plan)
    assert predicted.total == sum(parameter.numel() for parameter in smaller.parameters())
    with watched_inputs(smaller, architecture.maps, len(inputs)) as seen, torch.no_grad():
        smaller(inputs)
    weights = {entry: smaller.get_submodule(entry.module).weight.numel() for entry in seen}
    macs = sum(weights[entry] * rows.shape[1] for entry, calls in seen.items() for rows in calls)
    assert predicted.macs == macs


def test_torch_s_own_modules_say_their_new_shapes(case, network, architecture):
    smaller = cut(case, network, architecture, random_plan(architecture, 3))
    for module in smaller.modules():
        match module:
            case nn.Linear():
                assert (module.out_features, module.in_features) == module.weight.shape
            case nn.Conv1d() | nn.Conv2d():
                assert module.out_channels == module.weight.shape[0]
                assert module.in_channels == module.weight.shape[1] * module.groups
            case nn.BatchNorm2d():
                assert module.num_features == len(module.running_mean) == len(module.weight)
            case nn.Embedding():
                assert (module.num_embeddings, module.embedding_dim) == module.weight.shape


def test_the_dense_network_is_left_as_it_was(case, network, architecture):
    before = copy.deepcopy(network.state_dict())
    cut(case, network, architecture, random_plan(architecture, 4))
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_description_survives_being_written(architecture):
    assert Architecture.from_json(architecture.to_json()) == architecture


def test_the_cost_of_a_unit_is_what_the_first_one_saves(architecture):
    dense = cost.size(architecture, Plan.dense(architecture)).total
    for block in architecture.blocks():
        plan = Plan.dense(architecture)
        plan.keep[block][0] = False
        assert dense - cost.size(architecture, plan).total == cost.unit_parameters(architecture, *block)


@pytest.mark.parametrize("repair", ["none", "local", "sequential"])
def test_a_saved_network_loads_into_the_code_of_the_dense_one(case, pruner, tmp_path, repair):
    plan = pruner.plan(Score(criterion="random"), Allocate(ratio=0.3, method="global"))
    pruned = pruner.prune(plan, repair)
    pruned.save(tmp_path / "pruned")
    torch.manual_seed(99)
    again, inputs = load(tmp_path / "pruned", case.make()), case.samples(5, seed=7).inputs
    with torch.no_grad():
        assert torch.equal(again(inputs), pruned.network(inputs))
    with pytest.raises(LibpruneError, match="exists"):
        pruned.save(tmp_path / "pruned")


@pytest.mark.parametrize("method", ["uniform", "global", "retention"])
@pytest.mark.parametrize("ratio", [0.2, 0.4])
@pytest.mark.parametrize("objective", ["parameters", "macs"])
def test_a_budget_is_met_from_below_to_within_one_removal(pruner, method, ratio, objective):
    architecture = pruner.architecture
    allocate = Allocate(ratio=ratio, method=method, objective=objective, network_type="rnn")
    plan = pruner.plan(Score(criterion="unit_fisher"), allocate)
    prices = cost.prices(architecture, objective)
    sizes = [cost.size(architecture, one) for one in (Plan.dense(architecture), plan)]
    dense, left = ((size.total, size.macs)[objective == "macs"] for size in sizes)
    assert dense - left <= round(ratio * dense)
    assert round(ratio * dense) - (dense - left) <= max(prices.unit.values())


@pytest.mark.parametrize("method", ["uniform", "global"])
def test_no_part_can_lose_its_next_unit_within_the_budget(pruner, method):
    architecture, ratio = pruner.architecture, 0.3
    allocate = Allocate(ratio=ratio, method=method)
    table, _ = pruner.scores(Score(criterion="unit_fisher"))
    plan = pruner.plan(Score(criterion="unit_fisher"), allocate)
    dense = cost.size(architecture, Plan.dense(architecture)).total
    scores = dict(split_blocks(architecture, table["score"]))
    for block in architecture.blocks():
        kept = np.flatnonzero(plan.keep[block])
        if len(kept) > 1:
            more = Plan({other: keep.copy() for other, keep in plan.keep.items()})
            more.keep[block][kept[np.argmin(scores[block][kept])]] = False
            assert dense - cost.size(architecture, more).total > round(ratio * dense)
