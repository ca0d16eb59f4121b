"""Watching a backward pass: the gradients are those of plain autograd, and the model is left as it was."""

import pytest
import torch
from torch import Tensor

from libprune.collection.backward import watching, watching_parameters, weight_gradient
from libprune.engine.architecture import Map
from libprune.engine.describe import describe
from libprune.engine.errors import StatisticsError
from libprune.engine.stacks import exposed
from libprune.models.compute import sequence_losses
from libprune.models.memory import recompute_layers
from libprune.models.sequences import Sequences
from tests.support.models import FAMILIES, LAYOUTS, MIXTURES, tokens

SEQUENCES = Sequences(tokens(3, 9))


def watched(family: str, recompute: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor], list[tuple[str, str]]]:
    """Weight gradients of all maps, gradients at the consumers' inputs, and the order in which both came."""
    model = FAMILIES[family](0)
    architecture = describe(model)
    weights: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    order: list[tuple[str, str]] = []

    def on_output(entry: Map, x: Tensor, gradient: Tensor) -> None:
        assert x.shape[:2] == gradient.shape[:2] == SEQUENCES.ids.shape
        order.append((entry.module, "output"))
        weights[entry.module] = weight_gradient(entry, x, gradient)

    def on_input(entry: Map, x: Tensor, gradient: Tensor) -> None:
        assert x.shape == gradient.shape
        order.append((entry.module, "input"))
        inputs[entry.module] = gradient.clone()

    if recompute:
        recompute_layers(model, architecture)
    with watching(model, architecture, on_output, on_input, recompute) as tape:
        tape.begin(0, len(SEQUENCES))
        tape.backward(sequence_losses(model, SEQUENCES).sum())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return weights, inputs, order


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_gradients_are_those_of_autograd(family):
    weights, inputs, order = watched(family)
    model = FAMILIES[family](0)
    architecture = describe(model)
    consumers = {c.module for block in architecture.blocks() for c in architecture.consumers(*block)}
    entered: dict[str, Tensor] = {}
    for name in consumers:

        def keep(module, args, name=name):
            entered[name] = args[0]
            args[0].retain_grad()

        model.get_submodule(name).register_forward_pre_hook(keep)
    sequence_losses(model, SEQUENCES).sum().backward()
    assert weights.keys() == {entry.module for entry in architecture.maps}
    for entry in architecture.maps:
        expected = model.get_parameter(entry.weight).grad
        torch.testing.assert_close(weights[entry.module], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert inputs.keys() == consumers
    for name, gradient in inputs.items():
        torch.testing.assert_close(gradient.flatten(0, 1), entered[name].grad.flatten(0, -2), rtol=1e-4, atol=1e-6)
        assert order.index((name, "output")) < order.index((name, "input"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_recomputed_layers_give_the_same_bits(family):
    plain, recomputed = watched(family), watched(family, recompute=True)
    for one, two in zip(plain[:2], recomputed[:2], strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_a_gradient_that_is_not_finite_names_the_map_and_the_sequence():
    model = FAMILIES["llama"](0)
    factors = torch.tensor([1.0, float("nan"), 1.0])
    with watching(model, describe(model), lambda *args: None) as tape:
        tape.begin(40, len(SEQUENCES))
        with pytest.raises(StatisticsError, match=r"output of model\.layers\.3\..* calibration sequence 41"):
            tape.backward((sequence_losses(model, SEQUENCES) * factors).sum())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_parameters_get_their_gradients_whether_they_are_stacks_or_not(family, recompute):
    model = FAMILIES[family](0)
    architecture = describe(model)
    exposed(model, architecture)
    sequence_losses(model, SEQUENCES).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if name not in architecture.mapped}
    model.zero_grad()
    if recompute:
        recompute_layers(model, architecture)
    found: dict[str, Tensor] = {}

    def taking(name):
        def take(tensor):
            assert name not in found
            found[name], tensor.grad = tensor.grad, None

        return take

    model.requires_grad_(False)
    with watching_parameters(model, architecture, {name: taking(name) for name in expected}):
        sequence_losses(model, SEQUENCES).sum().backward()
    assert found.keys() == {name for name, gradient in expected.items() if gradient is not None}
    assert any(entry.stack and entry.weight in found for entry in architecture.maps)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    found.clear()
    assert not any(getattr(module, "on_gradient", None) for module in model.modules())
