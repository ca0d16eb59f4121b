"""Sequential repair, against whole forward passes of both models and least squares for one consumer after another."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture, Map
from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import input_mask, masked, oriented
from libprune.models.sequences import Sequences
from libprune.repair.least_squares import Fit, Inputs, new_parameters, pruned_consumers, repair_local
from libprune.repair.sequential import SequentialRepair, behind_what_is_gone
from libprune.repair.streams import split_batches
from tests.support.collected import activations, assert_untouched, of_layers
from tests.support.models import FAMILIES, LAYOUTS, MAMBA, VOCAB, plan_of, random_plan, tokens
from tests.support.passes import forward, in_order
from tests.support.predictions import masked_logits

MODELS = {name: FAMILIES[name] for name in LAYOUTS}
RECURRENT = {"qwen3_5": FAMILIES["qwen3_5"], "mamba": MAMBA}
POST_NORM = {"gemma2", "gemma3", "gemma4_text", "olmo2", "olmo3", "glm4", "exaone4"}
"""Families with a norm between what a consumer gives and the residual stream."""
DAMPING = 1e-2

every_model = pytest.mark.parametrize("name", MODELS)
two_models = pytest.mark.parametrize("name", ["llama", "gpt2"])


def a_third(architecture: Architecture) -> Plan:
    """About a third of every part is removed."""
    return plan_of(architecture, lambda layer, part: -(-2 * architecture.units(part) // 3))


def repair(
    model: PreTrainedModel,
    plan: Plan,
    ids: Tensor,
    damping: float | None = DAMPING,
    drift: float | None = None,
    at_once: int = 4,
    known: Sequence[Sequence[Fit]] = (),
    cap: float | None = None,
) -> list[list[Fit]]:
    """The fits of every layer, with the first layers' known; the model gets the new weights."""
    architecture = describe(model)
    run = SequentialRepair(model, architecture, plan, split_batches(Sequences(ids), at_once), damping, drift, cap)
    return [
        run.step(layer, new_parameters(known[layer]) if layer < len(known) else None)
        for layer in range(architecture.layers)
    ]


def weights_of(fits: Sequence[Sequence[Fit]]) -> dict[str, Tensor]:
    return new_parameters([fit for layer in fits for fit in layer])


def assert_weights_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-3) -> None:
    """Relative to the largest weight."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        atol = rtol * float(weight.abs().max())
        torch.testing.assert_close(found[name].double(), weight.double(), rtol=rtol, atol=atol, msg=name)


# The slow way


def slow_repair(
    model: PreTrainedModel,
    plan: Plan,
    ids: Tensor,
    damping: float,
    drift: float,
    cap: float = np.inf,
) -> tuple[dict[str, Tensor], PreTrainedModel]:
    """The new weights by name, and the repaired model: two whole passes for each consumer, in float64."""
    architecture, factor = describe(model), getattr(model.config, "residual_multiplier", 1.0)
    dense, repaired = deepcopy(model).double(), deepcopy(model).double()
    found = {}
    truth = forward(dense, architecture, ids)
    whole = {block: plan.gone(*block) for block in architecture.blocks()}
    for layer in range(architecture.layers):
        block, before = f"{architecture.layers_path}.{layer}", []
        for consumer in in_order(architecture, layer):
            kept = input_mask(architecture, plan, consumer)
            behind = any(gone and at[0] < layer for at, gone in whole.items()) or whole.get((layer, "attention"))
            if kept.any() and (behind or not kept.all()):
                with masked(repaired, architecture, plan):
                    now = forward(repaired, architecture, ids)
                h = truth.states[block] + factor * sum(truth.outputs[name] for name in before)
                h_pruned = now.states[block] + factor * sum(now.outputs[name] for name in before)
                module = repaired.get_submodule(consumer.module)
                bias = 0 if getattr(module, "bias", None) is None else module.bias.detach()
                y = truth.outputs[consumer.module] - bias + drift / factor * cut(h - h_pruned, cap)
                x = now.inputs[consumer.module].flatten(0, 1).numpy()[:, kept]
                weight = module.weight.detach().T if consumer.transposed else module.weight.detach()
                new = np.zeros(tuple(weight.shape))
                new[:, kept] = ridge(x, y.flatten(0, 1).numpy(), weight.numpy()[:, kept], damping)
                stored = torch.from_numpy(new.T.copy() if consumer.transposed else new)
                module.weight.data = found[consumer.weight] = stored
            before.append(consumer.module)
    return found, repaired


def cut(drift: Tensor, cap: float) -> Tensor:
    """No token's drift longer than so many medians of its sequence, one token after the other."""
    drift = drift.clone()
    for sequence in drift:
        lengths = sequence.norm(dim=-1)
        limit = cap * sorted(lengths.tolist())[(len(lengths) - 1) // 2]
        for token in range(len(lengths)):
            if lengths[token] > limit:
                sequence[token] *= limit / lengths[token]
    return drift


def ridge(x: np.ndarray, y: np.ndarray, old: np.ndarray, damping: float) -> np.ndarray:
    """W' from rows for the tokens, and rows sqrt(lambda sum_t x_tj^2) (W' - W_K) = 0 for the ridge."""
    size = (damping * np.square(x).sum(0)) ** 0.5
    rows = np.concatenate([x, np.diag(size)])
    return np.linalg.lstsq(rows, np.concatenate([y, size[:, None] * old.T]), rcond=None)[0].T


@pytest.mark.parametrize(
    ("name", "drift"),
    [*((name, None) for name in (*MODELS, "granite", "gemma4_text", *RECURRENT)), ("qwen3", 0.0), ("gpt2", 0.5)],
)
def test_every_consumer_is_fitted_to_the_dense_output_and_the_drift_from_the_pruned_inputs(name, drift):
    model, ids = (FAMILIES | RECURRENT)[name](0), tokens(18, 12)
    plan = a_third(describe(model))
    all_of_it = 0.0 if name in POST_NORM else 1.0
    expected, _ = slow_repair(model, plan, ids, DAMPING, all_of_it if drift is None else drift)
    fits = repair(model, plan, ids, DAMPING, drift)
    assert_weights_close(weights_of(fits), expected)
    for parameter, weight in weights_of(fits).items():
        assert torch.equal(model.get_parameter(parameter), weight)


@two_models
@pytest.mark.parametrize("cap", [0.5, 1.1])
def test_no_token_drifts_further_than_so_many_medians_of_its_sequence(name, cap):
    model, ids = MODELS[name](0), tokens(18, 12)
    plan = a_third(describe(model))
    expected, _ = slow_repair(model, plan, ids, DAMPING, 1.0, cap)
    uncut, _ = slow_repair(model, plan, ids, DAMPING, 1.0)
    found = weights_of(repair(model, plan, ids, at_once=5, cap=cap))
    assert_weights_close(found, expected)
    assert any(not torch.allclose(expected[key], uncut[key], rtol=1e-2) for key in uncut)


@two_models
@pytest.mark.parametrize("gone", [None, 1, 3])
def test_parts_and_layers_that_are_gone_are_passed_over_and_their_loss_is_taken_into_account(name, gone):
    """Behind a whole layer or part every consumer takes it back; behind the last layer there is none."""
    model, ids = MODELS[name](0), tokens(18, 12)
    architecture = describe(model)
    plan = plan_of(architecture, lambda layer, part: 0 if layer == gone else architecture.units(part))
    plan = random_plan(architecture, "holes", seed=2) if gone is None else plan
    expected, _ = slow_repair(model, plan, ids, DAMPING, 1.0)
    assert (gone == 3) is (not expected)
    assert_weights_close(weights_of(repair(model, plan, ids)), expected)


@two_models
def test_the_errors_are_those_of_the_inputs_and_the_target(name):
    """Of the last consumer, whose fit sees all repairs before it."""
    model, ids = MODELS[name](0), tokens(18, 12)
    architecture = describe(model)
    plan = a_third(architecture)
    dense = deepcopy(model).double()
    *_, (fit,) = [fits[-1:] for fits in repair(model, plan, ids)]
    consumer, model = fit.consumer, model.double()
    others = [entry.module for entry in in_order(architecture, consumer.layer)[:-1]]
    block = f"{architecture.layers_path}.{consumer.layer}"
    kept, held = torch.from_numpy(input_mask(architecture, plan, consumer)), torch.arange(18) % 8 == 7
    old = oriented(consumer, dense.get_parameter(consumer.weight).detach())[:, kept]
    truth = forward(dense, architecture, ids)
    with masked(model, architecture, plan):
        now = forward(model, architecture, ids)
    h, h_pruned = (seen.states[block] + sum(seen.outputs[other] for other in others) for seen in (truth, now))
    bias = getattr(dense.get_submodule(consumer.module), "bias", None)
    y = truth.outputs[consumer.module] - (0 if bias is None else bias.detach()) + h - h_pruned
    x = now.inputs[consumer.module][..., kept]
    new = torch.from_numpy(ridge(x[~held].flatten(0, 1).numpy(), y[~held].flatten(0, 1).numpy(), old.numpy(), DAMPING))
    for rows, before, after in ((~held, fit.before, fit.after), (held, fit.held_out_before, fit.held_out_after)):
        for weight, found in ((old, before), (new, after)):
            lost = (y[rows] - x[rows] @ weight.T).square().sum() / y[rows].square().sum()
            assert found == pytest.approx(float(lost), rel=1e-3)


# What it is for


def with_weights(model: PreTrainedModel, new: dict[str, Tensor]) -> PreTrainedModel:
    other = deepcopy(model)
    with torch.no_grad():
        for name, weight in new.items():
            other.get_parameter(name).copy_(weight)
    return other


def local_fits(model: PreTrainedModel, plan: Plan, ids: Tensor, damping: float) -> list[Fit]:
    found = of_layers(activations(model, 8, ids))

    def inputs_of(consumer: Map) -> Inputs:
        return Inputs(found[f"{consumer.module}.input_gram"])

    return repair_local(describe(model), plan, model.state_dict().__getitem__, inputs_of, damping)


@every_model
def test_the_logits_of_other_text_come_nearer_than_without_repair_and_than_after_a_local_one(name):
    model = MODELS[name](0)
    plan = a_third(describe(model))
    ids, others = (
        torch.randint(VOCAB, (number, 16), generator=torch.Generator().manual_seed(seed))
        for seed, number in ((2, 96), (3, 16))
    )
    dense = masked_logits(model, Plan.dense(describe(model)), others)
    local = with_weights(model, new_parameters(local_fits(model, plan, ids, DAMPING)))
    repaired = deepcopy(model)
    repair(repaired, plan, ids, at_once=16)
    none, one, whole = (float((masked_logits(m, plan, others) - dense).norm()) for m in (model, local, repaired))
    assert whole < none
    assert whole < one


# What changes nothing


@two_models
def test_the_batch_size_changes_nothing(name):
    one, two = (
        [*repair(MODELS[name](0), a_third(describe(MODELS[name](0))), tokens(18, 12), at_once=size)] for size in (1, 7)
    )
    assert_weights_close(weights_of(one), weights_of(two))
    for first, second in zip(chain(*one), chain(*two), strict=True):
        for number in ("damping", "before", "after", "held_out_before", "held_out_after"):
            assert getattr(first, number) == pytest.approx(getattr(second, number), rel=1e-3)


@two_models
def test_the_first_consumer_is_repaired_as_the_local_repair_does(name):
    """Nothing has drifted yet; with fewer than eight sequences both see all tokens."""
    model, ids = MODELS[name](0), tokens(7, 24)
    plan = a_third(describe(model))
    local = local_fits(model, plan, ids, DAMPING)[0]
    for drift in (0.0, 1.0):
        first = repair(deepcopy(model), plan, ids, DAMPING, drift)[0][0]
        assert first.consumer == local.consumer
        assert_weights_close(new_parameters([first]), new_parameters([local]))
        assert (first.before, first.after) == pytest.approx((local.before, local.after), rel=1e-3)
        assert np.isnan(first.held_out_after)


@two_models
def test_a_plan_that_keeps_everything_changes_no_weight_and_gives_no_fit(name):
    model = MODELS[name](0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert repair(model, Plan.dense(describe(model)), tokens(9, 12)) == [[]] * 4
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@two_models
@pytest.mark.parametrize("done", [1, 3])
def test_a_run_that_goes_on_with_known_layers_ends_as_one_without_a_break(name, done):
    plan, ids = random_plan(describe(MODELS[name](0)), "holes", seed=2), tokens(18, 12)
    whole, resumed = MODELS[name](0), MODELS[name](0)
    fits = repair(whole, plan, ids)
    later = repair(resumed, plan, ids, known=fits[:done])
    assert later[:done] == [[]] * done
    assert_weights_close(weights_of(later), weights_of(fits[done:]))
    assert_weights_close(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "granite"])
def test_known_layers_give_the_same_bits_where_parts_are_parallel_or_outputs_multiplied_too(name, dtype):
    plan, ids = random_plan(describe(FAMILIES[name](0)), "per_layer", seed=2), tokens(18, 12)
    whole, resumed = FAMILIES[name](0).to(dtype), FAMILIES[name](0).to(dtype)
    fits = repair(whole, plan, ids)
    repair(resumed, plan, ids, known=fits[:2])
    assert all(torch.equal(tensor, whole.state_dict()[key]) for key, tensor in resumed.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_consumers_behind_what_is_gone_begin_with_the_first_part_that_is(name):
    architecture = describe(FAMILIES[name](0))
    assert behind_what_is_gone(architecture, Plan.dense(architecture)) == set()
    plan = Plan.dense(architecture)
    gone = next(block for block in architecture.blocks() if block[0] == 1)
    plan.keep[gone][:] = False
    expected = {
        consumer.module
        for layer in range(1, architecture.layers)
        for part in architecture.parts_of(layer)
        for consumer in architecture.consumers(layer, part)
    }
    assert behind_what_is_gone(architecture, plan) == expected


def test_only_pruned_consumers_change_and_only_where_inputs_stay():
    model = FAMILIES["llama"](0)
    architecture = describe(model)
    plan = random_plan(architecture, "holes", seed=2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fits = list(chain(*repair(model, plan, tokens(18, 12))))
    kept = {consumer.weight: kept for consumer, kept in pruned_consumers(architecture, plan)}
    assert [fit.consumer.weight for fit in fits] == list(kept)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]) is (key not in kept)
    for fit in fits:
        assert fit.weight[:, kept[fit.consumer.weight]].any(0).all()
        assert not fit.weight[:, ~kept[fit.consumer.weight]].any()


def test_auto_chooses_a_damping_for_every_consumer_by_its_own_held_out_error():
    architecture = describe(FAMILIES["llama"](0))

    def first_fit(damping: float | None, sequences: int = 18) -> Fit:
        batches = split_batches(Sequences(tokens(sequences, 12)), 4)
        return SequentialRepair(FAMILIES["llama"](0), architecture, a_third(architecture), batches, damping).step(0)[0]

    auto = first_fit(None)
    best = min(map(first_fit, (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)), key=lambda fit: fit.held_out_after)
    assert (auto.damping, auto.held_out_after) == (best.damping, pytest.approx(best.held_out_after))
    with pytest.raises(LibpruneError, match=r"slice\.damping: auto chooses by every eighth calibration sequence"):
        first_fit(None, sequences=7)


# Blocks that do more than add


def test_drift_is_refused_where_a_block_does_more_than_add_the_outputs():
    model = FAMILIES["gemma2"](0)
    message = r"slice\.drift takes back .* model\.layers\.0 does more with the outputs of .*; set slice\.drift to auto"
    with pytest.raises(LibpruneError, match=message):
        repair(model, a_third(describe(model)), tokens(9, 12), drift=1.0)
    assert all(map(torch.equal, model.parameters(), FAMILIES["gemma2"](0).parameters()))
    assert_untouched(model)


def with_large_states(name: str) -> PreTrainedModel:
    """In bfloat16, with states so large that the rounding of their norm hides what a block adds to them."""
    model = FAMILIES[name](0)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(100)
    return model.to(torch.bfloat16)


def test_a_norm_behind_the_consumers_is_seen_beside_large_states_too():
    model = with_large_states("gemma2")
    with pytest.raises(LibpruneError, match="does more with the outputs"):
        repair(model, a_third(describe(model)), tokens(9, 12), drift=1.0)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - POST_NORM))
def test_rounding_is_not_taken_for_more_than_an_addition(name):
    model = with_large_states(name)
    repair(model, a_third(describe(model)), tokens(9, 12), drift=1.0)


@pytest.mark.parametrize("drift", [0.0, None])
def test_without_drift_a_block_may_do_what_it_likes(drift):
    model, ids = FAMILIES["gemma2"](0), tokens(18, 12)
    plan = a_third(describe(model))
    expected, _ = slow_repair(model, plan, ids, DAMPING, 0.0)
    assert_weights_close(weights_of(repair(model, plan, ids, DAMPING, drift)), expected)


@two_models
def test_nothing_stays_on_the_model(name):
    model = MODELS[name](0)
    forwards = {module: vars(module).get("forward") for module in model.modules()}
    repair(model, random_plan(describe(model), "holes", seed=2), tokens(9, 12))
    assert_untouched(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {module: vars(module).get("forward") for module in model.modules()} == forwards
