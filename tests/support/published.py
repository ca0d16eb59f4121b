"""Configs of published models."""

import json
from pathlib import Path

_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "use_cache": True}


_QWEN = {"attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu"}


_GEMMA = {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "cache_implementation": "hybrid"}


_BERT = {"model_type": "bert", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1}


_ROBERTA = {"attention_probs_dropout_prob": 0.1, "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "gelu"}
_ROBERTA |= {"hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072}
_ROBERTA |= {"max_position_embeddings": 514, "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1}
_ROBERTA |= {"position_embedding_type": "absolute", "type_vocab_size": 1, "use_cache": True}


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
    "all-MiniLM-L6-v2": {"model_type": "bert", "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1}
    | {"_name_or_path": "nreimers/MiniLM-L6-H384-uncased", "gradient_checkpointing": False, "hidden_act": "gelu"}
    | {"hidden_dropout_prob": 0.1, "hidden_size": 384, "initializer_range": 0.02, "intermediate_size": 1536}
    | {"layer_norm_eps": 1e-12, "max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 6}
    | {"pad_token_id": 0, "position_embedding_type": "absolute", "type_vocab_size": 2, "use_cache": True}
    | {"transformers_version": "4.8.2", "vocab_size": 30522},
    "roberta-base": _ROBERTA
    | {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "layer_norm_eps": 1e-5, "vocab_size": 50265},
    "multilingual-e5-base": _ROBERTA
    | {"model_type": "xlm-roberta", "architectures": ["XLMRobertaModel"], "layer_norm_eps": 1e-5, "output_past": True}
    | {"vocab_size": 250002},
    "distilbert-base-uncased": {"model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "dropout": 0.1}
    | {"activation": "gelu", "attention_dropout": 0.1, "dim": 768, "hidden_dim": 3072, "initializer_range": 0.02}
    | {"max_position_embeddings": 512, "n_heads": 12, "n_layers": 6, "pad_token_id": 0, "qa_dropout": 0.1}
    | {"seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True, "vocab_size": 30522},
    "all-mpnet-base-v2": {"model_type": "mpnet", "architectures": ["MPNetModel"], "attention_probs_dropout_prob": 0.1}
    | {"bos_token_id": 0, "eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768}
    | {"initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-5, "max_position_embeddings": 514}
    | {"num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "relative_attention_num_buckets": 32}
    | {"vocab_size": 30527},
    "ModernBERT-base": {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], "vocab_size": 50368}
    | {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 50281, "classifier_activation": "gelu"}
    | {"classifier_bias": False, "classifier_dropout": 0.0, "classifier_pooling": "mean", "cls_token_id": 50281}
    | {"decoder_bias": True, "deterministic_flash_attn": False, "embedding_dropout": 0.0, "eos_token_id": 50282}
    | {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "gradient_checkpointing": False}
    | {"hidden_activation": "gelu", "hidden_size": 768, "initializer_cutoff_factor": 2.0, "initializer_range": 0.02}
    | {"intermediate_size": 1152, "layer_norm_eps": 1e-5, "local_attention": 128, "local_rope_theta": 10000.0}
    | {"max_position_embeddings": 8192, "mlp_bias": False, "mlp_dropout": 0.0, "norm_bias": False, "norm_eps": 1e-5}
    | {"num_attention_heads": 12, "num_hidden_layers": 22, "pad_token_id": 50283, "position_embedding_type": "absolute"}
    | {"sep_token_id": 50282, "tie_word_embeddings": True},
}


def write_config(folder: Path, config: dict) -> Path:
    """A folder that holds a config and no weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
