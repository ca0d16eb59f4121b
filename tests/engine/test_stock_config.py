"""What a stock config can say, and which of its keys are understood."""

import re

import pytest
from transformers import GPT2Config, PreTrainedConfig

from libprune.engine.describe import describe
from libprune.engine.errors import FamilyError, NotExpressibleError
from libprune.engine.family import Family, family_of
from libprune.engine.stock_config import check_config, keys_of, new_config, require_sizes
from tests.support.models import FAMILIES, TOWERS


@pytest.fixture
def llama():
    return FAMILIES["llama"](0)


def test_a_value_that_a_fixed_key_does_not_allow_is_refused(llama):
    family = family_of("llama")
    fixed = {**family.config.fixed, "hidden_act": ["silu"]}
    strict = family.model_copy(update={"config": family.config.model_copy(update={"fixed": fixed})})
    check_config(strict, llama.config)
    llama.config.hidden_act = "gelu"
    with pytest.raises(FamilyError, match=r"'hidden_act' = 'gelu' is not supported by family 'llama': \['silu'\]"):
        check_config(strict, llama.config)


def test_keys_that_every_config_has_need_no_mention():
    check_config(family_of("llama"), PreTrainedConfig())


def gpt2_like() -> Family:
    """GPT-2 has one key for the residual width and for the heads together."""
    return Family.model_validate(
        {
            "family": "gpt2",
            "model_types": ["gpt2"],
            "layers": "transformer.h",
            "parts": {
                "attention": {
                    "axis": "kv",
                    "module": "attn",
                    "modules": {"attn.c_attn": "model -> kv d + kv d + kv d", "attn.c_proj": "kv d -> model"},
                }
            },
            "outside": {},
            "cache": "kv d + kv d",
            "config": {"layers": "n_layer", "sizes": {"n_embd": ["model", "kv d"], "n_head": "kv"}},
        }
    )


def test_a_key_with_two_expressions_that_differ_is_named():
    config = GPT2Config(n_embd=12, n_head=3, n_layer=2)
    with pytest.raises(NotExpressibleError, match="'n_embd' of family 'gpt2' must be both model = 12 and kv d = 8"):
        new_config(gpt2_like(), config, {"model": 12, "kv": 2, "d": 4}, (0, 1))


def test_a_key_with_two_expressions_that_agree_is_written():
    config = GPT2Config(n_embd=12, n_head=3, n_layer=2)
    written = new_config(gpt2_like(), config, {"model": 12, "kv": 2, "d": 6}, (1,))
    assert (written.n_embd, written.n_head, written.n_layer) == (12, 2, 1)


def test_a_shape_that_the_config_class_refuses_is_not_expressible(llama):
    """Llama's own check: the head count divides the hidden size, 30, though the head size is explicit."""
    architecture = describe(llama)
    assert [n for n in (1, 2, 3) if architecture.parts["attention"].says(n)] == [1, 3]
    message = ["LlamaConfig refuses the pruned shape: ", "hidden size (30) is not a multiple"]
    with pytest.raises(NotExpressibleError, match=".*".join(map(re.escape, message))):
        new_config(family_of("llama"), llama.config, {**architecture.sizes, "kv": 2}, (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("nested", "key", "value", "message"),
    [
        (False, "colour", 3, "'colour' = 3, of which family 'llava' says nothing"),
        (True, "colour", 3, "'colour' = 3, of which family 'llava' says nothing"),
        (True, "pretraining_tp", 2, "'pretraining_tp' = 2 is not supported by family 'llava'"),
        (False, "quantization_config", {}, "has 'quantization_config' in its config"),
    ],
)
def test_of_a_tower_both_configs_are_checked(nested, key, value, message):
    config, family = TOWERS["llava"](0).config, family_of("llava")
    check_config(family, config)
    setattr(config.text_config if nested else config, key, value)
    with pytest.raises(FamilyError, match=message):
        check_config(family, config)
    if key == "colour":
        check_config(family, config, accept=("colour",))
        assert "colour" in keys_of(config.to_dict())
        assert {type(key) for key in keys_of(config.to_dict())} == {str}


def test_a_tower_of_another_language_model_is_refused():
    config = TOWERS["mistral3"](0).config
    with pytest.raises(FamilyError, match="is of model_type 'mistral'; family 'qwen3_vl' describes qwen3_vl_text"):
        check_config(family_of("qwen3_vl"), config)


def test_sizes_of_a_tower_are_those_of_its_nested_config():
    config = TOWERS["llava"](0).config
    config.text_config.intermediate_size = 0
    with pytest.raises(FamilyError, match="'intermediate_size' = '0' is no size of a llava model"):
        require_sizes(family_of("llava"), config)


def test_entries_of_deleted_layers_leave_per_layer_lists():
    config = FAMILIES["qwen2"](0).config
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    sizes = describe(FAMILIES["qwen2"](0)).sizes
    written = new_config(family_of("qwen2"), config, dict(sizes), (0, 3))
    assert written.layer_types == ["full_attention", "sliding_attention"]
    assert written.num_hidden_layers == 2


@pytest.mark.parametrize("key", ["intermediate_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [0, -3, 10**9, 10**24, "40", 1.5, True])
def test_a_size_that_no_model_has_is_refused_before_a_model_is_made_of_it(llama, key, value):
    config = llama.config
    object.__setattr__(config, key, value)
    with pytest.raises(FamilyError, match=f"config key '{key}' = .* is no size of a llama model"):
        require_sizes(family_of("llama"), config)


def test_what_transformers_itself_writes_passes(llama):
    for key, value in (("_attn_implementation_autoset", True), ("quantization_config", None), ("torchscript", False)):
        setattr(llama.config, key, value)
    check_config(family_of("llama"), llama.config)
    require_sizes(family_of("llama"), llama.config)
