"""Networks that a family does not describe, or that cannot lose units, are refused by name."""

import pytest
import torch
from torch import nn

from libprune.engine.describe_module import describe_module
from libprune.engine.errors import FamilyError
from libprune.networks import NetworkFamily
from tests.support.networks import LENET, RECURRENT, LeNet, Recurrent


def family(**changes: object) -> NetworkFamily:
    return NetworkFamily(**(LENET | changes))


def modules(**changes: str) -> dict[str, str]:
    return LENET["modules"] | changes


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"modules": {k: v for k, v in modules().items() if k != "fc1"}}, r"parameter 'fc1.weight' \[12, 45\]"),
        ({"modules": modules(conv3="c1 -> c2")}, "'conv3'.* no entry|has no entry 'conv3'"),
        ({"modules": modules(conv2="c1 -> c1")}, "does not fit this network"),
        ({"prunable": ["c9"]}, "axis 'c9' as prunable.*did you mean"),
        ({"prunable": ["classes"]}, "no map takes it as its input"),
        ({"attributes": {"fc1.nothing": "f1"}}, "attribute 'fc1.nothing'"),
        ({"attributes": {"fc1.out_features": "c1"}}, "attribute fc1.out_features = 12, but c1 is 4"),
    ],
)
def test_a_family_that_does_not_fit_is_refused_by_name(changed, message):
    with pytest.raises(FamilyError, match=message):
        describe_module(LeNet(), family(**changed), torch.randn(2, 1, 14, 14))


@pytest.mark.parametrize(
    ("norm", "name"), [(nn.LayerNorm(4), "LayerNorm"), (nn.GroupNorm(2, 4), "GroupNorm"), (nn.RMSNorm(4), "RMSNorm")]
)
def test_norms_over_units_are_refused(norm, name):
    network = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2))
    described = NetworkFamily(family="f", prunable=["h"], modules={"0": "a -> h", "1": "h", "2": "h -> b"})
    with pytest.raises(FamilyError, match=f"{name}, whose statistics run over its units"):
        describe_module(network, described, torch.randn(2, 3))


def test_convolutions_of_several_groups_are_refused_as_maps():
    network = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2))
    described = NetworkFamily(family="f", prunable=["h"], modules={"0": "a -> h", "1": "h -> b"})
    with pytest.raises(FamilyError, match="Conv2d of several groups"):
        describe_module(network, described, torch.randn(2, 4, 3, 3))


def test_a_tied_map_with_prunable_axes_is_refused():
    with pytest.raises(FamilyError, match=r"decoder.weight and embedding.weight are one parameter"):
        describe_module(Recurrent(tied=True), NetworkFamily(**RECURRENT), torch.randint(7, (2, 3)))


def test_a_recurrent_module_of_torch_is_refused_as_a_map():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.out = nn.LSTM(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.cell(x)[0])

    described = NetworkFamily(family="f", prunable=["h"], modules={"cell": "a -> h", "out": "h -> b"})
    with pytest.raises(FamilyError, match=r"cell.weight_ih_l0 belongs to a LSTM"):
        describe_module(Hidden(), described, torch.randn(2, 3))


def test_a_module_that_is_never_called_is_refused():
    class Uncalled(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return nn.functional.linear(self.one(x), self.two.weight)

    described = NetworkFamily(family="f", prunable=["h"], modules={"one": "a -> h", "two": "h -> b"})
    with pytest.raises(FamilyError, match="'two' is described, but the network does not call it"):
        describe_module(Uncalled(), described, torch.randn(2, 3))


def test_an_embedding_cannot_lose_what_it_looks_up():
    with pytest.raises(FamilyError, match="what embedding 'embedding' looks up"):
        describe_module(Recurrent(), NetworkFamily(**(RECURRENT | {"prunable": ["vocab"]})), torch.randint(7, (2, 3)))
