"""Single layers give what they give within the whole model, and the model is left as it was."""

import pytest
import torch
from torch import Tensor, nn

from libprune.engine.describe import describe
from libprune.models.layers import copy_output, first_output, layers_of, replaced, run_layer, skipped
from tests.support.models import FAMILIES, LAYOUTS, tokens

IDS = tokens(2, 12)


def states_of(model: nn.Module, layers: list[nn.Module]) -> list[Tensor]:
    """The hidden states behind every layer, in one pass over the whole model."""
    states, handles = [], []
    for layer in layers:
        handles.append(layer.register_forward_hook(lambda m, args, out: states.append(first_output(out).clone())))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return states


@pytest.mark.parametrize("family", [*LAYOUTS, "bert"])
def test_a_layer_run_alone_gives_the_bits_of_the_whole_model(family):
    model = FAMILIES[family](0)
    layers = layers_of(model, describe(model))
    state = None
    for layer, expected in enumerate(states_of(model, layers)):
        state, outputs = run_layer(model, layers, layer, IDS, state)
        assert torch.equal(first_output(state), expected)
        assert outputs == []


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_pass_ends_at_the_input_of_a_module_and_brings_the_outputs_before_it(family):
    model = FAMILIES[family](0)
    architecture = describe(model)
    layers = layers_of(model, architecture)
    consumer = model.get_submodule(architecture.consumers(1, "mlp")[0].module)
    query = model.get_submodule(architecture.maps_of(1, "attention")[0].module)
    seen: list[Tensor] = []
    handles = [
        consumer.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(*IDS.shape, -1))),
        query.register_forward_hook(lambda m, args, out: seen.append(out.reshape(*IDS.shape, -1))),
    ]
    before = states_of(model, layers)[0]
    for handle in handles:
        handle.remove()
    output, expected = seen
    entered, outputs = run_layer(model, layers, 1, IDS, before, watched=[query], until=consumer)
    assert torch.equal(entered, expected)
    assert torch.equal(outputs[0], output)
    assert not entered.requires_grad
    assert run_layer(model, layers, 1, IDS, before, until=consumer, differentiable=True)[0].requires_grad


def test_skipped_layers_are_as_before_even_after_an_error():
    model = FAMILIES["llama"](0)
    layers = layers_of(model, describe(model))
    own = layers[0].forward = lambda *args, **kwargs: type(layers[0]).forward(layers[0], *args, **kwargs)
    output = torch.zeros(2, 12, model.config.hidden_size)
    with pytest.raises(ZeroDivisionError), skipped(layers[:2], output, torch.device("cpu")):
        assert torch.equal(first_output(layers[1](None)), output)
        raise ZeroDivisionError
    assert vars(layers[0])["forward"] is own
    assert "forward" not in vars(layers[1])


def test_a_copy_does_not_share_memory_with_the_output_of_a_layer():
    state, rest = torch.ones(2, 3), torch.ones(1)
    copied = copy_output((state, (rest, None)), "cpu")
    state.zero_()
    rest.zero_()
    assert torch.equal(first_output(copied), torch.ones(2, 3))
    assert torch.equal(copied[1][0], torch.ones(1))
    assert copied[1][1] is None


def test_replaced_parameters_come_back_even_after_an_error():
    model = FAMILIES["llama"](0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(ZeroDivisionError), replaced(model, {name: torch.zeros_like(before[name])}):
        assert not model.get_parameter(name).any()
        assert model.get_parameter(name).requires_grad == before[name].requires_grad
        raise ZeroDivisionError
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
