"""What a config says to transformers 4; `bench/dialects.py` asks transformers 4 itself."""

import json

import pytest
from transformers import (
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
)

from libprune.models.dialect import STOP, tokenizer_settings, version_4
from tests.support.models import FAMILIES, FFN, heads
from tests.support.tiny import write_model

SHAPE = {**FFN, **heads(36, 3, 2), "num_hidden_layers": 2, "vocab_size": 37, "pad_token_id": None, "eos_token_id": None}
LINEAR = {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 5e4, "short_factor": [1.0, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0]}
NEARBY = {"rope_type": "default", "rope_theta": 5e3}


def of(config_class: type[PreTrainedConfig], rope: dict, **settings: object) -> PreTrainedConfig:
    return config_class(**SHAPE | settings, rope_parameters=rope)


SAID = {
    "a base": (of(LlamaConfig, {"rope_type": "default", "rope_theta": 5e4}), {"rope_theta": 5e4}),
    "a scaling": (of(LlamaConfig, LINEAR), {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "a class that takes two keys": (
        of(Olmo2Config, LINEAR),
        {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "a class that takes three keys": (
        of(Phi3Config, {**LONG, "partial_rotary_factor": 1.0}, original_max_position_embeddings=8),
        {
            "rope_theta": 5e4,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 8,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0]},
        },
    ),
    "names of its own, though the base is the default": (
        GPTNeoXConfig(
            hidden_size=24,
            num_attention_heads=3,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        ),
        {"rotary_emb_base": 1e4, "rotary_pct": 0.25},
    ),
    "two bases, and a class that knows one word for the kind": (
        of(Gemma3TextConfig, {"full_attention": dict(LINEAR), "sliding_attention": dict(NEARBY)}),
        {
            "rope_theta": 5e4,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
            "rope_local_base_freq": 5e3,
        },
    ),
    "two scalings": (
        of(Gemma3TextConfig, {"full_attention": dict(LINEAR), "sliding_attention": dict(LINEAR)}),
        STOP,
    ),
    "a length that version 4 looks for elsewhere": (
        of(LlamaConfig, {**LONG, "original_max_position_embeddings": 8}),
        STOP,
    ),
    "learned positions": (FAMILIES["gpt2"](0).config, {}),
}
"""Configs, and the keys for transformers 4, by what is special of them."""


@pytest.mark.parametrize("name", SAID)
def test_version_4_is_told_in_its_own_words_or_stopped(name):
    config, expected = SAID[name]
    before = config.to_dict()
    assert version_4(config) == expected
    assert config.to_dict() == before


def plain(rope: dict) -> dict:
    """Without the older name of `rope_type`, which says nothing beside it."""
    return {k: plain(v) if isinstance(v, dict) else v for k, v in rope.items() if k != "type"}


ONLY_5 = {"olmo3"}
"""Families whose rotary positions differ by the kind of attention, which version 4 cannot say of them."""
CONFIGS = {name: config for name, (config, said) in SAID.items() if said is not STOP} | {
    name: make(0).config for name, make in FAMILIES.items() if name not in ONLY_5
}


@pytest.mark.parametrize("name", CONFIGS)
def test_either_dialect_and_both_together_are_one_config(name):
    config = CONFIGS[name]
    both = json.loads(json.dumps(config.to_dict() | version_4(config)))
    older = {key: value for key, value in both.items() if key != "rope_parameters"}
    for data in (both, older):
        again = type(config).from_dict(json.loads(json.dumps(data))).to_dict()
        rope = again.pop("rope_parameters", None), config.to_dict().get("rope_parameters")
        assert [one and plain(one) for one in rope] == [rope[1] and plain(rope[1])] * 2
        expected = {key: value for key, value in config.to_dict().items() if key != "rope_parameters"}
        assert {key: again[key] for key in expected} == expected
        assert again.keys() - expected.keys() <= {"partial_rotary_factor"}


@pytest.mark.parametrize("name", sorted(ONLY_5))
def test_what_version_4_cannot_say_stops_it(name):
    assert version_4(FAMILIES[name](0).config) is STOP


def test_a_config_that_stops_version_4_says_the_same_to_version_5():
    config, said = SAID["two scalings"]
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict() | said)))
    assert again.rope_parameters == config.rope_parameters
    (text,) = STOP["pruned_heads"]
    with pytest.raises(ValueError, match=text):
        int(text)  # so version 4 reads the entries of this key


def test_tokenizers_of_the_generic_class_read_alike_under_its_older_name(tmp_path):
    write_model(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {
        "extra_special_tokens": ["<a>", "<b>"],
        "name_or_path": "/home/me/model",
        "is_local": True,
    }
    path.write_text(json.dumps(settings))
    newer = AutoTokenizer.from_pretrained(tmp_path)
    said = tokenizer_settings(settings)
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert said["additional_special_tokens"] == ["<a>", "<b>"]
    assert not {"extra_special_tokens", "name_or_path", "is_local"} & said.keys()
    path.write_text(json.dumps(said))
    older = AutoTokenizer.from_pretrained(tmp_path)
    text, chat = "the old cat<b> sees<eos>a bird", [{"role": "user", "content": "the cat"}]
    assert type(older) is type(newer)
    assert older(text).input_ids == newer(text).input_ids
    assert older.apply_chat_template(chat, tokenize=False) == newer.apply_chat_template(chat, tokenize=False)
    assert older.special_tokens_map == newer.special_tokens_map
    assert set(older.all_special_ids) == set(newer.all_special_ids)


def test_tokenizers_of_other_classes_keep_them():
    settings = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image_token": "<image>"}}
    assert tokenizer_settings(settings) == settings
