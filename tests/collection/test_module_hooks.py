"""Watching a network: rows and gradients make up autograd's own, and nothing stays on the network."""

import pytest
import torch
from torch import nn

from libprune.collection.module_hooks import input_rows, output_rows, unit_masks, watched_gradients, watched_inputs
from libprune.engine.describe_module import describe
from libprune.engine.errors import StatisticsError
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
    architecture = describe(network, case.family, samples.inputs)
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
    architecture = describe(network, case.family, samples.inputs)
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
    architecture = describe(network, case.family, samples.inputs)
    with (
        watched_inputs(network, architecture.maps, 2),
        pytest.raises(StatisticsError, match=r"module 'conv1' takes an input of shape .* for 2 samples"),
    ):
        network(samples.inputs)
    assert no_hooks(network)
