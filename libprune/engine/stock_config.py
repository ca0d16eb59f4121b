"""What the Hugging Face config of a family can say: which keys are known, which sizes and biases they allow."""

import json
import random
from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedConfig

from libprune.engine.errors import FamilyError, NotExpressibleError, nearest
from libprune.engine.family import Family, families


def bias_key(family: str, config: PreTrainedConfig, part: str) -> str | None:
    """The config key that gives all maps of a part a bias; None if this config class has none."""
    told = families()[family]
    key = told.config.biases.get(part)
    known = type(told.sized(config))().to_dict()  # not hasattr: configs keep stray keys that nothing reads
    return key if key in known else None


def check_config(family: Family, config: PreTrainedConfig, accept: tuple[str, ...] = ()) -> None:
    """Refuse config keys and values that the family file does not speak of, in a nested config too."""
    own: PreTrainedConfig = family.sized(config)
    described = family.config.known | set(accept)
    if family.tower is not None:
        if own.model_type not in family.tower.model_types:
            raise FamilyError(
                f"the language model of this {config.model_type} model is of model_type {own.model_type!r}; family "
                f"{family.family!r} describes {', '.join(family.tower.model_types)}"
            )
        _check_keys(family, config, {family.tower.config, *family.tower.inert, *accept})
        described |= set(family.tower.inert)
    values = _check_keys(family, own, described)
    for key, allowed in family.config.fixed.items():
        if key in values and values[key] not in allowed:
            raise FamilyError(
                f"config key {key!r} = {values[key]!r} is not supported by family {family.family!r}: {allowed}"
            )


def _check_keys(family: Family, config: PreTrainedConfig, described: Collection[str]) -> dict[str, Any]:
    """Refuse keys of a config that are not described, and those of models that are not dense; return its values."""
    values = config.to_dict()
    for key, advice in _NOT_DENSE.items():
        if values.get(key) is not None and key not in family.config.fixed:
            raise FamilyError(f"this {config.model_type} model has {key!r} in its config: {advice}")
    known = {*described, *PreTrainedConfig().to_dict(), *_BOOKKEEPING, *_NOT_DENSE}
    unknown = [key for key in values if key not in known]
    if unknown:
        listed = ", ".join(f"{key!r} = {values[key]!r}" for key in unknown)
        raise FamilyError(
            f"the config of this {config.model_type} model has {listed}, of which family "
            f"{family.family!r} says nothing{nearest(unknown[0], known)}; if no size depends on it, list it in "
            "prepare.accept_config"
        )
    return values


def keys_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """All keys of a config as a mapping, those of nested configs too, but not the numbers that stand for labels."""
    nested = (key for value in config.values() if isinstance(value, dict) for key in value)
    return *config, *(key for key in nested if isinstance(key, str))


_NOT_DENSE = {
    "quantization_config": "prune the unquantized model and quantize the result",
    "per_layer_config": "its layers differ in width already; prune the dense model it came from",
}


_LAYERS, _SIZE = 2_000, 1_000_000
"""The most layers, and the largest size, that a config is believed; more would take hours to describe."""


def require_sizes(family: Family, config: PreTrainedConfig) -> None:
    """Stop where a config gives a size that is none, or is larger than that of any model.

    Raises:
        FamilyError: naming the key, and what it says.
    """
    limits = dict.fromkeys(family.config.sizes, _SIZE) | {family.config.layers: _LAYERS}
    for key, limit in limits.items():
        value = getattr(family.sized(config), key, None)
        given = [] if value is None else value if isinstance(value, list) else [value]
        for size in given:
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= limit:
                raise FamilyError(
                    f"config key {key!r} = {str(size)[:40]!r} is no size of a {config.model_type} model; it is a whole "
                    f"number from 1 to {limit:,}"
                )


_TRANSFORMERS_4 = """
torchscript use_bfloat16 tf_legacy_loss tie_encoder_decoder finetuning_task num_labels tokenizer_class prefix
decoder_start_token_id cross_attention_hidden_size max_length min_length do_sample early_stopping num_beams
num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
"""Keys that transformers 4 wrote into configs of every class; no size depends on them."""
_BOOKKEEPING = frozenset(
    {"bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "tie_word_embeddings"}
    | {
        "model_type",
        "transformers_version",
        "_name_or_path",
        "_model_name_or_path",
        "torch_dtype",
        "dtype",
        "use_cache",
        "auto_map",
        "pruned_heads",
        "task_specific_params",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
    }
    | frozenset(_TRANSFORMERS_4.split())
)


def new_config(
    family: Family, config: PreTrainedConfig, sizes: dict[str, int], layers: tuple[int, ...]
) -> PreTrainedConfig:
    """The config of a model whose every layer has the given sizes.

    Args:
        layers: the layers that are left, by their index in ``config``.

    Raises:
        NotExpressibleError: if a key would need two values, or the config class refuses the shape.
    """
    whole = config.to_dict()
    data = family.sized(whole)
    for key, expressions in family.config.expressions.items():
        if not expressions[0].names <= sizes.keys():  # of modules that this model lacks
            continue
        values = {str(expr): expr.size(sizes) for expr in expressions}
        if len(set(values.values())) > 1:
            both = " and ".join(f"{text} = {value}" for text, value in values.items())
            raise NotExpressibleError(f"config key {key!r} of family {family.family!r} must be both {both}")
        data[key] = next(iter(values.values()))
    data[family.config.layers] = len(layers)
    for key in family.config.per_layer_lists:
        if data.get(key) is not None:
            data[key] = [data[key][layer] for layer in layers]
    for key in family.config.layer_numbers:
        if data.get(key) is not None:
            data[key] = [new for new, layer in enumerate(layers) if layer in data[key]]
    for key in family.config.leading_layers:
        if data.get(key) is not None:
            data[key] = sum(layer < data[key] for layer in layers)
    data |= {key: value for key, value in family.config.written.items() if key in data}
    try:
        return type(config)(**whole)  # `from_dict` does the same, and then makes a text of all keys for the log
    except Exception as error:  # the strict config classes raise their own, undocumented types
        raise NotExpressibleError(f"{type(config).__name__} refuses the pruned shape: {_last_line(error)}") from error


def expressible(family: Family, config: PreTrainedConfig, sizes: dict[str, int], axis: str) -> tuple[int, ...] | None:
    """The counts of an axis, 1 to its size, that a stock config of the family can say; None if any.

    The config class itself is asked. On a long axis some counts are asked first, and if none of
    them is refused the rest is taken as said; writing the pruned config asks again. The answers of
    the last models are kept, since one process describes the same model several times.
    """
    own = family.sized(config)
    told = json.dumps([own.to_dict(), sizes, axis], sort_keys=True, default=str)
    asked = family.model_dump_json(), type(own), told
    if asked not in _SAID:
        if len(_SAID) >= _KEPT:
            del _SAID[next(iter(_SAID))]
        _SAID[asked] = _counts(family, config, sizes, axis)
    return _SAID[asked]


_KEPT = 1_000
_SAID: dict[tuple[str, type, str], tuple[int, ...] | None] = {}
"""What was said of an axis, by the family, the class of the config, and its values."""


def _counts(family: Family, config: PreTrainedConfig, sizes: dict[str, int], axis: str) -> tuple[int, ...] | None:
    def fits(count: int) -> bool:
        return _fits(family, config, {**sizes, axis: count})

    counts = range(1, sizes[axis] + 1)
    asked = counts if len(counts) <= _ASKED else random.Random(0).sample(counts, _ASKED)
    if all(map(fits, asked)):
        return None
    return tuple(filter(fits, counts))


def expressible_pairs(
    family: Family, config: PreTrainedConfig, sizes: dict[str, int], outer: str, inner: str
) -> tuple[tuple[int, int], ...] | None:
    """The numbers of groups, and of units in all of them, that a stock config of the family can say; None if any.

    Args:
        outer: the axis of the groups.
        inner: that of the units of a group, which all have the same number.
    """
    pairs = [(groups, each) for groups in range(1, sizes[outer] + 1) for each in range(1, sizes[inner] + 1)]
    said = [pair for pair in pairs if _fits(family, config, {**sizes, outer: pair[0], inner: pair[1]})]
    return None if said == pairs else tuple((groups, groups * each) for groups, each in said)


def _fits(family: Family, config: PreTrainedConfig, sizes: dict[str, int]) -> bool:
    """Whether a stock config of the family can say these sizes for all layers."""
    own, alone = family.sized(config), family.model_copy(update={"tower": None})
    try:
        new_config(alone, own, sizes, tuple(range(getattr(own, family.config.layers))))
    except NotExpressibleError:
        return False
    return True


_ASKED = 128


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
