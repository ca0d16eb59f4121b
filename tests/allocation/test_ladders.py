"""Ladders: the removals that are allowed in each block."""

import numpy as np
import pytest
import torch
from torch import nn

from libprune.allocation.ladders import build_ladders
from libprune.engine.cost import prices
from libprune.engine.describe import describe
from libprune.engine.describe_module import describe_module
from libprune.engine.module_family import NetworkFamily
from libprune.engine.tables import unit_index
from libprune.pipeline.sections import Allocate
from tests.support.models import FAMILIES
from tests.support.shapes import Shape, ladders_of


@pytest.mark.parametrize("multiple", [3, 5, 6])
def test_the_ranks_of_a_ladder_never_descend_even_where_steps_differ_in_size(multiple):
    shape = Shape(ffn=13)
    params = Allocate(method="global", channel_multiple=multiple)
    for value in np.linspace(0.1, 1, 50):
        ladders = ladders_of(shape.architecture(), shape.table(np.full(len(shape.unit_costs()), value)), params)
        for steps in ladders.values():
            assert (np.diff([step.rank for step in steps]) >= 0).all()


def test_attention_groups_have_a_floor_of_their_own_and_no_multiple():
    shape = Shape(kv=4, ffn=12)
    params = Allocate(min_groups=2, min_channels=3, channel_multiple=4)
    scores = shape.table(1.0 + np.arange(len(shape.unit_costs())))
    ladders = ladders_of(shape.architecture(), scores, params)
    assert [len(step.units) for step in ladders[0, "attention"]] == [1, 1]
    assert [len(step.units) for step in ladders[0, "mlp"]] == [4, 4]


@pytest.mark.parametrize("floor", [0, 1, 3])
def test_experts_stay_as_their_router_needs_them_whatever_the_floor_of_attention_groups(floor):
    architecture = describe(FAMILIES["qwen3_moe"](0))
    scores = {name: np.arange(1.0, 1 + len(unit_index(architecture)["layer_idx"])) for name in ("score", "importance")}
    params = Allocate(min_groups=floor, channel_multiple=1)
    ladders = build_ladders(architecture, scores, params, prices(architecture, "parameters"))
    assert len(ladders[0, "experts"]) == architecture.units("experts") - architecture.parts["experts"].least == 4
    assert len(ladders[0, "attention"]) == architecture.units("attention") - floor


@pytest.mark.parametrize("name", ["attention", "hidden"])
def test_an_axis_of_a_network_is_of_channels_whatever_its_name(name):
    """Also where it is called as a part of a transformer is."""
    network = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))
    modules = {"0": f"inputs -> {name}", "2": f"{name} -> classes"}
    family = NetworkFamily(family="net", prunable=[name], modules=modules)
    architecture = describe_module(network, family, torch.zeros(2, 5))
    scores = unit_index(architecture) | {"score": np.arange(1.0, 13.0), "importance": np.arange(1.0, 13.0)}
    params = Allocate(min_groups=1, min_channels=3, channel_multiple=4)
    ladders = build_ladders(architecture, scores, params, prices(architecture, "parameters"))
    assert [len(step.units) for step in ladders[0, name]] == [4, 4]
    assert sum(len(step.units) for step in ladders[0, name]) == 8, "the floor of channels ends the ladder"
