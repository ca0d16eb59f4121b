"""Routing after a cut: what is noted is what the routers say, in the dense model's numbering."""

import numpy as np
import pytest
import torch

from libprune.engine.describe import describe
from libprune.engine.plan import Plan
from libprune.results.routing import routing_changes, watched
from tests.support.models import FAMILIES, prune, random_plan, tokens, write_dense

BATCHES = (tokens(3, 12), tokens(2, 9))


def noted(model, architecture, plan, batches=BATCHES):
    with watched(model, architecture, plan) as choices, torch.no_grad():
        for ids in batches:
            model(input_ids=ids)
    return choices


def routed(model, layers: int):
    """By layer what transformers' own record of the routers gives: the chosen experts and their weights."""
    with torch.no_grad():
        logits = [model.base_model(input_ids=ids, output_router_logits=True).router_logits for ids in BATCHES]
    found = []
    for layer in range(layers):
        chances = torch.cat([batch[layer] for batch in logits]).softmax(-1)
        weights, chosen = chances.topk(2, -1)
        found.append((chosen, weights / weights.sum(-1, keepdim=True)))
    return found


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return write_dense(FAMILIES["qwen3_moe"](0), tmp_path_factory.mktemp("dense") / "model")


@pytest.mark.parametrize("kind", ["uniform", "per_layer", "holes", "shallow"])
def test_changes_are_those_of_the_routers_own_logits(dense, kind, tmp_path):
    architecture, plan = dense.architecture, random_plan(dense.architecture, kind)
    custom = kind in {"per_layer", "holes"}
    model = prune(dense, plan, custom, tmp_path).model
    before = noted(dense.model, architecture, Plan.dense(architecture))
    found = routing_changes(before, {"pruned": noted(model, architecture, plan)}, architecture, plan)
    rows = found["mixtures"]
    mixtures = [layer for layer in architecture.with_part("experts") if layer in plan.layers]
    assert [row["layer"] for row in rows] == mixtures
    assert sum(row["removed_weight"] for row in rows) > 0 or kind == "shallow"
    ours = routed(dense.model, len(architecture.with_part("experts")))
    theirs = dict(zip(mixtures, routed(model, len(mixtures)), strict=True))
    for row, (chosen, weights) in zip(rows, ours_of(architecture, ours, mixtures), strict=True):
        keep = plan.keep[row["layer"], "experts"]
        kept = np.flatnonzero(keep)
        assert (row["experts"], row["kept"]) == (len(keep), len(kept))
        removed = torch.from_numpy(~keep)[chosen]
        assert row["removed_weight"] == pytest.approx((weights * removed).sum().item() / weights.sum().item())
        pairs = zip(chosen.tolist(), theirs[row["layer"]][0].tolist(), strict=True)
        differ = [set(one) != {int(kept[number]) for number in other} for one, other in pairs]
        assert row["changed"] == {"pruned": pytest.approx(np.mean(differ))}
    assert found["removed_weight"] == pytest.approx(np.mean([row["removed_weight"] for row in rows]))
    assert found["changed"] == {"pruned": pytest.approx(np.mean([row["changed"]["pruned"] for row in rows]))}


def ours_of(architecture, ours, mixtures):
    return [one for layer, one in zip(architecture.with_part("experts"), ours, strict=True) if layer in mixtures]


def test_a_model_beside_itself_has_changed_nothing(dense):
    plan = Plan.dense(dense.architecture)
    choices = noted(dense.model, dense.architecture, plan)
    found = routing_changes(choices, {"pruned": choices, "recovered": choices}, dense.architecture, plan)
    assert (found["removed_weight"], found["changed"]) == (0.0, {"pruned": 0.0, "recovered": 0.0})


def test_experts_that_no_token_chose_can_go_without_a_change(dense):
    one = tokens(1, 1)
    before = noted(dense.model, dense.architecture, Plan.dense(dense.architecture), [one])
    layer, experts = 0, dense.architecture.units("experts")
    used = np.isin(np.arange(experts), before.chosen[layer, "mlp.experts"][0])
    plan = Plan({**Plan.dense(dense.architecture).keep, (layer, "experts"): used})
    (first, *_) = routing_changes(before, {}, dense.architecture, plan)["mixtures"]
    assert (first["kept"], first["removed_weight"]) == (2, 0.0)


def test_units_within_experts_leave_all_experts(dense):
    architecture = describe(dense.model, experts="channels")
    plan = random_plan(architecture, "uniform")
    before = noted(dense.model, architecture, Plan.dense(architecture))
    rows = routing_changes(before, {"pruned": before}, architecture, plan)["mixtures"]
    assert [(row["kept"], row["removed_weight"]) for row in rows] == [(6, 0.0)] * 3


def test_a_model_without_mixtures_has_no_routing():
    model = FAMILIES["llama"](0)
    architecture = describe(model)
    plan = Plan.dense(architecture)
    choices = noted(model, architecture, plan)
    assert routing_changes(choices, {"pruned": choices}, architecture, plan) is None
    assert not any(module._forward_pre_hooks for module in model.modules())
