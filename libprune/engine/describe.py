"""From a transformers model and its family file to an `Architecture`. A closed world: whatever
the family file does not speak of stops here, by name.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from libprune.engine.architecture import Architecture, Map, Parameter, PartShape
from libprune.engine.axes import Equation, Expr, LinearMap, parse_expr, parse_map, solve
from libprune.engine.errors import FamilyError, NotationError, NotExpressibleError, naming
from libprune.engine.family import Family, described_by, family_of
from libprune.engine.heads import EMBEDDING, SEQUENCE_CLASSIFICATION, Head, head_of
from libprune.engine.stock_config import bias_key, check_config, expressible, require_sizes

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
    if head is EMBEDDING:
        family = family.headless(model.base_model_prefix)
    check_config(family, model.config, accept)
    require_sizes(family, model.config)
    parameters, maps = _walk(model, family, head)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    equations = _config_equations(family, model.config) + tensor_equations(parameters, shapes)
    sizes = solve_for(family.family, "model", equations)
    return Architecture(
        family=family.family,
        head=head.name,
        head_macs=_head_macs(model, family, head),
        sizes=sizes,
        layers=_layers(model, family),
        layers_path=family.layers,
        parts={
            name: PartShape(part.axis, part.module, _counts(family, model.config, sizes, name), family.coupled(name))
            for name, part in family.parts.items()
        },
        parameters=tuple(parameters),
        maps=tuple(maps),
        cache=None if family.cache is None else parse_expr(family.cache),
        fingerprint=fingerprint,
        unused_positions=_unused_positions(family, model.config),
    )


def without_weights(config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config on the meta device: modules and shapes alone.

    Raises:
        FamilyError: for sizes that no model has, or a config that transformers can make no model of.
    """
    if family := described_by(config.model_type):
        require_sizes(family, config)
    with (
        naming(f"transformers can make no model of this {config.model_type} config", FamilyError),
        torch.device("meta"),
    ):
        loader = head_of(config.architectures).loader
        model: PreTrainedModel = loader.from_config(config, trust_remote_code=trust_remote_code)
    return model


def with_biases(
    architecture: Architecture, config: PreTrainedConfig, parts: Collection[str]
) -> tuple[Architecture, PreTrainedConfig]:
    """The description and config of a model with a bias on every map of the given parts, as its config can say it.

    Raises:
        NotExpressibleError: naming a part whose config has no key for that.
    """
    if not parts:
        return architecture, config
    keys = {part: bias_key(architecture.family, config, part) for part in architecture.parts}
    for part in parts:
        if keys[part] is None:
            raise NotExpressibleError(f"the config of this {config.model_type} model cannot say biases in its {part}")
    said = {keys[part]: True for part in parts}
    biases = {
        entry.weight: Parameter(entry.bias, (entry.output,), entry.layer, entry.part)
        for entry in architecture.maps
        if keys[entry.part] in said
    }
    known = {parameter.name for parameter in architecture.parameters}
    parameters: list[Parameter] = []
    for parameter in architecture.parameters:
        parameters.append(parameter)
        if (bias := biases.get(parameter.name)) and bias.name not in known:
            parameters.append(bias)
    return replace(architecture, parameters=tuple(parameters)), type(config).from_dict(config.to_dict() | said)


def added_biases(own: Architecture, architecture: Architecture) -> dict[str, Tensor]:
    """Zeros by name for the biases that `with_biases` has added to a model's own description, in float32."""
    known = {parameter.name for parameter in own.parameters}
    added = [parameter for parameter in architecture.parameters if parameter.name not in known]
    return {parameter.name: torch.zeros([dim.size(own.sizes) for dim in parameter.dims]) for parameter in added}


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
    number = next((getattr(config, key) for key in _EXPERTS if getattr(config, key, None)), None)
    if number:
        raise FamilyError(
            f"this {config.model_type} model is a mixture of {number} experts; only dense models can be pruned so far"
        )


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _counts(family: Family, config: PreTrainedConfig, sizes: dict[str, int], part: str) -> tuple[int, ...] | None:
    axis = family.parts[part].axis
    return (sizes[axis],) if family.coupled(part) else expressible(family, config, sizes, axis)


def _config_equations(family: Family, config: PreTrainedConfig) -> list[Equation]:
    return [
        Equation(expr, getattr(config, key), f"config key {key!r}")
        for key, expressions in family.config.expressions.items()
        for expr in expressions
        if getattr(config, key, None) is not None
    ]


def tensor_equations(tensors: Iterable[Parameter], shapes: Mapping[str, tuple[int, ...]]) -> list[Equation]:
    """What the shapes of stored tensors, given by name, say of the sizes of their axes.

    Raises:
        FamilyError: for a tensor that has another number of dimensions than its description.
    """
    equations = []
    for tensor in tensors:
        shape = shapes[tensor.name]
        if len(tensor.dims) != len(shape):
            described = ", ".join(map(str, tensor.dims))
            raise FamilyError(f"{tensor.name} has shape {list(shape)}, described as [{described}]")
        for dim, (expr, size) in enumerate(zip(tensor.dims, shape, strict=True)):
            equations.append(Equation(expr, size, f"dimension {dim} of {tensor.name}"))
    return equations


def solve_for(family: str, kind: str, equations: list[Equation]) -> dict[str, int]:
    """The size of every axis of a model of a family; `kind` is what the message calls it.

    Raises:
        FamilyError: if they contradict each other, or leave a size open.
    """
    try:
        return solve(equations)
    except NotationError as error:
        raise FamilyError(f"family {family!r} does not fit this {kind}: {error}") from error


def _walk(model: PreTrainedModel, family: Family, head: Head) -> tuple[list[Parameter], list[Map]]:
    """Every parameter once, and every map of the layers, in the model's own order."""
    own = [name for name, _ in model.named_parameters()]
    parameters: dict[str, Parameter] = {}
    maps: list[Map] = []
    for path, layer, part, description in _described(model, family, head):
        module = _module(model, path, family)
        transposed = isinstance(module, _TRANSPOSED)
        if isinstance(description, LinearMap) and layer is not None and part is not None:
            maps.append(Map(path, layer, part, description.input, description.output, transposed))
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(description, Expr) or name in {"weight", "bias"}:
                dims = tensor_dims(name, description, transposed)
                parameters[f"{path}.{name}"] = Parameter(f"{path}.{name}", dims, layer, part)
    undescribed = [name for name in own if name not in parameters]
    if undescribed:
        raise FamilyError(
            f"family {family.family!r} does not describe {len(undescribed)} parameter(s) of this model, the first "
            f"{undescribed[0]!r}; add its module to libprune/families/{family.family}.yaml (docs/notation.md)"
        )
    return [parameters[name] for name in own], maps


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
    if head in (SEQUENCE_CLASSIFICATION, EMBEDDING):
        return 0
    outside = {**family.outside, **family.heads[head.name]}
    modules = [_module(model, path, family) for path in outside]
    return sum(module.get_parameter("weight").numel() for module in modules if isinstance(module, nn.Linear | Conv1D))


def _unused_positions(family: Family, config: PreTrainedConfig) -> int:
    key = family.config.positions_after
    return 0 if key is None or getattr(config, key) is None else int(getattr(config, key)) + 1


def _layers(model: PreTrainedModel, family: Family) -> int:
    return len(list(_module(model, family.layers, family).children()))


def _module(model: PreTrainedModel, path: str, family: Family) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise FamilyError(f"family {family.family!r} describes module {path!r}, which this model lacks") from error


def tensor_dims(name: str, description: LinearMap | Expr, transposed: bool) -> tuple[Expr, ...]:
    """The axes of each dimension of a vector, or of the weight or bias of a map, named as in its module."""
    if isinstance(description, Expr):
        return (description,)
    if name == "bias":
        return (description.output,)
    return (description.input, description.output) if transposed else (description.output, description.input)
