"""From a transformers model and its family file to an `Architecture`. A closed world: whatever
the family file does not speak of stops here, by name.
"""

import random
from collections.abc import Collection, Iterator

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from libprune.engine.architecture import Architecture, Map, Parameter, PartShape
from libprune.engine.axes import Equation, Expr, LinearMap, parse_expr, parse_map, solve
from libprune.engine.errors import FamilyError, NotationError, NotExpressibleError, nearest
from libprune.engine.family import Family, Part, families, family_of
from libprune.engine.heads import SEQUENCE_CLASSIFICATION, Head, head_of

_TRANSPOSED = (Conv1D, nn.Embedding)
"""Modules that store the weight of a map as ``[input, output]``."""


def describe(model: PreTrainedModel, fingerprint: str = "", accept: tuple[str, ...] = ()) -> Architecture:
    """Solve the axes of a model; meta tensors are enough.

    Args:
        model: a transformers model of a known family.
        fingerprint: digest of its weights, kept in the result.
        accept: config keys that the family file does not know and the user vouches for.

    Raises:
        FamilyError: for an unknown family, head, config key or parameter, or sizes that contradict.
    """
    _refuse_experts(model.config)
    family, head = family_of(model.config.model_type), head_of([type(model).__name__])
    _require_head(family, head, model)
    check_config(family, model.config, accept)
    parameters, maps = _walk(model, family, head)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    try:
        sizes = solve(_config_equations(family, model.config) + _weight_equations(parameters, shapes))
    except NotationError as error:
        raise FamilyError(f"family {family.family!r} does not fit this model: {error}") from error
    return Architecture(
        family=family.family,
        head=head.name,
        head_macs=_head_macs(model, family, head),
        sizes=sizes,
        layers=_layers(model, family),
        layers_path=family.layers,
        parts={
            name: PartShape(part.axis, part.module, _counts(family, model.config, sizes, part), part.coupled)
            for name, part in family.parts.items()
        },
        parameters=tuple(parameters),
        maps=tuple(maps),
        cache=None if family.cache is None else parse_expr(family.cache),
        fingerprint=fingerprint,
    )


def without_weights(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config on the meta device: modules and shapes alone."""
    with torch.device("meta"):
        loader = head_of(config.architectures).loader
        model: PreTrainedModel = loader.from_config(config, trust_remote_code=trust_remote_code)
    return model


def bias_key(family: str, config: PreTrainedConfig, part: str) -> str | None:
    """The config key that gives all maps of a part a bias; None if this config class has none."""
    key = families()[family].config.biases.get(part)
    return key if key in type(config)().to_dict() else None  # not hasattr: configs keep stray keys that nothing reads


def with_biases(
    architecture: Architecture, config: PreTrainedConfig, parts: Collection[str]
) -> tuple[Architecture, PreTrainedConfig]:
    """The same model with a bias on every map of the given parts, as its config can say it.

    Raises:
        NotExpressibleError: naming a part whose config has no key for that.
    """
    if not parts:
        return architecture, config
    data = config.to_dict()
    for part in parts:
        key = bias_key(architecture.family, config, part)
        if key is None:
            raise NotExpressibleError(f"the config of this {config.model_type} model cannot say biases in its {part}")
        data[key] = True
    biased = type(config).from_dict(data)
    return describe(without_weights(biased), architecture.fingerprint, accept=tuple(data)), biased


def _require_head(family: Family, head: Head, model: PreTrainedModel) -> None:
    if head.name not in family.heads:
        raise FamilyError(
            f"this {model.config.model_type} model is a {type(model).__name__}, of head {head.name}; family "
            f"{family.family!r} describes {', '.join(family.heads)}"
        )
    if head is SEQUENCE_CLASSIFICATION and model.config.num_labels < 2:
        raise FamilyError(
            f"this {model.config.model_type} model has {model.config.num_labels} label; a model that tells classes "
            "apart needs two, and models of numbers are not supported"
        )


def _refuse_experts(config: PreTrainedConfig) -> None:
    found = next((getattr(config, key) for key in _EXPERTS if getattr(config, key, None)), None)
    if found:
        raise FamilyError(
            f"this {config.model_type} model is a mixture of {found} experts; only dense models can be pruned so far"
        )


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


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


def _counts(family: Family, config: PreTrainedConfig, sizes: dict[str, int], part: Part) -> tuple[int, ...] | None:
    return (sizes[part.axis],) if part.coupled else expressible(family, config, sizes, part.axis)


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


def _config_equations(family: Family, config: PreTrainedConfig) -> list[Equation]:
    return [
        Equation(expr, getattr(config, key), f"config key {key!r}")
        for key, expressions in family.config.expressions.items()
        for expr in expressions
        if getattr(config, key, None) is not None
    ]


def _weight_equations(parameters: list[Parameter], shapes: dict[str, tuple[int, ...]]) -> list[Equation]:
    for parameter in parameters:
        if len(parameter.dims) != len(shapes[parameter.name]):
            raise FamilyError(
                f"{parameter.name} has shape {list(shapes[parameter.name])}, described as {_dims(parameter)}"
            )
    return [
        Equation(expr, shapes[parameter.name][dim], f"dimension {dim} of {parameter.name}")
        for parameter in parameters
        for dim, expr in enumerate(parameter.dims)
    ]


def _dims(parameter: Parameter) -> str:
    return "[" + ", ".join(map(str, parameter.dims)) + "]"


def _walk(model: PreTrainedModel, family: Family, head: Head) -> tuple[list[Parameter], list[Map]]:
    """Every parameter once, and every map of the layers, in the model's own order."""
    own = [name for name, _ in model.named_parameters()]
    found: dict[str, Parameter] = {}
    maps: list[Map] = []
    for path, layer, part, description in _described(model, family, head):
        module = _module(model, path, family)
        transposed = isinstance(module, _TRANSPOSED)
        if isinstance(description, LinearMap) and layer is not None and part is not None:
            maps.append(Map(path, layer, part, description.input, description.output, transposed))
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(description, Expr) or name in {"weight", "bias"}:
                dims = _parameter_dims(name, description, transposed)
                found[f"{path}.{name}"] = Parameter(f"{path}.{name}", dims, layer, part)
    undescribed = [name for name in own if name not in found]
    if undescribed:
        raise FamilyError(
            f"family {family.family!r} does not describe {len(undescribed)} parameter(s) of this model, the first "
            f"{undescribed[0]!r}; add its module to libprune/families/{family.family}.yaml (docs/notation.md)"
        )
    return [found[name] for name in own], maps


def _described(
    model: PreTrainedModel, family: Family, head: Head
) -> Iterator[tuple[str, int | None, str | None, LinearMap | Expr]]:
    for layer in range(_layers(model, family)):
        for name, part in family.parts.items():
            for path, description in part.parsed.items():
                yield f"{family.layers}.{layer}.{path}", layer, name, description
        for path, text in family.stream.items():
            yield f"{family.layers}.{layer}.{path}", layer, None, parse_map(text)
    for path, text in {**family.outside, **family.heads[head.name]}.items():
        yield path, None, None, parse_map(text)


def _head_macs(model: PreTrainedModel, family: Family, head: Head) -> int:
    if head is SEQUENCE_CLASSIFICATION:
        return 0
    outside = {**family.outside, **family.heads[head.name]}
    modules = [_module(model, path, family) for path in outside]
    return sum(module.get_parameter("weight").numel() for module in modules if isinstance(module, nn.Linear | Conv1D))


def _layers(model: PreTrainedModel, family: Family) -> int:
    return len(list(_module(model, family.layers, family).children()))


def _module(model: PreTrainedModel, path: str, family: Family) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise FamilyError(f"family {family.family!r} describes module {path!r}, which this model lacks") from error


def _parameter_dims(name: str, description: LinearMap | Expr, transposed: bool) -> tuple[Expr, ...]:
    if isinstance(description, Expr):
        return (description,)
    if name == "bias":
        return (description.output,)
    return (description.input, description.output) if transposed else (description.output, description.input)
