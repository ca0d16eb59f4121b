"""The face for models in memory: a plan goes out as masks and comes back."""

import pytest
import torch

from libprune import masks
from libprune.engine.describe import describe
from libprune.engine.surgery import masked
from tests.support.masked_models import (
    assert_same,
    logits,
    removed,
    under_plan,
)
from tests.support.models import FAMILIES, random_plan

CASES = [(family, "holes") for family in FAMILIES] + [(family, "uniform") for family in ("llama", "phi3", "gpt2")]


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
