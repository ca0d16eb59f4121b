"""The face for models in memory: a plan goes out as masks and comes back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from libprune import masks
from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.engine.module_family import NetworkFamily
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.masks.files import of_model
from libprune.masks.models import extract
from tests.support.masked_models import DOWN, logits, removed, under_plan, zero
from tests.support.models import FAMILIES, MAMBA, MIXTURES, random_plan
from tests.support.predictions import assert_same

CASES = [(family, "holes") for family in FAMILIES if family not in MIXTURES]
CASES += [(family, "uniform") for family in ("llama", "phi3", "gpt2")]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_plan_as_masks_computes_what_the_plan_does_and_is_extracted_again(family, kind):
    model = FAMILIES[family](0)
    architecture, before = describe(model), {name: p.clone() for name, p in model.named_parameters()}
    plan = random_plan(architecture, kind)
    with masked(model, architecture, plan):
        expected = logits(model)
    masks.apply(model, plan)
    assert_same(logits(model), expected)
    found = masks.extract(model)
    assert removed(found.plan) == removed(plan)
    assert not found.decision.folds
    assert_same(under_plan(found, family) if kind == "holes" else logits(found.smaller()), expected)
    assert all(torch.equal(p, before[name.removesuffix("_orig")]) for name, p in model.named_parameters())


def test_a_plan_of_query_heads_is_applied_as_what_it_is():
    model = FAMILIES["llama"](0)
    architecture = describe(model, heads="queries")
    plan = Plan.dense(architecture).without((1, "attention"), [0, 3, 4])
    with masked(model, architecture, plan):
        expected = logits(model)
    masks.apply(model, plan)
    assert_same(logits(model), expected)


def test_what_masks_cannot_say_of_a_model_is_not_applied():
    """A plan of another model, a narrower stream, and units behind a norm that goes on counting them."""
    llama, mixers = FAMILIES["llama"](0), MAMBA(0)
    plan = Plan.dense(describe(llama))
    more = {block: np.ones(len(keep) + 1, dtype=bool) for block, keep in plan.keep.items()}
    cases = [
        (llama, Plan(more), r"the plan is of 4 attention units in layer 0, but this llama model has 3"),
        (llama, Plan({(0, "mlp"): plan.keep[0, "mlp"]}), r"0 attention units in layer 0, but this llama model has 3"),
        (llama, replace(plan, width=8), "the plan keeps 8 columns of the residual stream"),
        (mixers, Plan.dense(describe(mixers)).without((0, "mamba"), [0, 4]), r"some mamba units .* but mixer\.norm"),
    ]
    for model, other, message in cases:
        with pytest.raises(LibpruneError, match=message):
            masks.apply(model, other)
        assert not any(name.endswith("_mask") for name, _ in model.named_buffers())
    masks.apply(mixers, Plan.dense(describe(mixers)).without((0, "mamba"), slice(None)))
    assert removed(masks.extract(mixers).plan) == {(0, "mamba"): list(range(6))}


def test_a_mixture_of_experts_is_refused_by_name():
    model = FAMILIES["qwen3_moe"](0)
    for call in (masks.inspect, masks.extract, lambda model: masks.apply(model, Plan.dense(describe(model)))):
        with pytest.raises(LibpruneError, match="this qwen3_moe model is a mixture of experts"):
            call(model)


def test_what_is_neither_a_language_model_nor_described_is_refused():
    for call in (masks.inspect, masks.extract):
        with pytest.raises(LibpruneError, match="Linear is no language model of transformers; give its family and"):
            call(nn.Linear(3, 4))


def test_a_language_model_may_be_given_as_any_other_network():
    """The same units go, whether its residual stream is known or the family names one channel axis."""
    model = FAMILIES["llama"](0)
    zero(model, {DOWN: 4})
    mlp = model.model.layers[2].mlp
    modules = {"gate_proj": "model -> c", "up_proj": "model -> c", "down_proj": "c -> model"}
    family = NetworkFamily(family="mlp", prunable=["c"], modules=modules)
    plan = extract(mlp, family, torch.randn(4, 5, 30)).plan
    assert plan.keep[0, "c"].tolist() == masks.extract(model).plan.keep[2, "mlp"].tolist()


def test_what_fits_together_is_said_where_something_is_missing_or_swapped():
    """Nothing is left unmasked in silence."""
    model, network = FAMILIES["llama"](0), nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    family = NetworkFamily(family="net", prunable=["h"], modules={"0": "x -> h", "2": "h -> y"})
    plan, other = random_plan(describe(model), "holes"), Plan({(0, "h"): np.arange(6) < 4})
    for arguments in ((network, other), (network, family), (model, family), (model,)):
        with pytest.raises(LibpruneError, match=r"^masks\.apply takes a language model of transformers and a plan, or"):
            masks.apply(*arguments)
    for arguments in ((network,), (network, family), (network, None, torch.zeros(2, 4)), (model, family)):
        with pytest.raises(LibpruneError, match=r"family and inputs"):
            masks.inspect(*arguments)
    masks.apply(model, plan=plan)
    assert masks.extract(model).plan.digest == plan.digest
    masks.apply(network, family, other)
    assert masks.extract(network, family, torch.randn(5, 4)).plan.digest == other.digest


def test_a_transformers_model_with_a_family_of_its_own_is_taken_as_it_is():
    """Also where its modules are no longer those that its config makes."""
    model = FAMILIES["llama"](0)
    model.lm_head = nn.Linear(30, 5)
    extracted = of_model(model, language=False).model
    assert extracted.lm_head.weight.shape == (5, 30)
    assert extracted is not model
