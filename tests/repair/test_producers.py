"""The fit of the maps that compute units, against derivatives by autograd and least squares with the whole Jacobian."""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture, Map
from libprune.engine.describe import describe
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.models.layers import layers_of, replaced, run_layer
from libprune.models.memory import recompute_layers
from libprune.models.sequences import Sequences
from libprune.repair.least_squares import Fit, new_parameters, pruned_consumers
from libprune.repair.producers import (
    RIDGE,
    Flow,
    Producer,
    changed_weight,
    fit_producers,
    outputs_as_leaves,
    producers_of,
    slopes_of,
)
from libprune.repair.sequential import SequentialRepair
from libprune.repair.streams import split_batches
from tests.support.models import FAMILIES, LAYOUTS, VOCAB, plan_of, tokens
from tests.support.predictions import masked_logits

MODELS = {name: FAMILIES[name] for name in LAYOUTS}
every_model = pytest.mark.parametrize("name", MODELS)
DAMPING = 1e-2


def two_thirds(architecture: Architecture) -> Plan:
    return plan_of(architecture, lambda layer, part: -(-2 * architecture.units(part) // 3))


def consumer_of(architecture: Architecture, plan: Plan, part: str, layer: int = 0) -> tuple[Map, Tensor]:
    return next((c, kept) for c, kept in pruned_consumers(architecture, plan) if (c.layer, c.part) == (layer, part))


def seen(model: PreTrainedModel, plan: Plan, part: str, ids: Tensor):
    """The consumer of a part of the first block, its producers, kept inputs, what they take, and slopes."""
    architecture = describe(model)
    consumer, kept = consumer_of(architecture, plan, part)
    producers = producers_of(architecture, consumer, kept)
    module = model.get_submodule(consumer.module)
    with masked(model, architecture, plan), outputs_as_leaves(model, producers) as watched:
        x, _ = run_layer(model, layers_of(model, architecture), 0, ids, None, until=module, differentiable=True)
    return consumer, producers, x[..., kept], watched


# What computes units


@every_model
def test_producers_are_the_maps_whose_outputs_are_the_units_and_rows_come_in_their_order(name):
    architecture = describe(MODELS[name](0))
    plan = two_thirds(architecture)
    consumer, kept = consumer_of(architecture, plan, "mlp")
    producers = producers_of(architecture, consumer, kept)
    gated = sum("ffn" in str(m.output) for m in architecture.maps_of(0, "mlp"))
    assert len(producers) == gated
    units = np.flatnonzero(kept.numpy())
    for producer in producers:
        of = producer.entry.output.units("ffn", architecture.sizes)
        assert producer.rows.shape[1] == int(kept.sum())
        assert all((of[rows] == units).all() for rows in producer.rows.numpy())
        assert len(np.unique(producer.rows)) == producer.rows.numel()
    (attention,) = architecture.consumers(0, "attention")
    of_heads = torch.ones(attention.input.size(architecture.sizes), dtype=torch.bool)
    assert producers_of(architecture, attention, of_heads) == ()


@every_model
def test_slopes_give_the_derivative_of_the_units_by_the_weights(name):
    model, ids = MODELS[name](0).double(), tokens(3, 7)
    plan = two_thirds(describe(model))
    consumer, producers, x, watched = seen(model, plan, "mlp", ids)
    slopes = slopes_of(x, producers, watched)
    generator = torch.Generator().manual_seed(1)
    along = {}
    moved = torch.zeros(x.flatten(0, -2).shape, dtype=torch.float64)
    for producer, a in zip(producers, slopes, strict=True):
        old = model.get_parameter(producer.entry.weight).detach()
        rows = torch.randn(
            *producer.rows.shape, producer_width(producer, old), generator=generator, dtype=torch.float64
        )
        z = watched[producer.entry.module][0].flatten(0, -2)
        moved += (a * (z @ rows.flatten(0, 1).T).view(a.shape)).sum(1)
        along[producer.entry.weight] = changed_weight(producer, torch.zeros_like(old), rows.float())
    expected = derivative(model, plan, consumer, along, ids)[..., consumer_of(describe(model), plan, "mlp")[1]]
    torch.testing.assert_close(moved, expected.flatten(0, -2), rtol=1e-4, atol=1e-5)


def producer_width(producer: Producer, weight: Tensor) -> int:
    return weight.shape[0 if producer.entry.transposed else 1]


def derivative(model: PreTrainedModel, plan: Plan, consumer: Map, along: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Of a consumer's inputs, by central differences through the whole model."""
    caught = []
    handle = model.get_submodule(consumer.module).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    size = 1e-5
    for sign in (1, -1):
        moved = {name: model.get_parameter(name).detach() + sign * size * along[name] for name in along}
        with torch.no_grad(), masked(model, describe(model), plan), replaced(model, moved):
            model(input_ids=ids, use_cache=False)
    handle.remove()
    return (caught[0] - caught[1]) / (2 * size)


@pytest.mark.parametrize("mix", ["units", "tokens"])
def test_units_that_depend_on_one_another_or_on_other_tokens_have_no_slopes(mix):
    model = FAMILIES["llama"](0)
    dim = {"units": -1, "tokens": -2}[mix]
    for block in model.model.layers:
        block.mlp.act_fn = torch.nn.Softmax(dim)
    plan = two_thirds(describe(model))
    _, producers, x, watched = seen(model, plan, "mlp", tokens(3, 7))
    assert len(producers) == 2
    assert slopes_of(x, producers, watched) == ()


# The step


def problem(seed: int, times: int = 1, held_out: int = 0) -> tuple[list[Flow], Tensor, list[np.ndarray], np.ndarray]:
    """Flows of two producers, W, and the Jacobian and target by rows, over the tokens of the fit."""
    rng = np.random.default_rng(seed)
    kept, output, width = 5, 4, (3, 2)
    weight = torch.from_numpy(rng.normal(size=(output, kept))).float()
    flows, jacobians, targets = [], [], []
    for number in range(3 + held_out):
        z = [rng.normal(size=(11, size)) @ np.diag(np.arange(1, size + 1)) for size in width]
        a = [rng.normal(size=(11, times, kept)) for _ in width]
        missed = rng.normal(size=(11, output))
        of = [torch.from_numpy(part).float() for part in (*z, *a, missed)]
        flows.append(Flow(tuple(of[:2]), tuple(of[2:4]), of[4], number >= 3))
        if number < 3:
            blocks = [
                np.einsum("ok,nmk,ni->nomki", weight, a_, z_).reshape(11 * output, -1)
                for a_, z_ in zip(a, z, strict=True)
            ]
            jacobians.append(blocks)
            targets.append(missed.reshape(-1))
    stacked = [np.concatenate([blocks[i] for blocks in jacobians]) for i in range(2)]
    return flows, weight, stacked, np.concatenate(targets)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_with_steps_enough_it_is_ridge_regression_on_the_whole_jacobian(seed, times):
    flows, weight, jacobians, target = problem(seed, times)
    tokens_ = 33
    scales = []
    for index in range(2):
        squares = np.mean([flow.slopes[index].double().square().mean(0).numpy() for flow in flows], axis=0)
        left = squares * weight.double().square().sum(0).numpy()
        right = np.mean([flow.inputs[index].double().square().mean(0).numpy() for flow in flows], axis=0)
        scales.append(np.sqrt(RIDGE * tokens_ * left[..., None] * right).reshape(-1))
    whole, ridge = np.concatenate(jacobians, axis=1), np.diag(np.concatenate(scales))
    rows = np.concatenate([whole, ridge])
    expected = np.linalg.lstsq(rows, np.concatenate([target, np.zeros(len(ridge))]), rcond=None)[0]
    found = fit_producers(flows, weight, 200)
    np.testing.assert_allclose(
        np.concatenate([part.numpy().reshape(-1) for part in found.rows]), expected, rtol=2e-3, atol=2e-4
    )


def test_it_stops_where_the_held_out_error_rises_and_hands_over_the_best():
    flows, weight, _, _ = problem(0, held_out=1)
    errors = [held_out_error(flows, weight, fit_producers(flows, weight, steps).rows) for steps in range(8)]
    found = fit_producers(flows, weight, 50)
    assert found.steps < 50
    assert held_out_error(flows, weight, found.rows) == pytest.approx(min(errors))
    assert errors == sorted(errors, reverse=True)


def held_out_error(flows: Sequence[Flow], weight: Tensor, change: Sequence[Tensor]) -> float:
    flow = flows[-1]
    moved = sum(
        (a * (z @ rows.flatten(0, 1).T).view(a.shape)).sum(1)
        for z, a, rows in zip(flow.inputs, flow.slopes, change, strict=True)
    )
    return float((flow.missed - moved @ weight.T).square().sum())


def test_silent_units_and_inputs_do_no_harm():
    flows, weight, _, _ = problem(0)
    for flow in flows:
        flow.slopes[0][:, :, 1] = 0
        flow.slopes[1].zero_()
        flow.inputs[0][:, 2] = 0
    found = fit_producers(flows, weight, 20)
    assert found.steps > 0
    assert all(torch.isfinite(rows).all() for rows in found.rows)
    assert not found.rows[0][:, 1].any()
    assert not found.rows[1].any()


def test_a_step_that_overflows_is_not_taken():
    flows, weight, _, _ = problem(0, held_out=1)
    flows[0].slopes[0][0, 0, 0] = torch.inf
    found = fit_producers(flows, weight, 20)
    assert found.steps == 0
    assert not any(rows.any() for rows in found.rows)


# In the sequential repair


def repair(
    model: PreTrainedModel, plan: Plan, ids: Tensor, steps: int, known: Sequence[Sequence[Fit]] = ()
) -> list[list[Fit]]:
    architecture = describe(model)
    run = SequentialRepair(model, architecture, plan, split_batches(Sequences(ids), 16), DAMPING, steps=steps)
    return [
        run.step(layer, new_parameters(known[layer]) if layer < len(known) else None)
        for layer in range(architecture.layers)
    ]


def text(number: int, seed: int) -> Tensor:
    return torch.randint(VOCAB, (number, 16), generator=torch.Generator().manual_seed(seed))


@every_model
def test_the_logits_of_other_text_come_nearer_than_by_fitting_consumers_alone(name):
    model = MODELS[name](0)
    plan, ids, others = two_thirds(describe(model)), text(160, 2), text(16, 3)
    dense = masked_logits(model, Plan.dense(describe(model)), others)
    fits, missed = {}, {}
    for steps in (0, 8):
        repaired = deepcopy(model)
        fits[steps] = [fit for layer in repair(repaired, plan, ids, steps) for fit in layer]
        missed[steps] = float((masked_logits(repaired, plan, others) - dense).norm())
        state = repaired.state_dict()
        assert all(torch.equal(state[key], value) for key, value in new_parameters(fits[steps]).items())
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
        tied = {"lm_head.weight", "embed_out.weight"}
        assert changed - tied == set(new_parameters(fits[steps])) - tied
    assert not any(fit.others for fit in fits[0])
    assert any(fit.others for fit in fits[8])
    assert all(fit.consumer.part == "mlp" for fit in fits[8] if fit.others)
    assert missed[8] < missed[0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_run_that_goes_on_with_known_layers_ends_as_one_without_a_break(name):
    whole, resumed = MODELS[name](0), MODELS[name](0)
    plan, ids = two_thirds(describe(whole)), text(160, 2)
    fits = repair(whole, plan, ids, 8)
    assert any(fit.others for layer in fits[:2] for fit in layer)
    repair(resumed, plan, ids, 8, known=fits[:2])
    for key, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[key], rtol=1e-3, atol=1e-5)


def test_nothing_is_fitted_to_text_of_which_none_is_held_out():
    fits = [
        fit
        for layer in repair(FAMILIES["llama"](0), two_thirds(describe(FAMILIES["llama"](0))), text(7, 2), 8)
        for fit in layer
    ]
    assert fits
    assert not any(fit.others for fit in fits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointed_blocks_give_the_same(name):
    plain, checkpointed = MODELS[name](0), MODELS[name](0)
    plan, ids = two_thirds(describe(plain)), text(160, 2)
    recompute_layers(checkpointed, describe(plain))
    fits = [[fit for layer in repair(model, plan, ids, 8) for fit in layer] for model in (plain, checkpointed)]
    assert any(fit.others for fit in fits[0])
    for key, value in new_parameters(fits[0]).items():
        torch.testing.assert_close(new_parameters(fits[1])[key], value)


def test_an_activation_may_write_into_what_it_gets():
    model, other = MODELS["gpt2"](0), MODELS["gpt2"](0)
    for block, own in zip(model.transformer.h, other.transformer.h, strict=True):
        block.mlp.act, own.mlp.act = torch.nn.ReLU(inplace=True), torch.nn.ReLU()
    plan, ids = two_thirds(describe(model)), text(160, 2)
    one, two = ([fit for layer in repair(m, plan, ids, 8) for fit in layer] for m in (model, other))
    assert any(fit.others for fit in one)
    assert all(torch.equal(value, new_parameters(two)[key]) for key, value in new_parameters(one).items())


def test_where_nothing_is_won_on_held_out_text_the_producers_stay():
    """With so few tokens that every change fits noise."""
    model = FAMILIES["llama"](0)
    plan, before = two_thirds(describe(model)), deepcopy(model.state_dict())
    fits = [fit for layer in repair(model, plan, text(8, 2)[:, :3], 8) for fit in layer]
    kept = {fit.consumer.weight for fit in fits} | {name for fit in fits for name in fit.others}
    assert any(not fit.others for fit in fits if fit.consumer.part == "mlp")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key not in kept)
