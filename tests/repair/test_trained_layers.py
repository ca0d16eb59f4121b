"""Training the layers of a pruned model, against whole passes and the repair that it begins with."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from libprune.collection.stream import read_stream
from libprune.collection.stream_axes import Narrowed, choose_kind, turn_model
from libprune.engine.describe import describe, stored_tensors
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.stacks import exposed
from libprune.engine.surgery import masked
from libprune.models.layers import first_output, set_parameters
from libprune.models.memory import recompute_layers
from libprune.models.sequences import Sequences
from libprune.repair.blocks import Epochs
from libprune.repair.least_squares import Fit, new_parameters
from libprune.repair.sequential import SequentialRepair
from libprune.repair.streams import split_batches
from libprune.repair.trained_layers import Training
from tests.support.models import FAMILIES, LAYOUTS, MIXTURES, VOCAB, plan_of, tokens
from tests.support.predictions import masked_logits
from tests.support.widths import made_axes, width_of

MODELS = {name: FAMILIES[name] for name in LAYOUTS}
FEW = Epochs(2, 1e-3)


def two_thirds(name: str) -> Plan:
    architecture = describe(FAMILIES[name](0))
    return plan_of(architecture, lambda layer, part: -(-2 * architecture.units(part) // 3))


def repair(
    model: nn.Module,
    plan: Plan,
    ids: Tensor,
    epochs: Epochs | None = FEW,
    known: Sequence[Sequence[Fit]] = (),
    given: Sequence[Fit] = (),
) -> list[list[Fit]]:
    """Repair a model layer by layer; with given fits, each layer looks ahead at the next one."""
    run = begin(model, plan, ids, epochs, given, look_ahead=bool(given))
    return [
        run.step(layer, new_parameters(known[layer]) if layer < len(known) else None)
        for layer in range(describe(model).layers)
    ]


def begin(
    model: nn.Module,
    plan: Plan,
    ids: Tensor,
    epochs: Epochs | None,
    given: Sequence[Fit],
    look_ahead: bool,
    narrow: Narrowed | None = None,
) -> SequentialRepair:
    """A repair before the first layer."""
    architecture = describe(model)
    exposed(model, architecture)
    fits, batches = {fit.consumer.module: fit for fit in given}, split_batches(Sequences(ids), 8)
    training = None if epochs is None else Training(epochs, look_ahead, fits)
    return SequentialRepair(model, architecture, plan, batches, 1e-2, narrow=narrow, training=training)


def text(number: int, seed: int) -> Tensor:
    return torch.randint(VOCAB, (number, 16), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_other_text_come_nearer_than_by_least_squares_alone(name):
    model, plan = FAMILIES[name](0), two_thirds(name)
    others = text(16, 3)
    dense = masked_logits(model, Plan.dense(describe(model)), others)
    given = [fit for layer in repair(deepcopy(model), plan, text(64, 4), None) for fit in layer]
    missed = []
    for epochs, ahead in ((None, False), (Epochs(2, 3e-3), False), (Epochs(2, 3e-3), True)):
        repaired = deepcopy(model)
        fits = [fit for layer in repair(repaired, plan, text(64, 2), epochs, given=given * ahead) for fit in layer]
        missed.append(float((masked_logits(repaired, plan, others) - dense).norm()))
        state, new = repaired.state_dict(), new_parameters(fits)
        for key, value in new.items():
            torch.testing.assert_close(state[key], value)
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, state[key])}
        tied = {"lm_head.weight", "embed_out.weight"}
        assert changed - tied == set(new) - tied
        assert all(fit.layer_after <= fit.layer_before for fit in fits) is (epochs is not None)
    assert max(missed[1:]) < missed[0]


@pytest.mark.parametrize("name", ["llama", *MIXTURES[:1]])
def test_with_a_look_ahead_a_layer_is_judged_by_the_stream_behind_the_next_one_too(name):
    """Against whole passes of the model, in which both layers have their given fits; the next layer stays dense."""
    model, plan, ids = FAMILIES[name](0), two_thirds(name), text(16, 2)
    given = [fit for layer in repair(deepcopy(model), plan, ids, None) for fit in layer]
    fitted = deepcopy(model)
    architecture = describe(model)
    exposed(fitted, architecture)
    set_parameters(fitted, new_parameters(given))
    dense = [streams[7::8] for streams in streams_of(model, ids)]
    with masked(fitted, architecture, plan):
        pruned = [streams[7::8] for streams in streams_of(fitted, ids)]
    wanted, missed = torch.cat(dense, -1), torch.cat(pruned, -1) - torch.cat(dense, -1)
    lengths = torch.cat(streams_of(model, ids), -1).norm(dim=-1).flatten()
    weight = (lengths.median() / wanted.norm(dim=-1, keepdim=True)).clamp(max=1)
    share = ((weight * missed).square().sum() / (weight * wanted).square().sum()).item()

    run = begin(model, plan, ids, FEW, given, look_ahead=True)
    behind = f"{architecture.layers_path}.1."
    before = {key: value.clone() for key, value in model.state_dict().items() if key.startswith(behind)}
    (first, *_) = run.step(0)
    assert first.layer_before == pytest.approx(share, rel=1e-3)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def streams_of(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """The residual stream behind the first layer and behind the second one."""
    streams: list[Tensor] = []
    layers = model.get_submodule(describe(model).layers_path)
    handles = [
        layers[number].register_forward_hook(lambda module, args, output: streams.append(first_output(output)))
        for number in range(2)
    ]
    with torch.no_grad():
        model.base_model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return streams


@pytest.mark.parametrize("name", MIXTURES[:2])
def test_what_chooses_experts_stays(name):
    model = FAMILIES[name](0)
    architecture = describe(model)
    plan = plan_of(architecture, lambda layer, part: -(-2 * architecture.units(part) // 3))
    before = deepcopy(model.state_dict())
    fits = [fit for layer in repair(model, plan, text(16, 2)) for fit in layer]
    assert any(fit.layer_after < fit.layer_before for fit in fits)
    routers = {shape.router for shape in architecture.parts.values() if shape.router}
    chosen = [name for name in before if any(f".{router}." in name for router in routers)]
    assert chosen
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in chosen)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_run_that_goes_on_with_known_layers_ends_as_one_without_a_break(name):
    whole, resumed, plan = FAMILIES[name](0), FAMILIES[name](0), two_thirds(name)
    fits = repair(whole, plan, text(24, 2))
    repair(resumed, plan, text(24, 2), known=fits[:2])
    for key, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointed_layers_give_the_same(name):
    plain, checkpointed, plan = FAMILIES[name](0), FAMILIES[name](0), two_thirds(name)
    recompute_layers(checkpointed, describe(plain))
    one, other = (
        [fit for layer in repair(model, plan, text(24, 2)) for fit in layer] for model in (plain, checkpointed)
    )
    for key, value in new_parameters(one).items():
        torch.testing.assert_close(new_parameters(other)[key], value)


def test_no_fit_sees_the_sequences_that_judge():
    one, plan = text(16, 2), two_thirds("llama")
    other = one.clone()
    other[7::8] = text(2, 5)
    fits = [repair(FAMILIES["llama"](0), plan, ids, Epochs(1, 1e-9))[0] for ids in (one, other)]
    assert fits[0][0].layer_before != fits[1][0].layer_before
    for first, second in zip(*fits, strict=True):
        torch.testing.assert_close(first.weight, second.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epochs", [None, FEW])
def test_the_next_layer_is_run_only_where_a_layer_is_trained(epochs):
    model, runs = FAMILIES["llama"](0), []
    architecture = describe(model)
    plan = plan_of(architecture, lambda layer, part: architecture.units(part) - (layer != 1))
    run = begin(model, plan, text(16, 2), epochs, (), look_ahead=True)
    handle = model.get_submodule(f"{architecture.layers_path}.1").register_forward_hook(lambda *_: runs.append(1))
    run.step(0)
    handle.remove()
    assert bool(runs) == (epochs is not None)


def test_with_a_narrower_stream_the_next_layer_is_not_run_even_if_it_is_gone():
    """It would get a stream of another width than the one that it reads."""
    model, runs = FAMILIES["llama"](0), []
    architecture, dense = describe(model), {name: p.detach().clone() for name, p in stored_tensors(model).items()}
    exposed(model, architecture)
    width = width_of(architecture)
    axes = made_axes(model, architecture, choose_kind("auto", read_stream(model, architecture)))
    turn_model(model, architecture, axes)
    plan = replace(plan_of(architecture, lambda layer, part: architecture.units(part) * (layer != 1)), width=width)
    narrow = Narrowed(dense, architecture, axes, width, repair=True)
    run = begin(model, plan, text(16, 2), FEW, (), look_ahead=True, narrow=narrow)
    handle = model.get_submodule(f"{architecture.layers_path}.1").register_forward_hook(lambda *_: runs.append(1))
    assert run.step(0)
    handle.remove()
    assert not runs


def test_text_of_which_nothing_is_held_out_is_refused():
    with pytest.raises(LibpruneError, match="block judges by every eighth sequence, and there are fewer than 8"):
        repair(FAMILIES["llama"](0), two_thirds("llama"), tokens(7, 12))


def test_nothing_stays_on_the_model():
    model = FAMILIES["llama"](0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    repair(model, two_thirds("llama"), text(16, 2))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
