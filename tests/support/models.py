"""Tiny random models, one entry a family; kinds of plans; and the way from a model and a plan to a pruned folder."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    ApertusConfig,
    ArceeConfig,
    BertConfig,
    Cohere2Config,
    DeepseekV2Config,
    DeepseekV3Config,
    DistilBertConfig,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    LlavaConfig,
    MiniMaxM2Config,
    Ministral3Config,
    Mistral3Config,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    MPNetConfig,
    NanoChatConfig,
    NemotronHConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3VLConfig,
    RobertaConfig,
    SeedOssConfig,
    SmolLM3Config,
    SmolVLMConfig,
    Starcoder2Config,
)

from libprune.engine.architecture import Architecture, Experts, Heads
from libprune.engine.describe import describe
from libprune.engine.heads import HEADS, HeadName
from libprune.engine.plan import Plan
from libprune.engine.stacks import exposed
from libprune.engine.surgery import slice_state
from libprune.models.folder import WeightFiles, load_model
from libprune.results.folder import write_pruned

VOCAB = 37
WINDOW = 5
"""Tokens that a sliding layer sees; prompts are longer, so that the window shows."""

_SHORT = {"vocab_size": VOCAB, "num_hidden_layers": 4, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
FFN = {"intermediate_size": 13}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
"""Widths in multiples of 16 bytes, which the grouped kernels of PyTorch need."""
_TOP_2 = {"num_local_experts": 6, "num_experts_per_tok": 2}
_IN_GROUPS = EXPERTS | {"n_routed_experts": 10, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 2}
_LATENT = {"hidden_size": 28, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 10} | {
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
_DELTA_NET = {"linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_conv_kernel_dim": 4}
_DELTA_NET |= {"linear_key_head_dim": 5, "linear_value_head_dim": 7}
_HYBRID = ["linear_attention", "full_attention"] * 2
_ONE_PART_EACH = ["linear_attention", "moe", *["full_attention", "linear_attention"] * 2, "moe", "mlp"]
_MAMBA = {"mamba_num_heads": 6, "mamba_head_dim": 5, "n_groups": 2, "ssm_state_size": 7, "conv_kernel": 3}
_MAMBA |= {"chunk_size": 8}
_MIXED_LAYERS = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
_SHARED_HEADS = {"num_hidden_layers": 6, "num_kv_shared_layers": 3}
_SHARED_HEADS |= {
    "layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 2, *["full_attention"] * 2]
}
_LONG_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_model(
    config_class: type[PreTrainedConfig], head: HeadName = "causal_lm", **settings: Any
) -> Callable[[int], PreTrainedModel]:
    """Makes a model of the config from a seed, every parameter random, norms and biases too."""

    def make(seed: int) -> PreTrainedModel:
        common = {} if "text_config" in settings else _SHORT
        model: PreTrainedModel = HEADS[head].loader.from_config(config_class(**{**common, **settings}))
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        return model.eval()

    return make


def heads(hidden: int, groups: int, queries: int, head_dim: int | None = None) -> dict[str, int]:
    """Hidden size, `groups` KV heads, `queries` query heads for each; without a head size the config's own rule."""
    explicit = {} if head_dim is None else {"head_dim": head_dim}
    return {"hidden_size": hidden, "num_key_value_heads": groups, "num_attention_heads": groups * queries, **explicit}


def tiny_tower(
    config_class: type[PreTrainedConfig], text: dict[str, Any], vision: dict[str, Any], **settings: Any
) -> Callable[[int], PreTrainedModel]:
    """Makes a model that reads images too; both parts have odd sizes, and image tokens are the last of the vocabulary.

    Args:
        text: the nested config of the language model, beside `_SHORT` and `FFN`.
        vision: that of the vision part, beside what all of them have.
        settings: the keys beside the two.
    """
    seen = {"hidden_size": 20, "intermediate_size": 11, "patch_size": 2} | vision
    nested = {"text_config": {**_SHORT, **FFN, **text}, "vision_config": seen}

    def make(seed: int) -> PreTrainedModel:
        return tiny_model(config_class, "image_text_to_text", **deepcopy(nested), **settings)(seed)

    return make


_ENCODER = {"hidden_size": 24, "num_attention_heads": 4, "max_position_embeddings": 50}
_BEHIND_PADDING = _ENCODER | {"max_position_embeddings": 52, "pad_token_id": 1}

# Odd sizes that tell the axes apart, and all that a family can have: biases, tied weights, windows.
FAMILIES: dict[str, Callable[[int], PreTrainedModel]] = {
    "llama": tiny_model(
        LlamaConfig, **FFN, **heads(30, 3, 2, 8), attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama_mha": tiny_model(LlamaConfig, **FFN, **heads(36, 6, 1), rope_parameters=_LONG_ROPE),
    "mistral": tiny_model(MistralConfig, **FFN, **heads(28, 2, 3, 10), sliding_window=WINDOW),
    "qwen2": tiny_model(Qwen2Config, **FFN, **heads(36, 3, 2), **_MIXED_LAYERS),
    "qwen3": tiny_model(
        Qwen3Config, **FFN, **heads(26, 3, 3, 4), **_MIXED_LAYERS, attention_bias=True, tie_word_embeddings=True
    ),
    "gemma2": tiny_model(Gemma2Config, **FFN, **heads(24, 2, 2, 6), sliding_window=WINDOW, query_pre_attn_scalar=6),
    "gemma3": tiny_model(
        Gemma3TextConfig, **FFN, **heads(24, 4, 2, 6), sliding_window=WINDOW, sliding_window_pattern=2
    ),
    "gemma4_text": tiny_model(
        Gemma4TextConfig,
        **FFN,
        **heads(24, 3, 2, 4),
        **_SHARED_HEADS,
        global_head_dim=4,
        hidden_size_per_layer_input=5,
        vocab_size_per_layer_input=VOCAB,
        sliding_window=WINDOW,
    ),
    "phi3": tiny_model(Phi3Config, **FFN, **heads(36, 3, 2)),
    "gpt2": tiny_model(GPT2Config, n_embd=24, n_head=4, n_positions=50, n_inner=13),
    "gpt_neox": tiny_model(GPTNeoXConfig, **FFN, hidden_size=24, num_attention_heads=3, rotary_pct=0.5),
    "opt": tiny_model(
        OPTConfig,
        activation_function="gelu",
        hidden_size=24,
        num_attention_heads=4,
        ffn_dim=13,
        max_position_embeddings=50,
    ),
    "smollm3": tiny_model(SmolLM3Config, **FFN, **heads(36, 3, 2), no_rope_layer_interval=2),
    "olmo2": tiny_model(Olmo2Config, **FFN, **heads(36, 3, 2)),
    "starcoder2": tiny_model(Starcoder2Config, **FFN, **heads(36, 3, 2), sliding_window=WINDOW),
    "qwen3_moe": tiny_model(
        Qwen3MoeConfig,
        **FFN,
        **heads(28, 3, 2, 4),
        **EXPERTS,
        num_local_experts=6,
        mlp_only_layers=[1],
        norm_topk_prob=True,
    ),
    "mixtral": tiny_model(
        MixtralConfig, intermediate_size=16, **heads(28, 3, 2, 4), num_local_experts=6, sliding_window=WINDOW
    ),
    "olmoe": tiny_model(
        OlmoeConfig, intermediate_size=16, **heads(24, 3, 2), num_experts=5, num_experts_per_tok=2, clip_qkv=2.0
    ),
    "qwen2_moe": tiny_model(
        Qwen2MoeConfig,
        **FFN,
        **heads(36, 3, 2),
        **EXPERTS,
        **_MIXED_LAYERS,
        num_experts=5,
        shared_expert_intermediate_size=7,
        mlp_only_layers=[2],
    ),
    "glm4_moe": tiny_model(
        Glm4MoeConfig,
        **FFN,
        **heads(28, 3, 2, 4),
        **_IN_GROUPS,
        n_shared_experts=1,
        use_qk_norm=True,
        attention_bias=True,
    ),
    "minimax_m2": tiny_model(MiniMaxM2Config, intermediate_size=16, **heads(28, 3, 2, 4), **_TOP_2),
    "gpt_oss": tiny_model(GptOssConfig, intermediate_size=16, **heads(28, 3, 2, 4), **_TOP_2, sliding_window=WINDOW),
    "deepseek_v3": tiny_model(DeepseekV3Config, **FFN, **_LATENT, **_IN_GROUPS, n_shared_experts=2, q_lora_rank=5),
    "deepseek_v2": tiny_model(
        DeepseekV2Config,
        **FFN,
        **_LATENT,
        **_IN_GROUPS,
        n_shared_experts=2,
        q_lora_rank=None,
        topk_method="group_limited_greedy",
    ),
    "glm4_moe_lite": tiny_model(
        Glm4MoeLiteConfig,
        **FFN,
        **_LATENT,
        **EXPERTS,
        n_routed_experts=6,
        n_shared_experts=1,
        q_lora_rank=5,
        mlp_layer_types=["dense", "sparse", "dense", "sparse"],
    ),
    "qwen3_next": tiny_model(
        Qwen3NextConfig,
        **FFN,
        **heads(28, 3, 2, 6),
        **EXPERTS,
        **_DELTA_NET,
        shared_expert_intermediate_size=5,
        num_experts=6,
        mlp_only_layers=[1],
        layer_types=_HYBRID,
    ),
    "qwen3_5": tiny_model(
        Qwen3_5TextConfig, **FFN, **heads(30, 2, 3, 6), **_DELTA_NET, layer_types=_HYBRID, tie_word_embeddings=True
    ),
    "qwen3_5_moe": tiny_model(
        Qwen3_5MoeTextConfig,
        **heads(28, 3, 2, 6),
        **EXPERTS,
        **_DELTA_NET,
        shared_expert_intermediate_size=5,
        num_experts=6,
        layer_types=_HYBRID,
    ),
    "nemotron_h": tiny_model(
        NemotronHConfig,
        **FFN,
        **heads(28, 3, 2, 6),
        **EXPERTS,
        **_MAMBA,
        moe_shared_expert_intermediate_size=5,
        n_routed_experts=6,
        num_hidden_layers=len(_ONE_PART_EACH),
        layers_block_type=_ONE_PART_EACH,
        use_bias=True,
        mlp_bias=True,
        mlp_hidden_act="gelu",
    ),
    "granite": tiny_model(
        GraniteConfig,
        **FFN,
        **heads(36, 3, 2),
        attention_bias=True,
        residual_multiplier=0.3,
        attention_multiplier=0.4,
        embedding_multiplier=3.0,
        logits_scaling=0.5,
    ),
    "ministral3": tiny_model(Ministral3Config, **FFN, **heads(28, 2, 3, 10), sliding_window=WINDOW),
    "glm4": tiny_model(Glm4Config, **FFN, **heads(26, 3, 3, 4)),
    "olmo3": tiny_model(Olmo3Config, **FFN, **heads(36, 3, 2), sliding_window=WINDOW),
    "exaone4": tiny_model(Exaone4Config, **FFN, **heads(24, 2, 2, 6), sliding_window=WINDOW, sliding_window_pattern=2),
    "seed_oss": tiny_model(SeedOssConfig, **FFN, **heads(26, 3, 2, 6), attention_out_bias=True, mlp_bias=True),
    "hunyuan_v1_dense": tiny_model(HunYuanDenseV1Config, **FFN, **heads(26, 3, 2, 6), tie_word_embeddings=True),
    "apertus": tiny_model(ApertusConfig, **FFN, **heads(36, 3, 2), attention_bias=True),
    "ernie4_5": tiny_model(Ernie4_5Config, **FFN, **heads(28, 2, 3, 10), use_bias=True),
    "cohere2": tiny_model(
        Cohere2Config, **FFN, **heads(36, 3, 2), sliding_window=WINDOW, sliding_window_pattern=2, logit_scale=1.0
    ),
    "gemma": tiny_model(GemmaConfig, **FFN, **heads(28, 2, 3, 10)),
    "arcee": tiny_model(ArceeConfig, **FFN, **heads(30, 3, 2, 8), mlp_bias=True),
    "nanochat": tiny_model(NanoChatConfig, **FFN, **heads(36, 3, 2)),
    "bert": tiny_model(BertConfig, "masked_lm", **FFN, **_ENCODER),
    "bert_classifier": tiny_model(BertConfig, "sequence_classification", **FFN, **_ENCODER, num_labels=3),
    "bert_embedding": tiny_model(BertConfig, "embedding", **FFN, **_ENCODER),
    "roberta": tiny_model(RobertaConfig, "embedding", **FFN, **_BEHIND_PADDING),
    "distilbert": tiny_model(
        DistilBertConfig, "embedding", dim=24, n_heads=4, hidden_dim=13, max_position_embeddings=50
    ),
    "mpnet": tiny_model(MPNetConfig, "embedding", **FFN, **_BEHIND_PADDING),
    "modernbert": tiny_model(
        ModernBertConfig,
        "embedding",
        **FFN,
        hidden_size=24,
        num_attention_heads=4,
        local_attention=2 * WINDOW,
        attention_bias=True,
        norm_bias=True,
        cls_token_id=None,
        sep_token_id=None,
    ),
}


_IMAGE = VOCAB - 1
_SIGHT = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 4}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
TOWERS: dict[str, Callable[[int], PreTrainedModel]] = {
    "qwen3_vl": tiny_tower(
        Qwen3VLConfig,
        {**heads(26, 3, 3, 8), "attention_bias": True, "rope_parameters": _MROPE},
        {"depth": 2, "num_heads": 5, "out_hidden_size": 26, "num_position_embeddings": 9}
        | {"deepstack_visual_indexes": [0, 1]},
        image_token_id=_IMAGE,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
        tie_word_embeddings=True,
    ),
    "qwen2_5_vl": tiny_tower(
        Qwen2_5_VLConfig,
        {**heads(36, 3, 2), "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1]}},
        {"depth": 2, "num_heads": 5, "out_hidden_size": 36, "window_size": 8, "fullatt_block_indexes": [1]},
        image_token_id=_IMAGE,
        video_token_id=VOCAB - 2,
        vision_start_token_id=VOCAB - 3,
        vision_end_token_id=VOCAB - 4,
    ),
    "gemma3_vision": tiny_tower(
        Gemma3Config,
        {**heads(24, 4, 2, 6), "sliding_window": WINDOW, "sliding_window_pattern": 2},
        {"model_type": "siglip_vision_model", **_SIGHT},
        mm_tokens_per_image=1,
        image_token_index=_IMAGE,
        boi_token_index=VOCAB - 3,
        eoi_token_index=VOCAB - 4,
    ),
    "mistral3": tiny_tower(
        Mistral3Config,
        {"model_type": "mistral", **heads(28, 2, 3, 10), "tie_word_embeddings": False},
        {"model_type": "pixtral", **_SIGHT, "head_dim": 10, "image_size": 8},
        image_token_index=_IMAGE,
        tie_word_embeddings=False,
    ),
    "ministral3": tiny_tower(
        Mistral3Config,
        {"model_type": "ministral3", **heads(28, 2, 3, 10)},
        {"model_type": "pixtral", **_SIGHT, "head_dim": 10, "image_size": 8},
        image_token_index=_IMAGE,
    ),
    "llava": tiny_tower(
        LlavaConfig,
        {"model_type": "llama", **heads(36, 3, 2)},
        {"model_type": "clip_vision_model", **_SIGHT, "projection_dim": 9},
        image_token_index=_IMAGE,
    ),
    "smolvlm": tiny_tower(
        SmolVLMConfig,
        {"model_type": "llama", **heads(30, 3, 2, 8)},
        _SIGHT,
        image_token_id=_IMAGE,
        tie_word_embeddings=True,
    ),
}
"""Language models inside models that read images, whose layers can only be written all alike."""

MODELS = FAMILIES | {name: TOWERS[name] for name in ("qwen3_vl", "qwen2_5_vl", "gemma3_vision", "mistral3")}
"""Those that pass the whole contract; the other towers have the same code, and tests/whole/test_towers.py runs them."""
EMBEDDINGS = ("bert_embedding", "roberta", "distilbert", "mpnet", "modernbert")
"""Those without a head."""
ENCODERS = ("bert", "bert_classifier", *EMBEDDINGS)
"""Those that read all tokens at once, and do not write."""
MIXTURES = (
    "qwen3_moe",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "glm4_moe",
    "minimax_m2",
    "gpt_oss",
    "deepseek_v3",
    "deepseek_v2",
    "glm4_moe_lite",
    "qwen3_next",
    "qwen3_5_moe",
    "nemotron_h",
)
"""Mixtures of experts."""
OF_ONE_FILE = ("granite", "ministral3", "glm4", "olmo3", "exaone4", "seed_oss", "hunyuan_v1_dense", "apertus")
OF_ONE_FILE += ("ernie4_5", "gemma", "arcee", "nanochat", "deepseek_v2", "glm4_moe_lite", "qwen3_5_moe")
"""Families whose layers are made as those of others, in other names and keys: two kinds of plans show all of it."""
LAYOUTS = ("llama", "qwen3", "phi3", "gemma2", "gpt2", "gpt_neox", "opt")
"""Families that differ in what statistics and repair meet: biases, norms on heads, fused maps, norms behind the parts,
[in, out] storage, heads side by side with parallel parts, an MLP on flattened tokens."""


MAMBA = tiny_model(
    NemotronHConfig,
    **FFN,
    **heads(28, 3, 2, 6),
    **_MAMBA,
    layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention"],
    use_bias=True,
    mlp_hidden_act="gelu",
)
"""Nemotron-H without a mixture of experts, and without channels that no token needs."""
KINDS = (*LAYOUTS, "bert", "bert_classifier", "qwen3_moe", "qwen3_next", "nemotron_h")
"""Families that together have every mechanism of the engine; all others are described by the same means."""


def tiny_exposed(name: str) -> PreTrainedModel:
    """A tiny model of a family, its mixtures run by modules that hooks can watch."""
    model = FAMILIES[name](0)
    return exposed(model, describe(model))


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    """Token ids, the same in every call; longer than the window of the sliding layers."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def outputs(model: torch.nn.Module, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """What a model gives: logits, or the last hidden states of one without a head."""
    given: torch.Tensor = model(ids, **options)[0]
    return given


Counts = Callable[[int, str], int]
"""Units kept in a (layer, part)."""


def plan_of(architecture: Architecture, counts: Counts, seed: int = 0) -> Plan:
    """Keeps the given counts; which units stay is random and differs by layer. All groups of a part keep as many."""
    rng = np.random.default_rng(seed)

    def keep(layer: int, part: str) -> np.ndarray:
        groups = architecture.parts[part].groups
        each, kept = architecture.units(part) // groups, counts(layer, part) // groups
        return np.concatenate([rng.permutation(np.arange(each) < kept) for _ in range(groups)])

    return Plan({block: keep(*block) for block in architecture.blocks()})


def some_counts(architecture: Architecture, part: str) -> list[int]:
    """The numbers of units above 0 that a layer may keep of a part."""
    shape, units = architecture.parts[part], architecture.units(part)
    if shape.coupled:
        return [units]
    step = shape.groups * architecture.multiple(part)
    return list(range(max(shape.least, step), units + 1, step))


def _uniform(architecture: Architecture, rng: np.random.Generator) -> Counts:
    def fewer(part: str) -> list[int]:
        return [n for n in some_counts(architecture, part)[:-1] if architecture.parts[part].says(n)]

    count = {part: int(rng.choice(fewer(part) or [architecture.units(part)])) for part in architecture.parts}
    return lambda layer, part: count[part]


def _per_layer(architecture: Architecture, rng: np.random.Generator) -> Counts:
    count = {block: int(rng.choice(some_counts(architecture, block[1]))) for block in architecture.blocks()}
    return lambda layer, part: count[layer, part]


def _channels(architecture: Architecture, rng: np.random.Generator) -> Counts:
    """All attentions stay whole, and all other parts lose as many units."""
    fewer = _uniform(architecture, rng)
    return lambda layer, part: architecture.units(part) if part == "attention" else fewer(layer, part)


def _holes(architecture: Architecture, rng: np.random.Generator) -> Counts:
    """The first part of layer 0, the last of layer 1, and layer 2 or its first part are gone, as far as they can."""
    left = _per_layer(architecture, rng)
    last = architecture.parts_of(2)[:1] if architecture.layers_stay else architecture.parts_of(2)
    gone = {(0, architecture.parts_of(0)[0]), (1, architecture.parts_of(1)[-1])}
    gone = {block for block in gone if not architecture.parts[block[1]].least} | {(2, part) for part in last}
    return lambda layer, part: 0 if (layer, part) in gone else left(layer, part)


def _shallow(architecture: Architecture, rng: np.random.Generator) -> Counts:
    """One whole layer is gone, the others keep everything."""
    deleted = int(rng.integers(architecture.layers))
    return lambda layer, part: 0 if layer == deleted else architecture.units(part)


PLANS = {
    "uniform": _uniform,
    "channels": _channels,
    "per_layer": _per_layer,
    "holes": _holes,
    "shallow": _shallow,
}
"""Kinds of plans, by name; `uniform`, `channels` and `shallow` fit the stock config of a family."""


def random_plan(architecture: Architecture, kind: str, seed: int = 0) -> Plan:
    """A plan of one of the `PLANS`."""
    return plan_of(architecture, PLANS[kind](architecture, np.random.default_rng(seed)), seed)


def plan_of_heads(architecture: Architecture, counts: Callable[[int], tuple[int, int]], seed: int = 0) -> Plan:
    """Keeps so many groups, and so many query heads in each, of every layer; which ones is random. Else whole."""
    rng, keep = np.random.default_rng(seed), dict(Plan.dense(architecture).keep)
    for layer, part in keep:
        if (shape := architecture.parts[part]).outer:
            groups, each = counts(layer)
            stay = rng.permutation(np.arange(shape.groups) < groups)
            heads = np.arange(architecture.units(part) // shape.groups) < each
            keep[layer, part] = np.concatenate([rng.permutation(heads) & of_group for of_group in stay])
    return Plan(keep)


@dataclass(frozen=True)
class Dense:
    """A model, its folder and its description."""

    folder: Path
    model: PreTrainedModel
    architecture: Architecture


@dataclass(frozen=True)
class Pruned:
    """A pruned model as it was reloaded from its folder; ``custom``: with the folder's own modeling file."""

    dense: Dense
    plan: Plan
    folder: Path
    custom: bool
    model: PreTrainedModel

    def reload(self) -> PreTrainedModel:
        """Another copy, for tests that change the model."""
        return load_model(self.folder, torch.float32, trust_remote_code=self.custom)


def write_dense(model: PreTrainedModel, folder: Path, experts: Experts = "whole", heads: Heads = "groups") -> Dense:
    """Save a model and load it again, as the pipeline has it."""
    model.save_pretrained(folder, save_original_format=False)
    loaded = load_model(folder, torch.float32)
    architecture = describe(loaded, experts=experts, heads=heads)
    return Dense(folder, exposed(loaded, architecture), architecture)


def prune(dense: Dense, plan: Plan, custom: bool, folder: Path) -> Pruned:
    """Slice, write and reload, in the stock config's shape or with a modeling file of its own."""
    state = slice_state(WeightFiles(dense.folder), dense.architecture, plan)
    shape = "per_layer" if custom else "uniform"
    write_pruned(folder, dense.folder, dense.architecture, plan, shape, state)
    return Pruned(dense, plan, folder, custom, load_model(folder, torch.float32, trust_remote_code=custom))
