"""The face for models in memory: a plan goes out as masks and comes back."""

import pytest
import torch
from torch import nn

from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.engine.module_family import NetworkFamily
from libprune.engine.surgery import masked
from libprune.masks.models import apply, extract, inspect
from tests.support.masked_models import DOWN, logits, removed, under_plan, zero
from tests.support.models import FAMILIES, random_plan
from tests.support.predictions import assert_same

CASES = [(family, "holes") for family in FAMILIES] + [(family, "uniform") for family in ("llama", "phi3", "gpt2")]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_plan_as_masks_computes_what_the_plan_does_and_is_extracted_again(family, kind):
    model = FAMILIES[family](0)
    architecture, before = describe(model), {name: p.clone() for name, p in model.named_parameters()}
    plan = random_plan(architecture, kind)
    with masked(model, architecture, plan):
        expected = logits(model)
    apply(model, plan)
    assert_same(logits(model), expected)
    found = extract(model)
    assert removed(found.plan) == removed(plan)
    assert not found.decision.folds
    assert_same(under_plan(found, family) if kind == "holes" else logits(found.smaller()), expected)
    assert all(torch.equal(p, before[name.removesuffix("_orig")]) for name, p in model.named_parameters())


def test_what_is_neither_a_language_model_nor_described_is_refused():
    for call in (inspect, extract):
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
    assert plan.keep[0, "c"].tolist() == extract(model).plan.keep[2, "mlp"].tolist()
