"""The contract of query heads as units: for every family that has them, sliced equals masked and the config says it."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe, require_shared
from libprune.engine.errors import FamilyError, LibpruneError
from libprune.engine.family import families
from libprune.engine.heads import HEADS
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked, require_sliceable, slice_state
from libprune.results.folder import pruned_config
from tests.support.models import MODELS, outputs, plan_of_heads, prune, tokens, write_dense

COUPLED = ("olmo2", "olmo3", "olmoe", "minimax_m2")
ALONE = ("gpt2", "gpt_neox", "opt", "deepseek_v3", "deepseek_v2", "glm4_moe_lite")
ALONE += ("bert", "bert_classifier", "bert_embedding", "roberta", "distilbert", "mpnet", "modernbert")
UNSAID = ("qwen2_5_vl",)
"""Families whose config says the query heads and the width of the model by one key, and whose layers are all alike."""
SHARED = tuple(name for name in MODELS if name not in {*COUPLED, *ALONE, *UNSAID, "llama_mha"})
"""Families of which query heads can be units, all others being refused."""
UNEVEN = ("llama", "phi3", "gemma2", "gpt_oss", "qwen3_next", "nemotron_h")
"""Families that together have every mechanism of layers with widths of their own."""
TOLERANCE = 1e-5
"""Of the largest logit."""


@cache
def described(name: str) -> tuple[PreTrainedModel, Architecture]:
    model = MODELS[name](0)
    return model, describe(model, heads="queries")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return outputs(model, tokens())


def masked_logits(model: PreTrainedModel, architecture: Architecture, plan: Plan) -> torch.Tensor:
    with masked(model, architecture, plan):
        return logits(model)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@pytest.mark.parametrize("name", SHARED)
def test_a_stock_model_of_fewer_heads_computes_what_the_mask_says(name):
    model, architecture = described(name)
    shape = architecture.parts["attention"]
    assert architecture.units("attention") == shape.groups * architecture.sizes[shape.inner] > shape.groups
    counts = (shape.groups - 1, 1) if shape.says(shape.groups - 1, shape.groups - 1) else (1, 1)
    plan = plan_of_heads(architecture, lambda _: counts)
    config = type(model.config).from_dict(
        pruned_config(families()[architecture.family], model.config, architecture, plan, "uniform")
    )
    sized = config.get_text_config()
    assert (sized.num_key_value_heads, sized.num_attention_heads) == (counts[0], counts[0] * counts[1])
    pruned = HEADS[architecture.head].loader.from_config(config).eval()
    state = slice_state({**model.state_dict(), **dict(model.named_parameters())}, architecture, plan)
    missing, unexpected = pruned.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("lm_head.weight") for name in missing)
    pruned.tie_weights()
    expected = masked_logits(model, architecture, plan)
    assert_close(logits(pruned), expected)
    assert (expected - logits(model)).abs().max() > 1e-3, "the plan changes nothing that could show"


@pytest.mark.parametrize("name", UNEVEN)
def test_layers_of_their_own_numbers_of_heads_reload_as_the_mask_says(name, tmp_path):
    dense = write_dense(MODELS[name](0), tmp_path / "dense", heads="queries")
    groups, each = dense.architecture.parts["attention"].groups, dense.architecture.sizes["q"]
    layers = dense.architecture.with_part("attention")
    counts = dict(zip(layers, [(groups, each - 1), (0, 0), (1, each), (groups - 1, 1)], strict=False))
    plan = plan_of_heads(dense.architecture, counts.__getitem__)
    (tmp_path / "pruned").mkdir()
    pruned = prune(dense, plan, custom=True, folder=tmp_path / "pruned")
    assert_close(logits(pruned.model), masked_logits(dense.model, dense.architecture, plan))
    assert sum(p.numel() for p in pruned.model.parameters()) == cost.size(dense.architecture, plan).total


@settings(max_examples=30)
@given(name=st.sampled_from(["llama", "phi3", "gpt_oss", "qwen3_next", "gemma4_text"]), data=st.data())
def test_prices_are_what_every_plan_removes(name, data):
    """Of parameters, multiply-accumulates and the cache, for any numbers of groups and heads in any layer."""
    _, architecture = described(name)
    groups, each = architecture.parts["attention"].groups, architecture.sizes["q"]
    layers = architecture.with_part("attention")
    numbers = st.tuples(st.integers(0, groups), st.integers(1, each))
    counts = {layer: data.draw(numbers) for layer in layers}
    plan = plan_of_heads(architecture, counts.__getitem__, data.draw(st.integers(0, 9)))
    left, dense = cost.size(architecture, plan), cost.size(architecture, Plan.dense(architecture))
    for objective, field in {"parameters": "decoder", "macs": "macs", "cache": "cache"}.items():
        removed = cost.prices(architecture, objective).removed(plan)
        assert removed == getattr(dense, field) - getattr(left, field), objective
    if all(count[0] == groups for count in counts.values()):
        assert left.cache == dense.cache, "query heads hold no cache"


def test_timed_prices_count_heads_and_groups():
    _, architecture = described("llama")
    latency = {"unit": {"attention": 2e-12, "kv": 50e-12, "mlp": 0.0}, "fixed": 8e-12, "outside": 1e-12}
    prices = cost.prices(architecture, "latency", latency)
    plan = plan_of_heads(architecture, lambda layer: (1, 1) if layer == 0 else (3, 2))
    assert prices.removed(plan) == 5 * 2 + 2 * 50
    assert prices.decoder == architecture.layers * (6 * 2 + 3 * 50) + 8 * architecture.layers


def test_groups_that_stay_must_keep_the_same_number():
    _, architecture = described("llama")
    dense = Plan.dense(architecture)
    require_sliceable(architecture, dense.without((0, "attention"), [2, 3]))  # one whole group
    require_sliceable(architecture, dense.without((0, "attention"), [1, 2, 5]))  # one of each
    with pytest.raises(LibpruneError, match="as many in each of those that stay"):
        require_sliceable(architecture, dense.without((0, "attention"), 2))


def test_the_description_survives_json():
    _, architecture = described("llama")
    assert Architecture.from_json(architecture.to_json()) == architecture
    assert architecture.parts["attention"].pairs == ((1, 1), (1, 2), (2, 2), (3, 3), (3, 6))


def test_all_positions_of_a_unit_are_those_of_its_query_head():
    """Of the fused map of Phi-3 the rows of queries belong to heads, those of keys and values to groups."""
    _, architecture = described("phi3")
    sizes = architecture.sizes
    (fused,) = (m for m in architecture.maps_of(0, "attention") if m.module.endswith("qkv_proj"))
    heads, groups = (fused.output.units(axis, sizes) for axis in ("head", "kv"))
    queries = sizes["kv"] * sizes["q"] * sizes["d"]
    np.testing.assert_array_equal(heads[:queries], np.repeat(np.arange(sizes["head"]), sizes["d"]))
    assert (heads[queries:] < 0).all()
    assert (groups[:queries] < 0).all()
    assert (groups[queries:] == np.tile(np.repeat(np.arange(sizes["kv"]), sizes["d"]), 2)).all()


@pytest.mark.parametrize("name", [*COUPLED, *ALONE])
def test_other_attentions_are_refused_by_name(name):
    reason = "couple all heads" if name in COUPLED else "no query heads that share a key-value head"
    with pytest.raises(FamilyError, match=rf"prepare.heads is queries, but .*{reason}.*; set it to groups"):
        describe(MODELS[name](0), heads="queries")


def test_a_query_head_with_a_key_value_head_of_its_own_is_refused():
    with pytest.raises(FamilyError, match="one query head per key-value head"):
        require_shared(described("llama_mha")[1])
    require_shared(described("llama")[1])


@pytest.mark.parametrize("name", UNSAID)
def test_a_config_that_cannot_say_fewer_heads_leaves_all(name):
    assert described(name)[1].parts["attention"].expressible == (described(name)[1].units("attention"),)
