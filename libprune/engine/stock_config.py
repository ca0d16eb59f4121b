"""What the Hugging Face config of a family can say: which keys are known, which sizes and biases they allow."""

import random

from transformers import PreTrainedConfig

from libprune.engine.errors import FamilyError, NotExpressibleError, nearest
from libprune.engine.family import Family, families


def bias_key(family: str, config: PreTrainedConfig, part: str) -> str | None:
    """The config key that gives all maps of a part a bias; None if this config class has none."""
    key = families()[family].config.biases.get(part)
    return key if key in type(config)().to_dict() else None  # not hasattr: configs keep stray keys that nothing reads


def check_config(family: Family, config: PreTrainedConfig, accept: tuple[str, ...] = ()) -> None:
    """Refuse config keys and values that the family file does not speak of."""
    for key, advice in _NOT_DENSE.items():
        if key in config.to_dict():
            raise FamilyError(f"this {config.model_type} model has {key!r} in its config: {advice}")
    known = family.config.known | set(accept) | PreTrainedConfig().to_dict().keys() | _BOOKKEEPING
    values = config.to_dict()
    unknown = [key for key in values if key not in known]
    if unknown:
        listed = ", ".join(f"{key!r} = {values[key]!r}" for key in unknown)
        raise FamilyError(
            f"the config of this {config.model_type} model has {listed}, of which family "
            f"{family.family!r} says nothing{nearest(unknown[0], known)}; if no size depends on it, list it in "
            "prepare.accept_config"
        )
    for key, allowed in family.config.fixed.items():
        if key in values and values[key] not in allowed:
            raise FamilyError(
                f"config key {key!r} = {values[key]!r} is not supported by family {family.family!r}: {allowed}"
            )


_NOT_DENSE = {
    "quantization_config": "prune the unquantized model and quantize the result",
    "per_layer_config": "its layers differ in width already; prune the dense model it came from",
}


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
    }
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
    data = config.to_dict()
    for key, expressions in family.config.expressions.items():
        values = {str(expr): expr.size(sizes) for expr in expressions}
        if len(set(values.values())) > 1:
            both = " and ".join(f"{text} = {value}" for text, value in values.items())
            raise NotExpressibleError(f"config key {key!r} of family {family.family!r} must be both {both}")
        data[key] = next(iter(values.values()))
    data[family.config.layers] = len(layers)
    for key in family.config.per_layer_lists:
        if data.get(key) is not None:
            data[key] = [data[key][layer] for layer in layers]
    try:
        return type(config).from_dict(data)
    except Exception as error:  # the strict config classes raise their own, undocumented types
        raise NotExpressibleError(f"{type(config).__name__} refuses the pruned shape: {_last_line(error)}") from error


def expressible(family: Family, config: PreTrainedConfig, sizes: dict[str, int], axis: str) -> tuple[int, ...] | None:
    """The counts of an axis, 1 to its size, that a stock config of the family can say; None if any.

    The config class itself is asked. On a long axis some counts are asked first, and if none of
    them is refused the rest is taken as said; writing the pruned config asks again.
    """

    def fits(count: int) -> bool:
        try:
            new_config(family, config, {**sizes, axis: count}, tuple(range(getattr(config, family.config.layers))))
        except NotExpressibleError:
            return False
        return True

    counts = range(1, sizes[axis] + 1)
    asked = counts if len(counts) <= _ASKED else random.Random(0).sample(counts, _ASKED)
    if all(map(fits, asked)):
        return None
    return tuple(filter(fits, counts))


_ASKED = 128


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
