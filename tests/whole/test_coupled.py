"""Parts of which no unit can go alone: a norm over all of them, or a width that the stock config cannot say."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from libprune.allocation.advice import held_whole
from libprune.allocation.allocate import allocate
from libprune.allocation.methods import Evidence
from libprune.engine.architecture import Architecture
from libprune.engine.cost import unit_parameters
from libprune.engine.describe import describe
from libprune.engine.errors import BudgetError, FamilyError, LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import slice_state
from libprune.engine.tables import Columns, unit_index
from libprune.pipeline.methods import METHODS
from libprune.pipeline.sections import Allocate
from libprune.statistics.levels import choose_levels
from tests.support.models import FAMILIES, plan_of

NORMS = "self_attn.q_norm and self_attn.k_norm"


@pytest.fixture(scope="module")
def olmo2() -> Architecture:
    return describe(FAMILIES["olmo2"](0))


@pytest.fixture(scope="module")
def gpt2() -> Architecture:
    return describe(FAMILIES["gpt2"](0))


def table(architecture: Architecture, seed: int) -> Columns:
    units = sum(architecture.units(part) for _, part in architecture.blocks())
    score = np.random.default_rng(seed).exponential(size=units)
    costs = [
        np.full(architecture.units(block[1]), unit_parameters(architecture, *block)) for block in architecture.blocks()
    ]
    cost = np.concatenate(costs)
    return {**unit_index(architecture), "importance": score * cost, "cost": cost, "score": score}


def evidence(architecture: Architecture) -> Evidence:
    """Made up, for all methods."""
    rng = np.random.default_rng(0)
    sensitivity = {kind: rng.random(architecture.layers) for kind in ("layer", *architecture.parts)}
    curves = {b: np.arange(1.0 + architecture.units(b[1])) for b in architecture.blocks()}
    return {"activations": rng.random(architecture.layers), "sensitivity": sensitivity, "levels": curves}


@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 99), ratio=st.sampled_from([0.1, 0.3, 0.5]), floor=st.sampled_from([0, 1]))
def test_coupled_units_stay_or_go_together(olmo2, method, seed, ratio, floor):
    params = Allocate(method=method, ratio=ratio, min_groups=floor, min_channels=1, shape="per_layer")
    made = evidence(olmo2) if method != "uniform" else {}
    try:
        plan = allocate(olmo2, table(olmo2, seed), params, made)
    except BudgetError:  # the steps of whole attentions are coarse
        return
    kept = [plan.kept(layer, "attention") for layer in range(olmo2.layers)]
    assert set(kept) <= ({0, 3} if floor == 0 else {3})


def test_a_whole_attention_can_go(olmo2):
    scores = table(olmo2, 0)
    first = (scores["layer_idx"] == 0) & (scores["group_type"] == "attention")
    scores = scores | {"score": np.where(first, 1e-9, scores["score"])}
    params = Allocate(method="global", ratio=0.3, min_groups=0, min_channels=1)
    plan = allocate(olmo2, scores, params)
    assert plan.gone(0, "attention")


def test_a_plan_that_takes_some_of_them_is_refused_by_the_name_of_the_norms(olmo2):
    plan = plan_of(olmo2, lambda layer, part: 2 if (layer, part) == (1, "attention") else olmo2.units(part))
    with pytest.raises(LibpruneError, match=f"keeps 2 of 3 attention units of layer 1, but {NORMS} of family 'olmo2'"):
        slice_state(FAMILIES["olmo2"](0).state_dict(), olmo2, plan)
    assert slice_state(FAMILIES["olmo2"](0).state_dict(), olmo2, Plan.dense(olmo2))


def test_of_coupled_units_only_the_whole_level_is_measured(olmo2):
    levels = choose_levels(olmo2, 4)
    assert {removed for _, part, removed in levels if part == "attention"} == {3}
    assert len({removed for _, part, removed in levels if part == "mlp"}) == 4


@pytest.mark.parametrize("per_layer", [False, True])
def test_what_cannot_go_is_said(olmo2, gpt2, per_layer):
    coupled = f"no attention unit can go alone: {NORMS} of olmo2 couple all of them"
    unsaid = "the stock config of gpt2 cannot say fewer attention units (its n_embd is both model and kv d); "
    unsaid += "allocate.shape=per_layer can"
    assert held_whole(olmo2, per_layer) == [coupled]
    assert held_whole(gpt2, per_layer) == ([] if per_layer else [unsaid])
    assert held_whole(describe(FAMILIES["llama"](0)), per_layer) == []


def test_a_budget_out_of_reach_says_which_part_cannot_go(gpt2):
    params = Allocate(method="uniform", ratio=0.5, min_channels=1, min_groups=1)
    with pytest.raises(BudgetError, match=re.escape("is both model and kv d); allocate.shape=per_layer can")):
        allocate(gpt2, table(gpt2, 0), params)
    more = params.model_copy(update={"shape": "per_layer"})
    assert allocate(gpt2, table(gpt2, 0), more).kept(0, "attention") < gpt2.units("attention")


@pytest.mark.parametrize(
    ("model_type", "key"),
    [("granitemoe", "num_local_experts"), ("flex_olmo", "num_experts"), ("dots1", "n_routed_experts")],
)
def test_a_mixture_that_no_family_describes_is_refused_as_one(model_type, key):
    config = AutoConfig.for_model(model_type)
    small = {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 8, "intermediate_size": 8, key: 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 1}
    small |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "pad_token_id": None}
    for name, value in small.items():
        if hasattr(config, name):
            setattr(config, name, value)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(FamilyError, match=f"model_type '{model_type}': it is a mixture of 2 experts"):
        describe(model)
