"""Configs as they lie on the hub: their keys and shapes, without their weights."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from libprune.describe import check_config, describe
from libprune.family import family_of

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "use_cache": True}
_LLAMA |= {"initializer_range": 0.02, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "pretraining_tp": 1}
_QWEN = {"attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu"}
_QWEN |= {"initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False}

CONFIGS = {
    "Llama-3.1-8B": _LLAMA
    | {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001}
    | {"hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False}
    | {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    | {"rope_theta": 500000.0, "tie_word_embeddings": False, "transformers_version": "4.43.0.dev0"}
    | {
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    },
    "Llama-2-7b": _LLAMA
    | {"_name_or_path": "meta-llama/Llama-2-7b-hf", "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096}
    | {"intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32}
    | {"num_hidden_layers": 32, "num_key_value_heads": 32, "rope_scaling": None, "vocab_size": 32000},
    "SmolLM2-135M": _LLAMA
    | {"attention_bias": False, "attention_dropout": 0.0, "hidden_size": 576, "intermediate_size": 1536}
    | {"is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 9}
    | {"num_hidden_layers": 30, "num_key_value_heads": 3, "rope_interleaved": False, "rope_scaling": None}
    | {"rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152}
    | {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    "Mistral-7B-v0.1": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "bos_token_id": 1}
    | {"eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "use_cache": True}
    | {"intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32}
    | {"num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    | {"sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000},
    "Qwen2.5-0.5B": _QWEN
    | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864}
    | {"max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14, "use_mrope": False}
    | {"num_hidden_layers": 24, "num_key_value_heads": 2, "sliding_window": 32768, "tie_word_embeddings": True}
    | {"torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 151936},
    "Qwen3-0.6B": _QWEN
    | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128}
    | {"hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28}
    | {"num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rope_scaling": None}
    | {"sliding_window": None, "tie_word_embeddings": True, "use_cache": True, "vocab_size": 151936},
}
PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-2-7b": 6_738_415_616,
    "SmolLM2-135M": 134_515_008,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_are_understood_and_counted(name):
    data = dict(CONFIGS[name])
    config = AutoConfig.for_model(data.pop("model_type"), **data)
    check_config(family_of(config.model_type), config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert describe(model).total_parameters == PARAMETERS[name]
