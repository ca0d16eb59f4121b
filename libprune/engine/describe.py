"""From a transformers model and its family file to an `Architecture`. A closed world: whatever
the family file does not speak of stops here, by name.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from libprune.engine.architecture import (
    RESIDUAL,
    STAND_IN,
    WHOLE,
    WITH_LAYER,
    Architecture,
    Experts,
    Heads,
    Map,
    Parameter,
    PartShape,
    Units,
)
from libprune.engine.axes import Entry, Equation, Expr, LinearMap, Stack, parse_entry, parse_expr, solve
from libprune.engine.errors import FamilyError, NotationError, NotExpressibleError, naming
from libprune.engine.family import Family, Part, described_by, families, family_of, shipped
from libprune.engine.heads import EMBEDDING, SEQUENCE_CLASSIFICATION, Head, head_of
from libprune.engine.stock_config import bias_key, check_config, expressible, expressible_pairs, require_sizes

_TRANSPOSED = (Conv1D, nn.Embedding)
"""Modules that store the weight of a map as ``[input, output]``."""


def describe(
    model: PreTrainedModel,
    fingerprint: str = "",
    accept: tuple[str, ...] = (),
    experts: Experts = "whole",
    heads: Heads = "groups",
) -> Architecture:
    """Solve the axes of a model; meta tensors are enough.

    Args:
        model: a transformers model of a known family.
        fingerprint: digest of its weights, kept in the result.
        accept: config keys that the family file does not know and the user vouches for.
        experts: whether the units of a mixture are whole experts, or the channels of all experts alike.
        heads: whether the units of an attention are key-value heads with their query heads, or the query heads.

    Raises:
        FamilyError: for an unknown family, head, config key or parameter, sizes that contradict, or an attention whose
            query heads lie in no groups.
    """
    family, head = family_of(model.config.model_type, model.config.to_dict()), head_of([type(model).__name__])
    _require_head(family, head, model)
    if head is EMBEDDING:
        family = family.headless(model.base_model_prefix)
    check_config(family, model.config, accept)
    require_sizes(family, model.config)
    parameters, buffers, maps, coupled = _walk(model, family, head)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored_tensors(model).items()}
    equations = _config_equations(family, model.config) + tensor_equations([*parameters, *buffers], shapes)
    sizes = solve_for(family.family, "model", equations)
    joined = _joined(family) if experts == "channels" else {}
    own = [name for name in family.parts if name not in joined]
    parts = {name: _shape(model, family, name, sizes, tuple(coupled[name]), experts) for name in own}
    described = Architecture(
        family=family.family,
        head=head.name,
        head_macs=_head_macs(model, family, head),
        sizes=sizes,
        layers=_layers(model, family),
        layers_path=family.layers,
        parts={name: shape for name, shape in parts.items() if shape.layers != ()},
        parameters=tuple(_rejoined(parameter, joined) for parameter in parameters),
        maps=tuple(_rejoined(entry, joined) for entry in maps),
        own_family=None if family.family in shipped() else family.model_dump(mode="json"),
        cache=None if family.cache is None else parse_expr(family.cache),
        state=None if family.state is None else parse_expr(family.state),
        fingerprint=fingerprint,
        tower=family.tower is not None,
        numbered=family.tower is not None and family.tower.layers_stay,
        buffers=tuple(buffers),
        unused_positions=_unused_positions(family, model.config),
    )
    return described if heads == "groups" else _with_heads(described, family, model.config)


HEAD = "head"
"""The axis of query heads, where these are the units; it stands for the product of the axes of groups and of heads in
one."""


def _with_heads(architecture: Architecture, family: Family, config: PreTrainedConfig) -> Architecture:
    """A model with query heads as the units of its attention.

    Every product of the axis of groups and that of the heads in one, side by side as in `kv q d`, becomes one axis.
    """
    part, shape = "attention", architecture.parts.get("attention")
    inner = None if shape is None else _inner(architecture, family, part, shape.axis)
    if shape is None or inner is None:
        raise FamilyError(
            f"prepare.heads is queries, but family {architecture.family!r} has no query heads that share a key-value "
            "head; set it to groups"
        )
    if shape.coupled:
        raise FamilyError(
            f"prepare.heads is queries, but {' and '.join(shape.coupled)} of family {architecture.family!r} couple all "
            "heads; set it to groups"
        )
    outer, sizes = shape.axis, dict(architecture.sizes)

    def fused(expr: Expr) -> Expr:
        return _fused(expr, outer, inner)

    pairs = expressible_pairs(family, config, sizes, outer, inner)
    own = replace(
        shape,
        axis=HEAD,
        units="heads",
        groups=sizes[outer],
        outer=outer,
        inner=inner,
        pairs=pairs,
        expressible=None if pairs is None else tuple(sorted({heads for _, heads in pairs})),
    )

    def with_axis(tensors: Iterable[Parameter]) -> tuple[Parameter, ...]:
        return tuple(replace(tensor, dims=tuple(map(fused, tensor.dims))) for tensor in tensors)

    return replace(
        architecture,
        sizes={**sizes, HEAD: sizes[outer] * sizes[inner]},
        parts={**architecture.parts, part: own},
        parameters=with_axis(architecture.parameters),
        buffers=with_axis(architecture.buffers),
        maps=tuple(replace(m, input=fused(m.input), output=fused(m.output)) for m in architecture.maps),
    )


def _inner(architecture: Architecture, family: Family, part: str, outer: str) -> str | None:
    """The axis of the heads in a group, which stands behind the axis of the groups in the consumer and in a config key.

    Keys and values have the axis of the groups alone; None where they have a head for each query head.
    """
    layer = architecture.with_part(part)[0]
    said = {expr.terms for expressions in family.config.expressions.values() for expr in expressions}
    carrying = {inner for p in architecture.parameters_of(layer, part) for inner in _carrying(p, outer)}
    for term in architecture.consumers(layer, part)[0].input.terms:
        for first, second in pairwise(term):
            both = first == outer and isinstance(second, str) and ((first, second),) in said and ((first,),) in said
            if both and not all(second in names for names in carrying):
                return str(second)
    return None


def _carrying(parameter: Parameter, axis: str) -> Iterator[frozenset[str]]:
    """The axes of each term of a parameter's dimensions that carries an axis."""
    for expr in parameter.dims:
        yield from (names for term in expr.terms if axis in (names := Expr((term,)).names))


def _fused(expr: Expr, outer: str, inner: str) -> Expr:
    """An expression with one axis in place of two that stand side by side in a product."""
    terms = []
    for term in expr.terms:
        factors = [_fused(factor, outer, inner) if isinstance(factor, Expr) else factor for factor in term]
        for at, (first, second) in enumerate(pairwise(factors)):
            if (first, second) == (outer, inner):
                factors[at : at + 2] = [HEAD]
                break
        terms.append(tuple(factors))
    fused = Expr(tuple(terms))
    if inner in fused.names:
        raise FamilyError(f"prepare.heads is queries, but {expr} has axis {inner!r} without {outer!r} before it")
    return fused


def require_shared(architecture: Architecture) -> None:
    """Stop where query heads are the units, and each has a key-value head of its own.

    Raises:
        FamilyError: saying what to set.
    """
    for shape in architecture.parts.values():
        if shape.outer and architecture.sizes[shape.inner] == 1:
            raise FamilyError(
                "prepare.heads is queries, but this model has one query head per key-value head, so that a group is a "
                "query head; set it to groups"
            )


def _joined(family: Family) -> dict[str | None, str]:
    """The parts whose channels are those of an earlier part, with that part; where channels are the units."""
    first = {part.within: name for name, part in reversed(family.parts.items())}
    return {name: first[p.within] for name, p in family.parts.items() if p.within and first[p.within] != name}


_Entry = TypeVar("_Entry", Parameter, Map)


def _rejoined(entry: _Entry, joined: Mapping[str | None, str]) -> _Entry:
    return replace(entry, part=joined[entry.part]) if entry.part in joined else entry


def _shape(
    model: PreTrainedModel,
    family: Family,
    name: str,
    sizes: dict[str, int],
    coupled: tuple[str, ...],
    experts: Experts,
) -> PartShape:
    """A part of a model, whose units are whole experts or their channels as it is asked."""
    part, whole = family.parts[name], model.config
    config = family.sized(whole)
    inside = part.within is not None and experts == "channels"
    axis = part.within if inside and part.within else part.axis
    usual: Units = "groups" if name == "attention" else "experts" if part.router and not inside else "channels"
    choosing = part.router if usual == "experts" else None
    groups = choosing.groups_in(config) if choosing else getattr(config, part.groups) if part.groups else 1
    owners = _owners(model, family, part)
    return PartShape(
        axis=axis,
        module=part.module,
        expressible=(sizes[axis],) if coupled else expressible(family, whole, sizes, axis),
        coupled=coupled,
        norm=part.norm or "",
        units=usual if inside or part.units is None else part.units,
        layers=_with_part(model, family, part) if owners is None else tuple(sorted(set(owners))),
        owners=owners,
        groups=groups,
        least=choosing.least(config) if choosing else 1 if part.router else 0,
        router=choosing.module if choosing else "",
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
    data = config.to_dict()
    families()[architecture.family].sized(data).update(said)
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
    return replace(architecture, parameters=tuple(parameters)), type(config).from_dict(data)


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


def _config_equations(family: Family, config: PreTrainedConfig) -> list[Equation]:
    own = family.sized(config)
    return [
        Equation(expr, getattr(own, key), f"config key {key!r}")
        for key, expressions in family.config.expressions.items()
        for expr in expressions
        if getattr(own, key, None) is not None
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


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that a checkpoint of a model holds, by name: every parameter once, and then buffers."""
    stored = model.state_dict(keep_vars=True)
    return dict(model.named_parameters()) | {name: tensor for name, tensor in model.named_buffers() if name in stored}


def _walk(
    model: PreTrainedModel, family: Family, head: Head
) -> tuple[list[Parameter], list[Parameter], list[Map], dict[str, list[str]]]:
    """Every parameter once, the stored buffers, the maps of the layers, and by part the norms over its units.

    Parameters stand in the model's own order.
    """
    own = stored_tensors(model)
    tensors: dict[str, Parameter] = {}
    maps: list[Map] = []
    coupled: dict[str, list[str]] = {name: [] for name in family.parts}
    for path, layer, part, entry in _described(model, family, head):
        if path in own:
            _require_tensor(path, entry)
            tensors[path] = Parameter(path, _bare_dims(entry), layer, part)
            if isinstance(entry, Stack) and isinstance(entry.each, LinearMap):
                assert layer is not None and part is not None
                maps.append(
                    _stacked(path, layer, part, entry, entry.each, _active(family, family.sized(model.config), part))
                )
            continue
        module = _module(model, path, family)
        transposed = isinstance(module, _TRANSPOSED)
        if isinstance(entry, LinearMap) and isinstance(module, _MAPS) and layer is not None and part in family.parts:
            maps.append(Map(path, layer, part, entry.input, entry.output, transposed))
        for name in (*module._parameters, *module._buffers):
            full = f"{path}.{name}"
            if full in own and (isinstance(entry, Expr) or name in {"weight", "bias"}):
                dims = tensor_dims(name, entry, transposed, own[full] if _depthwise(module) else None)
                tensors[full] = Parameter(full, dims if own[full].ndim else (), layer, part)
        inside = f"{family.layers}.{layer}."
        carries = part in family.parts and isinstance(entry, Expr) and family.parts[part].axis in entry.names
        if part and carries and not _depthwise(module):
            norm = path.removeprefix(inside)
            if norm not in (family.parts[part].norm, *coupled[part]):
                coupled[part].append(norm)
        for name, own_part in family.parts.items():
            if layer is None and own_part.axis in entry.names:  # all layers share it
                coupled[name].append(path)
    tensors |= {
        name: Parameter(name, tuple(map(_whole, tensor.shape)), None, None)
        for name, tensor in own.items()
        if family.untouched(name)
    }
    undescribed = [name for name in own if name not in tensors]
    if undescribed:
        raise FamilyError(
            f"family {family.family!r} does not describe {len(undescribed)} parameter(s) of this model, the first "
            f"{undescribed[0]!r}; add its module to the family file (docs/notation.md)"
        )
    buffers = [name for name, tensor in own.items() if not isinstance(tensor, nn.Parameter)]
    return [tensors[name] for name in own if name not in buffers], [tensors[name] for name in buffers], maps, coupled


_MAPS = (nn.Linear, Conv1D)


def _depthwise(module: nn.Module) -> bool:
    """Whether a module that is described as a vector is a convolution of each channel by itself."""
    return isinstance(module, nn.Conv1d)


def _require_tensor(path: str, entry: Entry) -> None:
    if isinstance(entry, LinearMap):
        raise FamilyError(f"{path} is a tensor of its own, but it is described as the map {entry} of a module")


def _bare_dims(entry: Entry) -> tuple[Expr, ...]:
    """The axes of each dimension of a tensor that is no module's, in the order in which they are written."""
    if isinstance(entry, Expr):
        return (entry,)
    if isinstance(entry, LinearMap):
        return (entry.output, entry.input) if entry.backwards else (entry.input, entry.output)
    return (*entry.leading, *_bare_dims(entry.each))


def _stacked(path: str, layer: int, part: str, stack: Stack, each: LinearMap, active: int) -> Map:
    """The map of a stack, whose copies read and write side by side what the part's units are made of."""
    (copies,) = stack.leading
    (axis,) = copies.names

    def side(expr: Expr) -> Expr:
        return expr if str(expr) == RESIDUAL else Expr(((axis, expr),))

    owner, _, name = path.rpartition(".")
    module = f"{owner}{STAND_IN}{name}"
    return Map(module, layer, part, side(each.input), side(each.output), not each.backwards, stack=axis, active=active)


def _active(family: Family, config: PreTrainedConfig, part: str) -> int:
    """How many copies of a part's stacks a token goes through."""
    router = family.parts[part].router
    return int(getattr(config, router.top_k)) if router else 1


def _whole(size: int) -> Expr:
    """A dimension of a tensor that stays whole: an axis of its own for each size."""
    return parse_expr(f"{WHOLE}{size}")


def _described(
    model: PreTrainedModel, family: Family, head: Head
) -> Iterator[tuple[str, int | None, str | None, Entry]]:
    for layer in range(_layers(model, family)):
        for name, part in family.parts.items():
            if _has(model, f"{family.layers}.{layer}", part.where):
                for path, description in part.parsed.items():
                    if path not in part.optional or _has(model, f"{family.layers}.{layer}", path):
                        yield f"{family.layers}.{layer}.{path}", layer, name, description
        for kind, vectors in ((WITH_LAYER, family.shared), (None, family.stream)):
            for path, text in vectors.items():
                yield f"{family.layers}.{layer}.{path}", layer, kind, parse_entry(text)
    for path, text in {**family.outside, **family.heads[head.name]}.items():
        yield path, None, None, parse_entry(text)


def _has(model: nn.Module, layer: str, where: str | None) -> bool:
    """Whether a layer has a submodule or a tensor of some path; true for no path."""
    if where is None:
        return True
    thing: Any = model.get_submodule(layer)
    for name in where.split("."):
        thing = getattr(thing, name, None)
    return thing is not None


def _with_part(model: PreTrainedModel, family: Family, part: Part) -> tuple[int, ...] | None:
    """The layers that have a part; None if all have it."""
    layers = range(_layers(model, family))
    having = tuple(layer for layer in layers if _has(model, f"{family.layers}.{layer}", part.where))
    return None if len(having) == len(layers) else having


def _owners(model: PreTrainedModel, family: Family, part: Part) -> tuple[int, ...] | None:
    """For each layer the one whose units its part uses; None if these are always its own."""
    if part.sharing is None:
        return None
    layers = range(_layers(model, family))
    having = [_has(model, f"{family.layers}.{layer}", part.sharing.lack) for layer in layers]
    return part.sharing.owners(having, getattr(family.sized(model.config), part.sharing.among))


def _head_macs(model: PreTrainedModel, family: Family, head: Head) -> int:
    if head in (SEQUENCE_CLASSIFICATION, EMBEDDING):
        return 0
    within = [f"{family.layers}.{layer}.{path}" for layer in range(_layers(model, family)) for path in family.shared]
    own = stored_tensors(model)
    outside = [path for path in (*family.outside, *family.heads[head.name], *within) if path not in own]
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


def tensor_dims(name: str, description: Entry, transposed: bool, tensor: Tensor | None = None) -> tuple[Expr, ...]:
    """The axes of each dimension of a vector, or of the weight or bias of a map, named as in its module.

    Args:
        name: of the tensor in its module.
        description: a vector or a map.
        transposed: whether the module stores the weight of a map as ``[input, output]``.
        tensor: of a depthwise convolution, for the sizes of the dimensions behind the first; None for other modules.
    """
    if isinstance(description, Expr):
        behind = () if tensor is None else tensor.shape[1:]
        return (description, *(parse_expr(str(size)) for size in behind))
    assert isinstance(description, LinearMap)
    if name == "bias":
        return (description.output,)
    return (description.input, description.output) if transposed else (description.output, description.input)
