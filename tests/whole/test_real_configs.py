"""Configs as they lie on the hub: their keys and shapes, without their weights."""

import pytest
from transformers import AutoConfig

from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe, without_weights
from libprune.engine.family import family_of
from libprune.engine.plan import Plan
from libprune.engine.stock_config import check_config
from tests.support.published import _BERT, _GEMMA, _LLAMA, _QWEN, CONFIGS, MIXTURES

_LLAMA |= {"initializer_range": 0.02, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "pretraining_tp": 1}
_QWEN |= {"initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False}
_GEMMA |= {"eos_token_id": 1, "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02, "pad_token_id": 0}
_GEMMA |= {"query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "use_cache": True, "torch_dtype": "float32"}

_BERT |= {"hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12}
_BERT |= {"max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0}
_BERT |= {"position_embedding_type": "absolute", "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522}
PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-2-7b": 6_738_415_616,
    "SmolLM2-135M": 134_515_008,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
    "gpt2": 124_439_808,
    "opt-125m": 125_239_296,
    "pythia-160m": 162_322_944,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "Phi-3-mini-4k": 3_821_079_552,
    "SmolLM3-3B": 3_075_098_624,
    "OLMo-2-1124-7B": 7_298_617_344,
    "starcoder2-3b": 3_030_371_328,
    "Qwen3-Next-80B-A3B": 79_674_391_296,
    "Qwen3.5-27B": 26_895_998_464,
    "Qwen3.5-35B-A3B": 34_660_610_688,
    "Nemotron-3-Nano-30B-A3B": 31_577_937_344,
    "bert-base-uncased": 109_514_298,
    "bert-base-uncased-SST-2": 109_483_778,
    "Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "gemma-3-4b-it": 4_300_079_472,
    "Mistral-Small-3.1-24B": 24_011_361_280,
    "llava-1.5-7b": 7_063_427_072,
    "SmolVLM2-500M": 507_482_304,
    "nanochat-d20": 560_988_160,
    "gemma-2b": 2_506_172_416,
    "command-r7b": 8_028_033_024,
    "Apertus-8B": 8_053_338_176,
    # Published rounded: 8.17 B, 125 B, 9.4 B, 32.2 B, 32 B (30.95 B without embeddings), 36 B, 7.5 B, 0.36 B, 4.6 B.
    "granite-3.3-8b": 8_170_864_640,
    "Devstral-2-123B": 125_025_988_608,
    "GLM-4-9B-0414": 9_400_279_040,
    "Olmo-3.1-32B": 32_233_522_176,
    "EXAONE-4.0-32B": 32_003_216_384,
    "Seed-OSS-36B": 36_151_104_512,
    "Hunyuan-7B": 7_504_568_320,
    "ERNIE-4.5-0.3B": 360_748_032,
    "AFM-4.5B": 4_619_184_640,
    "all-MiniLM-L6-v2": 22_713_216,
    "roberta-base": 124_697_433,
    "multilingual-e5-base": 278_043_648,
    "distilbert-base-uncased": 66_985_530,
    "all-mpnet-base-v2": 109_486_464,
    "ModernBERT-base": 149_655_232,
}
"""As the hub or llama.cpp counts them, without vision and without layers that predict several tokens."""
ACTIVE = {
    "Qwen3-Next-80B-A3B": 3_252_597_504,
    "Qwen3.5-35B-A3B": 2_437_868_160,
    "Nemotron-3-Nano-30B-A3B": 2_875_427_648,
}
"""Of mixtures, those in the layers that a token goes through."""


TOTAL_AND_ACTIVE = {
    "Mixtral-8x7B-v0.1": (46_702_792_704, 12_879_925_248),
    "Qwen3-30B-A3B": (30_532_122_624, 3_353_032_704),
    "OLMoE-1B-7B-0924": (6_919_161_856, 1_282_017_280),
    "Qwen1.5-MoE-A2.7B": (14_315_784_192, 2_689_173_504),
    "GLM-4.5-Air": (106_852_245_504, 13_424_123_904),  # 12B without both embeddings
    "MiniMax-M2": (228_689_748_992, 11_030_537_216),  # 9.8B without both
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704),  # 3.61B without the first
    "DeepSeek-V3": (671_026_404_352, 37_552_282_624),
    "Moonlight-16B-A3B": (15_960_108_544, 2_914_774_528),
    "DeepSeek-V2-Lite": (15_706_484_224, 2_661_150_208),  # 2.4B without the first
    "GLM-4.7-Flash": (29_943_390_976, 3_896_763_136),
}
"""Parameters in all, and those that a token goes through, both embeddings with them. Publishers differ in the latter;
what they leave out stands beside it. Neither layers that predict further tokens nor biases on the choice of experts
count."""


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_are_understood_and_counted(name):
    architecture = described(CONFIGS[name])
    assert architecture.total_parameters == PARAMETERS[name]
    active = cost.size(architecture, Plan.dense(architecture)).active
    assert active == ACTIVE.get(name, architecture.decoder_parameters)


def described(config: dict) -> Architecture:
    data = dict(config)
    made = AutoConfig.for_model(data.pop("model_type"), **data)
    check_config(family_of(made.model_type), made)
    return describe(without_weights(made))


@pytest.mark.parametrize("name", MIXTURES)
def test_published_mixtures_are_understood_and_counted_in_all_and_by_token(name):
    architecture = described(MIXTURES[name])
    size = cost.size(architecture, Plan.dense(architecture))
    assert (size.total, size.total - size.decoder + size.active) == TOTAL_AND_ACTIVE[name]
