"""What is wholly masked goes, whatever lies between; what stays has a reason."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Starcoder2Config

from libprune import masks
from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.masks.decision import Decision
from libprune.masks.extraction import extraction
from libprune.masks.files import of_model
from tests.support.masked_models import (
    DOWN,
    UP,
    WAYS,
    WHOLLY,
    O,
    assert_outputs_stay,
    cut,
    logits,
    removed,
    under_plan,
    zero,
)
from tests.support.models import FAMILIES, FFN, MAMBA, heads, plan_of, random_plan, tiny_model
from tests.support.predictions import assert_same


def assert_settled(decision: Decision) -> None:
    """All that is wholly masked goes, or stays for a reason that is given."""
    for block, keep in decision.plan.keep.items():
        gone = set(np.flatnonzero(~keep).tolist())
        wholly = set(np.flatnonzero(decision.wholly[block]).tolist())
        assert gone <= wholly
        assert (gone < wholly) is (block in decision.stays)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_exactly_the_wholly_masked_units_go_in_whatever_ways_they_are_masked(family, seed):
    model, rng = FAMILIES[family](0), np.random.default_rng(seed)
    architecture = describe(model)
    ways = {block: rng.integers(len(WAYS), size=architecture.units(block[1])) for block in architecture.blocks()}
    for of_block in ways.values():
        of_block[0] = WAYS.index("not")  # a part without units is another matter
    for index, way in enumerate(WAYS[:-1]):
        cut(model, architecture, Plan({block: of_block != index for block, of_block in ways.items()}), way)
    found = extraction(of_model(model, language=True))
    gone = {b: np.flatnonzero(of_block < len(WHOLLY)).tolist() for b, of_block in ways.items()}
    assert removed(found.plan) == {block: units for block, units in gone.items() if units}
    assert_settled(found.decision)
    assert_same(under_plan(found, family), logits(model))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "opt", "bert"])
def test_constants_of_units_whose_producers_alone_are_zero_go_into_the_consumers_bias(family):
    model = FAMILIES[family](0)
    architecture = describe(model)
    plan = random_plan(architecture, "per_layer", seed=1)
    cut(model, architecture, plan, "rows")
    found = masks.extract(model)
    assert removed(found.plan) == removed(plan)
    assert set(found.decision.folds) <= {p.name for p in architecture.parameters}
    assert bool(found.decision.folds) == (family != "phi3")  # it has no biases
    assert_outputs_stay(found, model)


def test_a_constant_that_no_bias_can_hold_stays():
    model = FAMILIES["qwen2"](0)
    architecture = describe(model)
    plan = random_plan(architecture, "per_layer", seed=1)
    cut(model, architecture, plan, "rows")
    found = masks.extract(model)
    assert removed(found.plan) == {b: units for b, units in removed(plan).items() if b[1] == "mlp"}
    assert_outputs_stay(found, model)
    stuck = {(b.layer, b.part): b.staying for b in masks.inspect(model).blocks if b.staying}
    assert stuck == {b: units for b, units in removed(plan).items() if b[1] == "attention"}
    assert all("no bias to hold it" in found.decision.stays[block] for block in stuck)


def test_biases_are_added_where_the_config_can_say_them():
    make = tiny_model(Starcoder2Config, **FFN, **heads(36, 3, 2), use_bias=False, hidden_act="sigmoid")
    model = make(0)
    architecture = describe(model)
    plan = plan_of(architecture, lambda layer, part: 9 if part == "mlp" else 3)
    cut(model, architecture, plan, "rows")
    found = masks.extract(model)
    assert (removed(found.plan), found.shape) == (removed(plan), "uniform")
    assert found.decision.added == ("mlp",)
    assert_outputs_stay(found, model)
    assert found.smaller().config.use_bias
    kept, dense = (sum(p.numel() for p in one.parameters()) for one in (found.smaller(), model))
    assert masks.inspect(model).saved_parameters == dense - kept


def test_a_part_without_units_that_still_adds_its_bias_keeps_one_unit():
    model = FAMILIES["llama"](0)
    zero(model, {DOWN: slice(None)})
    found = masks.extract(model)
    assert removed(found.plan) == {(2, "mlp"): list(range(1, 13))}
    assert "one unit stays to carry its bias" in found.decision.stays[2, "mlp"]
    assert_outputs_stay(found, model)
    zero(model, {f"{DOWN}.bias": slice(None)})
    found = masks.extract(model)
    assert found.plan.gone(2, "mlp")
    assert_outputs_stay(found, model)


def test_units_that_a_norm_couples_go_all_or_none():
    model = FAMILIES["olmo2"](0)
    zero(model, {O: slice(0, 12)})
    zero(model, {UP: 3})
    found = masks.inspect(model)
    assert [b.staying for b in found.blocks if b.part == "attention"] == [[], [], [0], []]
    assert "self_attn.q_norm and self_attn.k_norm" in next(b.why for b in found.blocks if b.why)
    zero(model, {O: slice(None)})
    assert removed(masks.extract(model).plan) == {(2, "attention"): [0, 1, 2], (2, "mlp"): [3]}


def test_units_that_a_norm_of_the_masked_model_still_counts_stay():
    model = MAMBA(0)
    model.model.layers[0].mixer.out_proj.weight.data[:, [*range(5), *range(20, 25)]] = 0
    model.model.layers[1].mixer.down_proj.weight.data[:, 3] = 0
    found = masks.extract(model)
    assert removed(found.plan) == {(1, "mlp"): [3]}
    assert found.decision.stays[0, "mamba"] == "all units are coupled by mixer.norm, and can only go together"
    assert_outputs_stay(found, model)


def test_something_of_every_layer_stays_where_norms_of_the_stream_forbid_that_it_goes():
    model = FAMILIES["bert"](0)
    architecture = describe(model)
    gone = {block: np.full(len(keep), block[0] != 1) for block, keep in Plan.dense(architecture).keep.items()}
    masks.apply(model, Plan(gone))
    found = masks.extract(model)
    assert removed(found.plan) == {(1, "attention"): [0, 1, 2, 3], (1, "mlp"): list(range(1, 13))}
    assert_outputs_stay(found, model)


def test_layers_that_compute_nothing_at_all_are_refused():
    model = FAMILIES["llama"](0)
    masks.apply(model, Plan({block: np.zeros_like(k) for block, k in Plan.dense(describe(model)).keep.items()}))
    with pytest.raises(LibpruneError, match="none is left"):
        masks.extract(model)
