"""Units that several layers use, as keys and values in Gemma 4: one block, whatever the layer that reads them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from libprune.collection.accumulator import UNITS
from libprune.engine import cost
from libprune.engine.architecture import SHARING, Architecture
from libprune.engine.describe import describe
from libprune.engine.errors import FamilyError, LibpruneError
from libprune.engine.family import Family, Sharing, families
from libprune.engine.plan import Plan
from libprune.engine.stock_config import check_config
from libprune.engine.surgery import masked, slice_state
from libprune.models.memory import recompute_layers
from libprune.models.sequences import Sequences
from libprune.statistics.activations import activation_columns
from libprune.statistics.gradients import gradient_columns
from libprune.statistics.hessian import hessian_columns
from libprune.statistics.losses import Prefix
from tests.support.collected import N_TOK, SEQUENCES, activations, assert_close, gradients, hessian, of_layers
from tests.support.models import FAMILIES, outputs, tokens

OWNERS = (0, 1, 2, 2, 1, 1)


@pytest.fixture(scope="module")
def model():
    return FAMILIES["gemma4_text"](0)


@pytest.fixture(scope="module")
def architecture(model) -> Architecture:
    return describe(model)


@pytest.fixture(scope="module")
def weights(model) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_layer_uses_the_units_of_the_last_one_of_its_kind_that_has_any(architecture):
    assert architecture.parts["attention"].owners == OWNERS
    assert [layer for layer, part in architecture.blocks() if part == "attention"] == [0, 1, 2]
    assert [c.layer for c in architecture.consumers(1, "attention")] == [1, 4, 5]
    assert [c.module for c in architecture.consumers_in(4)] == [
        "model.layers.4.self_attn.o_proj",
        "model.layers.4.mlp.down_proj",
    ]
    assert architecture.layers_stay == SHARING


def test_a_layer_without_one_to_share_with_is_refused():
    sharing = Sharing(lack="self_attn.k_proj", among="layer_types")
    assert sharing.owners([True, True], ["a", "b"]) is None
    with pytest.raises(
        FamilyError, match=r"layer 1 lacks self_attn\.k_proj, and no layer of kind 'b' before it has it"
    ):
        sharing.owners([True, False], ["a", "b"])


def test_a_part_that_only_some_layers_have_cannot_share():
    file = families()["gemma4_text"].model_dump()
    file["parts"]["attention"]["where"] = "self_attn.q_proj"
    with pytest.raises(ValueError, match="a part with sharing is in all layers, so it cannot have where as well"):
        Family.model_validate(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("per_layer_config", {1: {"head_dim": 8}}),
        ("attention_k_eq_v", True),
        ("enable_moe_block", True),
        ("use_double_wide_mlp", True),
    ],
)
def test_what_gemma_4_can_be_beside_that_is_refused_by_its_key(model, key, value):
    config = type(model.config).from_dict(model.config.to_dict() | {key: value})
    with pytest.raises(FamilyError, match=f"config key '{key}' = .* is not supported by family 'gemma4_text'"):
        check_config(families()["gemma4_text"], config)


def test_removing_a_unit_removes_it_in_every_layer_that_uses_it(model, architecture):
    """Against the model with zeros in the rows and columns of every layer that uses the unit."""
    plan = Plan.dense(architecture).without((1, "attention"), 2)
    width = architecture.sizes["q"] * architecture.sizes["d"]
    with torch.no_grad():
        with masked(model, architecture, plan):
            found = outputs(model, tokens())
        zeroed = FAMILIES["gemma4_text"](0)
        for layer in (1, 4, 5):
            zeroed.model.layers[layer].self_attn.o_proj.weight[:, 2 * width : 3 * width] = 0
        expected = outputs(zeroed, tokens())
    assert_close(found, expected, rtol=1e-5)
    state = slice_state(model.state_dict(), architecture, plan)
    shapes = [tuple(state[f"model.layers.{layer}.self_attn.o_proj.weight"].shape) for layer in range(6)]
    assert [shape[1] for shape in shapes] == [3 * width, 2 * width, 3 * width, 3 * width, 2 * width, 2 * width]
    size, dense = cost.size(architecture, plan), cost.size(architecture, Plan.dense(architecture))
    prices = {objective: cost.prices(architecture, objective) for objective in ("parameters", "macs", "cache")}
    assert sum(state[p.name].numel() for p in architecture.parameters) == size.total
    assert dense.total - size.total == prices["parameters"].removed(plan)
    assert dense.macs - size.macs == prices["macs"].removed(plan)
    assert dense.cache - size.cache == prices["cache"].removed(plan) == 2 * architecture.sizes["d"]


def test_a_whole_part_goes_from_every_layer_that_uses_it(model, architecture):
    plan = Plan.dense(architecture).without((1, "attention"), slice(None))
    left = slice_state(model.state_dict(), architecture, plan)
    having = [layer for layer in range(6) if f"model.layers.{layer}.self_attn.q_proj.weight" in left]
    assert having == [0, 2, 3]
    prices = cost.prices(architecture, "parameters")
    size, dense = cost.size(architecture, plan), cost.size(architecture, Plan.dense(architecture))
    assert dense.total - size.total == prices.removed(plan)
    with pytest.raises(LibpruneError, match=f"no layer of family 'gemma4_text' can be deleted: {SHARING}"):
        slice_state(model.state_dict(), architecture, plan.without((4, "mlp"), slice(None)))


# Statistics


def mask_gradients(model, architecture: Architecture) -> dict[tuple[int, str], Tensor]:
    """The gradient of each sequence's loss by one mask a block, which every layer that uses its units is given."""
    rows = []
    for sequence in tokens(SEQUENCES, N_TOK + 1):
        masks = {b: torch.ones(architecture.units(b[1]), requires_grad=True) for b in architecture.blocks()}
        handles = []
        for (layer, part), mask in masks.items():
            for consumer in architecture.consumers(layer, part):
                units = torch.from_numpy(consumer.input.units(architecture.parts[part].axis, architecture.sizes))
                module, wide = model.get_submodule(consumer.module), mask[units]
                handles.append(module.register_forward_pre_hook(lambda _, args, wide=wide: (args[0] * wide,)))
        loss = model(input_ids=sequence[None], labels=sequence[None], use_cache=False).loss
        rows.append(torch.autograd.grad(loss, list(masks.values())))
        for handle in handles:
            handle.remove()
    return {block: torch.stack([row[i] for row in rows]).double() for i, block in enumerate(architecture.blocks())}


def test_the_mask_gradient_of_a_shared_unit_is_that_of_one_mask_in_all_its_layers(model, architecture):
    sums = gradients(model)
    for (layer, part), m in mask_gradients(model, architecture).items():
        found = sums.finish(layer)
        assert_close(found[f"{UNITS}{part}.mask_gradient"], m.mean(0))
        assert_close(found[f"{UNITS}{part}.mask_gradient_abs"], m.abs().mean(0))
        assert_close(found[f"{UNITS}{part}.mask_gradient_square"], m.square().mean(0))
        assert_close(found[f"{UNITS}{part}.unit_fisher_sequence"], 0.5 * N_TOK * m.square().mean(0))


def test_recomputed_layers_give_the_same_gradients(model, architecture):
    expected, again = of_layers(gradients(model)), FAMILIES["gemma4_text"](0)
    recompute_layers(again, architecture)
    found = of_layers(gradients(again, recompute=True))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(found[name], tensor)


def test_columns_count_the_weights_of_all_layers_that_use_a_unit(model, architecture, weights):
    """The gradients are those of the model's own loss, to which all layers that read a key contribute."""
    ids = tokens(SEQUENCES, N_TOK + 1)
    named = {name: p.requires_grad_() for name, p in model.named_parameters() if ".layers." in name}
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    given = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    model.requires_grad_(False)
    first, second, inputs = (of_layers(sums) for sums in (gradients(model), hessian(model), activations(model)))
    for layer, part in architecture.blocks():
        expected, carried = np.zeros(architecture.units(part)), list(architecture.carriers(layer, part))
        for parameter, dim, units in carried:
            terms = (weights[parameter.name] * given[parameter.name]).abs().double().movedim(dim, 0).flatten(1).sum(1)
            np.add.at(expected, units, terms.numpy())
        own = {name: first[name] for name in first if not name.startswith(UNITS)}
        np.testing.assert_allclose(gradient_columns(architecture, own, weights, layer, part)["taylor"], expected, 1e-3)
        assert (hessian_columns(architecture, second, weights, layer, part)["fisher"] > 0).all()
        columns = activation_columns(architecture, inputs, weights, layer, part)
        magnitudes = []
        for consumer in architecture.consumers(layer, part):
            values = inputs[f"{consumer.module}.input_norm_l1"] / inputs[f"{consumer.module}.input_tokens"]
            magnitudes.append(values.double().view(architecture.units(part), -1).mean(1))
        np.testing.assert_allclose(columns["activation_magnitude"], torch.stack(magnitudes).mean(0), rtol=1e-5)
        assert {parameter.layer for parameter, _, _ in carried} == set(architecture.users(layer, part))


def test_losses_from_a_layer_are_those_of_whole_passes(model, architecture):
    sequences, layers = Sequences(tokens(SEQUENCES, N_TOK + 1)), range(architecture.layers)
    kept, whole = Prefix(model, architecture, sequences, 2, layers), Prefix(model, architecture, sequences, 2, [])
    for block in ((1, "attention"), (2, "attention"), (5, "mlp")):
        plan = Plan.dense(architecture).without(block, 0)
        torch.testing.assert_close(kept.losses_of(plan), whole.losses_of(plan))
        assert not torch.equal(kept.losses_of(plan), kept.losses)
