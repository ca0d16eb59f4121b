"""Losses from kept states, against the full passes that they stand for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.collection.calibration import set_up
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.models.compute import sequence_losses
from libprune.models.memory import recompute_layers
from libprune.models.sequences import Sequences
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import load_params
from libprune.statistics import losses as prefix_module
from libprune.statistics.losses import Prefix, SequenceLosses, first_changed, measuring
from tests.support import measured
from tests.support.measured import USED, interrupt, run_stage, write_project
from tests.support.models import FAMILIES, KINDS, PLANS, random_plan, tiny_exposed, tokens
from tests.support.shapes import plan_without

SEQUENCES = 5
IDS = tokens(SEQUENCES, 9)


def asked(model: PreTrainedModel, ids: Tensor) -> Sequences:
    """The ids with what the model's loss counts; masked tokens are taken for any others."""
    labelled = model.get_output_embeddings() is None
    return Sequences(ids, torch.zeros(len(ids), dtype=torch.long) if labelled else None)


def full(model: PreTrainedModel, at_once: int, ids: Tensor = IDS) -> Tensor:
    """Losses of the model as it is, all layers run, in the same passes."""
    with torch.no_grad():
        return torch.cat([sequence_losses(model, asked(model, some)) for some in ids.split(at_once)]).double()


def full_masked(model: PreTrainedModel, architecture: Architecture, plan: Plan, at_once: int) -> Tensor:
    with masked(model, architecture, plan):
        return full(model, at_once)


def run_layers(model: PreTrainedModel) -> list[int]:
    """Appends the number of every layer whose MLP runs."""
    ran: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    return ran


def inventory(model: nn.Module) -> list[object]:
    """Every module by identity, what it holds itself, and its hooks."""
    return [
        (name, id(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> PreTrainedModel:
    return tiny_exposed(request.param)


@pytest.fixture(scope="module")
def architecture(model) -> Architecture:
    return describe(model)


def test_losses_from_the_prefix_are_bit_equal_to_those_of_the_full_masked_model(model, architecture):
    assert_measured_as_the_full_masked_model(model, architecture, 2)


@pytest.mark.parametrize("at_once", [1, SEQUENCES])
def test_so_they_are_of_one_sequence_at_once_and_of_all(at_once):
    """How a family builds its layers has no part in how sequences are shared out."""
    model = FAMILIES["qwen3"](0)
    assert_measured_as_the_full_masked_model(model, describe(model), at_once)


def assert_measured_as_the_full_masked_model(model: PreTrainedModel, architecture: Architecture, at_once: int) -> None:
    prefix = Prefix(model, architecture, asked(model, IDS), at_once, range(architecture.layers))
    assert prefix.losses.dtype == torch.float64
    assert torch.equal(prefix.losses, full(model, at_once))
    for layer, part in architecture.blocks():
        plan = plan_without(architecture, layer, part, 1)
        found = prefix.losses_of(plan)
        assert torch.equal(found, full_masked(model, architecture, plan, at_once))
        assert not torch.equal(found, prefix.losses)


@pytest.mark.parametrize("kind", PLANS)
def test_any_plan_can_be_measured(model, architecture, kind):
    prefix = Prefix(model, architecture, asked(model, IDS), 2, range(architecture.layers))
    plan = random_plan(architecture, kind, seed=1)
    assert torch.equal(prefix.losses_of(plan), full_masked(model, architecture, plan, 2))


def test_the_same_states_serve_again(model, architecture):
    """A measurement does not change the states that were kept."""
    prefix = Prefix(model, architecture, asked(model, IDS), 2, [2])
    plan = plan_without(architecture, 2, "mlp", 0)
    assert torch.equal(prefix.losses_of(plan), prefix.losses_of(plan))
    assert torch.equal(prefix.losses_from(2), prefix.losses)


def test_only_layers_from_the_nearest_kept_layer_are_run():
    model = FAMILIES["llama"](0)
    architecture = describe(model)
    prefix = Prefix(model, architecture, asked(model, IDS), SEQUENCES, [0, 2])
    ran = run_layers(model)
    for layer, expected in enumerate([[0, 1, 2, 3], [0, 1, 2, 3], [2, 3], [2, 3]]):
        ran.clear()
        prefix.losses_from(layer)
        assert ran == expected


def test_the_plan_that_keeps_all_runs_nothing():
    model = FAMILIES["llama"](0)
    architecture = describe(model)
    prefix = Prefix(model, architecture, asked(model, IDS), SEQUENCES, [1])
    ran = run_layers(model)
    assert torch.equal(prefix.losses_of(Plan.dense(architecture)), prefix.losses)
    assert ran == []


def test_the_first_changed_layer_is_the_lowest():
    architecture = describe(FAMILIES["llama"](0))
    assert first_changed(Plan.dense(architecture)) is None
    assert first_changed(plan_without(architecture, 3, "mlp", 2)) == 3
    plan = plan_without(architecture, 2, "attention", 0)
    keep = dict(plan.keep) | {(1, "mlp"): np.zeros(13, dtype=bool)}
    assert first_changed(Plan(keep)) == 1


def test_a_model_masked_beforehand_keeps_its_own_states():
    """Steps on the way to a pruned model: what is gone already, then one unit more."""
    model = FAMILIES["qwen3"](0)
    architecture = describe(model)
    before, more = plan_without(architecture, 0, "mlp", 3), plan_without(architecture, 2, "attention", 1)
    both = Plan(dict(before.keep) | {(2, "attention"): more.keep[2, "attention"]})
    with masked(model, architecture, before):
        found = Prefix(model, architecture, asked(model, IDS), 2, [2]).losses_of(more)
    assert torch.equal(found, full_masked(model, architecture, both, 2))


class InPlace(nn.Module):
    """A layer that returns a tuple and writes into what it was given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **kwargs):
        out = self.layer(hidden_states, **kwargs)
        hidden_states.zero_()
        return out, None


class Unpacked(nn.Module):
    """Takes the first of a tuple, as older models' loops do, and writes into it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **kwargs):
        assert isinstance(hidden_states, tuple)
        assert hidden_states[1] is None
        return self.layer(hidden_states[0].mul_(2), **kwargs)


@pytest.mark.parametrize("start", [1, 2, 3])
def test_layers_may_return_tuples_and_write_in_place(start):
    model = FAMILIES["llama"](0)
    architecture = describe(model)
    layers = model.model.layers
    for number in (0, 2):
        layers[number], layers[number + 1] = InPlace(layers[number]), Unpacked(layers[number + 1])
    prefix = Prefix(model, architecture, asked(model, IDS), 2, [start])
    assert torch.equal(prefix.losses, full(model, 2))
    for _ in range(2):
        assert torch.equal(prefix.losses_from(start), prefix.losses)


def test_the_model_is_as_it_was():
    model = FAMILIES["llama"](0)
    architecture = describe(model)
    before = inventory(model)
    prefix = Prefix(model, architecture, asked(model, IDS), 2, [1, 3])
    prefix.losses_of(plan_without(architecture, 3, "attention", 1))
    assert inventory(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_model_is_as_it_was_after_an_error(monkeypatch):
    model = FAMILIES["llama"](0)
    architecture = describe(model)
    before = inventory(model)
    prefix = Prefix(model, architecture, asked(model, IDS), 2, [3])
    losses = full(model, 2)

    def fail(*_):
        assert inventory(model) != before
        raise KeyError

    monkeypatch.setattr(prefix_module, "sequence_losses", fail)
    with pytest.raises(KeyError):
        prefix.losses_of(plan_without(architecture, 3, "mlp", 1))
    with pytest.raises(KeyError):
        Prefix(model, architecture, asked(model, IDS), 2, [3])
    assert inventory(model) == before
    assert torch.equal(full(model, 2), losses)


def test_a_forward_function_of_a_layers_own_comes_back():
    """Blocks that are checkpointed have one."""
    model = FAMILIES["llama"](0)
    architecture = describe(model)
    recompute_layers(model, architecture)
    own = [vars(layer)["forward"] for layer in model.model.layers]
    prefix = Prefix(model, architecture, asked(model, IDS), 2, [2])
    plan = plan_without(architecture, 2, "mlp", 1)
    assert torch.equal(prefix.losses_of(plan), full_masked(model, architecture, plan, 2))
    assert [vars(layer)["forward"] for layer in model.model.layers] == own


def test_states_are_kept_in_the_models_dtype_for_the_chosen_layers_alone():
    model = FAMILIES["llama"](0).bfloat16()
    architecture = describe(model)
    prefix = Prefix(model, architecture, asked(model, IDS), 2, [0, 1, 3])
    assert {layer: len(outputs) for layer, outputs in prefix._kept.items()} == {1: 3, 3: 3}
    width = architecture.sizes["model"]
    kept = [output for outputs in prefix._kept.values() for output in outputs]
    assert sum(output.nbytes for output in kept) == 2 * SEQUENCES * 9 * width * 2
    plan = plan_without(architecture, 3, "mlp", 1)
    assert torch.equal(prefix.losses_of(plan), full_masked(model, architecture, plan, 2))


def test_rows_of_several_processes_join():
    statistic = SequenceLosses(3, 2)
    losses = torch.arange(6, dtype=torch.float64).view(3, 2)
    one, two = statistic.init(), statistic.init()
    for number in range(3):
        statistic.update(two if number == 1 else one, losses[number], torch.tensor(number))
    statistic.merge(one, two)
    assert torch.equal(statistic.finish(one)[""], losses)
    assert statistic.measure(losses[1], torch.tensor(1))["rows"].tolist() == [[0, 0], [2, 3], [0, 0]]


# Measuring, and the stage around it


@pytest.fixture
def llama(tmp_path) -> Path:
    return write_project(FAMILIES["llama"](0), tmp_path)


def test_any_plans_are_measured_on_the_last_sequences_and_no_saved_losses_are_left(llama, monkeypatch):
    """They are kept until the context ends, so that a kill while the result is written loses none."""
    monkeypatch.setenv("LIBPRUNE_CHECKPOINT_SECONDS", "0")
    layout = Layout(llama / "artifacts")
    run = set_up(layout, load_params(llama / "params.yaml").compute, USED, last=True)
    plans = {kind: random_plan(run.architecture, kind, seed=1) for kind in PLANS}
    with measuring(run, "trial", layout.root / "trial", plans, {}) as losses:
        assert list((run.work / "trial").glob("*"))
    assert not list((run.work / "trial").glob("*"))
    ids = tokens(measured.SEQUENCES, measured.LENGTH)[-USED:]
    assert np.array_equal(losses.dense, full(run.model, run.at_once, ids).numpy())
    assert losses.changed.shape == (len(plans), USED)
    for row, plan in zip(losses.changed, plans.values(), strict=True):
        with masked(run.model, run.architecture, plan):
            assert np.array_equal(row, full(run.model, run.at_once, ids).numpy())


def test_after_an_interruption_only_layers_that_are_left_are_kept(llama, monkeypatch):
    interrupt(monkeypatch, 10, lambda: run_stage(llama))
    chosen: list[set[int]] = []

    class Watched(Prefix):
        def __init__(self, *args):
            chosen.append(set(args[4]))
            super().__init__(*args)

    monkeypatch.setattr(prefix_module, "Prefix", Watched)
    table, _ = run_stage(llama)
    assert chosen == [set(table["layer_idx"][10:].tolist())]
