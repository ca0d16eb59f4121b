"""Watching networks: rows, patches and gradients make up autograd's own, masks switch units off, and nothing stays."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from libprune.collection.module_hooks import input_rows, output_rows, unit_masks, watched_gradients, watched_inputs
from libprune.engine.describe_module import describe_module
from libprune.engine.errors import StatisticsError
from libprune.networks import Network, NetworkFamily, Samples
from libprune.pipeline.sections import Score
from tests.support.networks import CASES

NUMBER = 3
OWN_WEIGHTS = [name for name, case in CASES.items() if case.smooth and name != "tied"]
"""Networks whose maps share no weight with an embedding, which would add to its gradient."""


def no_hooks(network: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in network.modules())


@pytest.mark.parametrize("name", OWN_WEIGHTS)
def test_gradients_times_inputs_over_all_calls_are_the_weights_gradients(name):
    case = CASES[name]
    network, samples = case.network(), case.samples(NUMBER)
    architecture = describe_module(network, case.family, samples.inputs)
    with (
        watched_inputs(network, architecture.maps, NUMBER) as inputs,
        watched_gradients(network, architecture) as gradients,
    ):
        samples.losses(network).sum().backward()
        taken, given = dict(inputs), {entry: calls[::-1] for entry, calls in gradients.items()}  # backward: last first
    expected = {parameter: torch.zeros_like(parameter) for parameter in network.parameters()}
    for entry in architecture.maps:
        weight = network.get_parameter(entry.weight)
        assert len(taken[entry]) == len(given[entry]) >= 1
        for rows, deltas in zip(taken[entry], given[entry], strict=True):
            expected[weight] += (deltas.T @ rows.flatten(0, 1)).view(weight.shape)
    for entry in architecture.maps:
        weight = network.get_parameter(entry.weight)
        torch.testing.assert_close(weight.grad, expected[weight], rtol=1e-4, atol=1e-6)
    assert no_hooks(network)


@pytest.mark.parametrize("name", CASES)
def test_masks_of_ones_change_no_loss_and_those_of_zero_are_units_that_are_gone(name):
    case = CASES[name]
    network, samples = case.network(), case.samples(NUMBER)
    architecture = describe_module(network, case.family, samples.inputs)
    dense = samples.losses(network).detach()
    with unit_masks(network, architecture, NUMBER) as masks:
        assert {part: tuple(mask.shape) for part, mask in masks.items()} == {
            part: (NUMBER, architecture.units(part)) for part in architecture.parts
        }
        torch.testing.assert_close(samples.losses(network), dense)
        for mask in masks.values():
            mask.data[1] = 0
        changed = samples.losses(network).detach()
    torch.testing.assert_close(changed[[0, 2]], dense[[0, 2]])
    assert not torch.isclose(changed[1], dense[1])
    assert no_hooks(network)
    assert torch.equal(samples.losses(network), dense)


def test_rows_of_a_linear_map_are_its_last_dimension():
    module, x = nn.Linear(4, 2), torch.randn(3, 5, 4)
    rows = input_rows(module, x, 3)
    assert torch.equal(rows, x)
    assert torch.equal(output_rows(module, module(x)), module(rows).flatten(0, 1))
    assert input_rows(module, x[:, 0], 3).shape == (3, 1, 4)
    assert input_rows(module, x.flatten(0, 1), 3).shape == (3, 5, 4)


def test_an_input_whose_first_dimension_is_not_that_of_the_samples_is_refused():
    case = CASES["lenet"]
    network, samples = case.network(), case.samples(NUMBER)
    architecture = describe_module(network, case.family, samples.inputs)
    with (
        watched_inputs(network, architecture.maps, 2),
        pytest.raises(StatisticsError, match=r"module 'conv1' takes an input of shape .* for 2 samples"),
    ):
        network(samples.inputs)
    assert no_hooks(network)


@st.composite
def convolutions(draw):
    """A convolution and an input for it."""
    two = draw(st.booleans())
    kernel, stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    padding = draw(st.sampled_from([0, 1, 2, "valid", "same"]))
    assume(padding != "same" or stride == 1)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    make = nn.Conv2d if two else nn.Conv1d
    module = make(2, 3, kernel, stride, padding, dilation, padding_mode=mode)
    return module, torch.randn(4, 2, 7, 6) if two else torch.randn(4, 2, 7)


@given(convolutions())
def test_a_convolution_is_a_linear_map_on_patches(drawn):
    module, x = drawn
    with torch.no_grad():
        expected = output_rows(module, module(x))
        rows = input_rows(module, x, 4)
        found = rows.flatten(0, 1) @ module.weight.flatten(1).T + module.bias
    assert rows.shape[0] == 4
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.smooth])
def test_a_mask_gradient_is_the_slope_of_the_loss_along_the_mask(name):
    """The mask of one unit of one sample is moved a little, over all consumers, calls and positions."""
    case, step = CASES[name], 1e-6
    network, samples = case.network().double(), case.samples(2)
    inputs = samples.inputs.double() if samples.inputs.is_floating_point() else samples.inputs
    samples = Samples(inputs, samples.targets)
    architecture = describe_module(network, case.family, inputs)
    with unit_masks(network, architecture, 2) as masks:
        for mask in masks.values():
            mask.data = mask.data.double()
        slopes = torch.autograd.grad(samples.losses(network).sum(), list(masks.values()))
        for part, found in zip(masks, slopes, strict=True):
            for unit in (0, architecture.units(part) - 1):
                losses = []
                for sign in (1, -1):
                    masks[part].data[1, unit] = 1 + sign * step
                    losses.append(samples.losses(network).detach())
                masks[part].data[1, unit] = 1
                slope = (losses[0] - losses[1]) / (2 * step)
                assert float(slope[0]) == 0  # of the other sample
                np.testing.assert_allclose(float(slope[1]), float(found[1, unit]), atol=1e-7, rtol=1e-4)


def test_a_feature_of_two_axes_has_the_masks_of_both():
    """The slope of the loss along the columns of the map that reads heads of several dimensions, both prunable."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    modules = {"0": "a -> h d", "2": "h d -> b"}
    described = NetworkFamily(family="f", prunable=["h", "d"], modules=modules, attributes={"heads": "h"})
    network.heads = 2
    samples = Samples(torch.randn(5, 3), torch.randint(2, (5,)))
    architecture = describe_module(network, described, samples.inputs)
    with unit_masks(network, architecture, 5) as masks:
        slopes = torch.autograd.grad(samples.losses(network).sum(), list(masks.values()))
    weight = network[2].weight
    along = torch.autograd.grad(samples.losses(network).sum(), weight)[0] * weight.detach()
    for part, slope, others in zip(masks, slopes, ((0, 2), (0, 1)), strict=True):
        torch.testing.assert_close(slope.sum(0), along.view(2, 2, 3).sum(others), msg=part)


def test_samples_must_be_the_first_dimension(tmp_path):
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.two(self.one(x).transpose(0, 1)).mean(0)

    described = NetworkFamily(family="f", prunable=["h"], modules={"one": "a -> h", "two": "h -> b"})
    samples = Samples(torch.randn(8, 5, 3), torch.randint(2, (8,)))
    network = Network(TimeFirst(), described, samples, tmp_path / "work")
    with pytest.raises(StatisticsError, match="'two' takes an input of shape"):
        network.scores(Score(criterion="taylor"))
