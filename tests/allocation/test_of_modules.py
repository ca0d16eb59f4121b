"""Allocation for networks that are not transformers: the exact size of what is left meets the budget."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from libprune.allocation.of_modules import MODULE_METHODS, OBJECTIVES, allocate_network
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe_module import describe_module
from libprune.engine.errors import BudgetError, LibpruneError
from libprune.engine.module_family import NetworkFamily
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns, split_blocks, unit_index
from libprune.pipeline.methods import METHODS
from libprune.pipeline.sections import Allocate
from tests.support.networks import CASES

ARCHITECTURES = {
    name: describe_module(case.network(), case.family, case.samples(2).inputs)
    for name, case in CASES.items()
    if name in ("lenet", "resnet", "lstm")
}


def scored(architecture: Architecture, seed: int) -> Columns:
    """Made-up scores, no two of them equal."""
    index = unit_index(architecture)
    values = 1.0 + np.random.default_rng(seed).permutation(len(index["group_idx"]))
    return index | {"score": values, "importance": values, "cost": np.ones(len(values), dtype=np.int64)}


def amount(architecture: Architecture, plan: Plan, objective: str) -> int:
    return getattr(cost.size(architecture, plan), OBJECTIVES[objective])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("method", MODULE_METHODS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@settings(max_examples=5)
@given(seed=st.integers(0, 99), ratio=st.floats(0.1, 0.5))
def test_the_budget_is_met_the_lowest_go_first_and_nothing_more_fits(name, method, objective, seed, ratio):
    architecture = ARCHITECTURES[name]
    scores = scored(architecture, seed)
    plan = allocate_network(architecture, scores, Allocate(method=method, ratio=ratio, objective=objective))
    dense = amount(architecture, Plan.dense(architecture), objective)
    target = round(ratio * dense)
    assert dense - amount(architecture, plan, objective) <= target
    for block, values in split_blocks(architecture, scores["score"]):
        keep = plan.keep[block]
        assert keep.any(), "every part keeps a unit"
        assert keep.all() or values[~keep].max() < values[keep].min()
        if keep.sum() > 1:
            lowest = np.flatnonzero(keep)[np.argmin(values[keep])]
            fewer = Plan({**plan.keep, block: keep & (np.arange(len(keep)) != lowest)})
            assert dense - amount(architecture, fewer, objective) > target


def test_channels_of_networks_go_one_by_one_unless_a_multiple_is_given():
    modules = {"0": "inputs -> hidden", "2": "hidden -> classes"}
    network = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 3))
    family = NetworkFamily(family="net", prunable=["hidden"], modules=modules)
    architecture = describe_module(network, family, torch.zeros(2, 5))
    scores = scored(architecture, 0)
    for limit, kept in (({}, 45), ({"channel_multiple": 32}, 64), ({"channel_multiple": 16}, 48)):
        assert allocate_network(architecture, scores, Allocate(ratio=0.3, **limit)).kept(0, "hidden") == kept


def test_the_methods_of_networks_are_those_whose_record_says_so():
    assert set(MODULE_METHODS) == {name for name, record in METHODS.items() if record.modules}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"method": "hgsp"}, r"method = 'hgsp' needs a language model; for networks choose"),
        ({"objective": "cache"}, r"objective = 'cache' needs a language model; for networks choose parameters, macs"),
        ({"width": 12}, "width = 12 needs a language model; networks know ratio, ratio_of, objective, method"),
        ({"depth": "units"}, "depth = 'units' needs a language model"),
        ({"worth": "sensitivity"}, "worth = 'sensitivity' needs a language model"),
        ({"nested": [0.1]}, r"nested = \(0\.1,\) needs a language model"),
        ({"min_channels": 0}, "min_channels = 0, but a network needs at least one unit"),
        ({"ratio": None}, "ratio is None"),
    ],
)
def test_what_networks_do_not_have_is_refused(params, message):
    architecture = ARCHITECTURES["lenet"]
    with pytest.raises(LibpruneError, match=message):
        allocate_network(architecture, scored(architecture, 0), Allocate(**params))


def test_a_ratio_out_of_reach_is_refused_with_the_share_in_reach():
    architecture = ARCHITECTURES["lenet"]
    with pytest.raises(BudgetError, match=r"at most 0\.\d+ can"):
        allocate_network(architecture, scored(architecture, 0), Allocate(ratio=0.95, min_channels=3))


def test_retention_without_a_ratio_finds_one_or_says_that_there_is_none():
    architecture, params = ARCHITECTURES["lenet"], Allocate(ratio=None, method="retention")
    plan = allocate_network(architecture, scored(architecture, 0), params)
    assert any(not keep.all() for keep in plan.keep.values())
    with pytest.raises(BudgetError, match="no part that can lose a unit"):
        allocate_network(architecture, scored(architecture, 0), params.model_copy(update={"min_channels": 99}))
