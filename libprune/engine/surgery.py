"""Masking, which defines what removal means, and slicing, which must equal it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from libprune.engine.architecture import RESIDUAL, Architecture, Map, Parameter
from libprune.engine.axes import Expr
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.stacks import StackedMap, exposed, only_experts

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
"""Modules whose input has its features before the dimensions of space."""


def positions_kept(architecture: Architecture, plan: Plan, layer: int | None, expr: Expr) -> NDArray[np.bool_]:
    """Which positions of a dimension stay, of a layer or outside of all; shape ``[size]``.

    Of the residual stream these are the first ones.
    """
    kept = _units_kept(architecture, plan, layer, expr)
    if plan.width is not None and RESIDUAL in expr.names:
        kept &= expr.kept(RESIDUAL, architecture.sizes, np.arange(architecture.sizes[RESIDUAL]) < plan.width)
    return kept


def _units_kept(architecture: Architecture, plan: Plan, layer: int | None, expr: Expr) -> NDArray[np.bool_]:
    """Which positions of a dimension belong to no unit that goes.

    Those of a group, such as its keys, stay while any of its units does.
    """
    kept = np.ones(expr.size(architecture.sizes), dtype=bool)
    for owner, part in () if layer is None else architecture.uses(layer):
        shape, keep = architecture.parts[part], plan.keep[owner, part]
        if shape.axis in expr.names:
            kept &= expr.kept(shape.axis, architecture.sizes, keep)
        if shape.outer in expr.names:
            kept &= expr.kept(shape.outer, architecture.sizes, shape.groups_left(keep))
    return kept


def entries_kept(architecture: Architecture, plan: Plan, parameter: Parameter) -> Bool[Tensor, "..."]:
    """Which entries of a parameter of a layer stay, in its shape."""
    assert parameter.layer is not None
    kept = torch.ones([dim.size(architecture.sizes) for dim in parameter.dims], dtype=torch.bool)
    for dim, expr in enumerate(parameter.dims):
        positions = torch.from_numpy(positions_kept(architecture, plan, parameter.layer, expr))
        kept &= positions.view([-1 if i == dim else 1 for i in range(kept.ndim)])
    return kept


def input_mask(architecture: Architecture, plan: Plan, consumer: Map) -> NDArray[np.bool_]:
    """Which input positions of a map belong to no unit that goes; shape ``[input]``."""
    return _units_kept(architecture, plan, consumer.layer, consumer.input)


@contextmanager
def masked(model: nn.Module, architecture: Architecture, plan: Plan) -> Iterator[None]:
    """Inside the context the dense model computes what the pruned one will.

    A removed unit is a zero at the consumer's input (the consumer's bias stays); a removed part is
    a zero contribution to the residual stream, bias included. A removed expert is one that the router never chooses.
    A norm over units takes its statistics over those that are kept. So does a norm over the residual stream that is to
    be narrower, and it gives zeros for the columns that go, the last ones: what is written there is never read.
    Mixtures of experts are `libprune.engine.stacks.exposed` from then on.
    """
    exposed(model, architecture)
    handles = []
    with ExitStack() as chosen:
        if plan.width is not None:
            whole = architecture.sizes[RESIDUAL]
            for name in architecture.stream_norms:
                chosen.enter_context(_norm_over_first(model.get_submodule(name), plan.width, whole))
        for layer, part in architecture.blocks():
            shape = architecture.parts[part]
            if shape.router:
                chosen.enter_context(only_experts(model, architecture, layer, part, plan.keep[layer, part]))
            if shape.norm:
                norm = model.get_submodule(f"{architecture.layers_path}.{layer}.{shape.norm}")
                expr = next(consumer.input for consumer in architecture.consumers(layer, part))
                groups = expr.units(shape.axis, architecture.sizes) // (architecture.units(part) // shape.groups)
                kept = positions_kept(architecture, plan, layer, expr)
                chosen.enter_context(_norm_over_kept(norm, kept, groups))
        for consumer in architecture.maps:
            kept = input_mask(architecture, plan, consumer)
            module = model.get_submodule(consumer.module)
            if not kept.any():
                handles.append(module.register_forward_hook(_zero_output))
            elif not kept.all():
                mask = torch.from_numpy(kept[:: consumer.kernel]).to(_device(model, consumer))
                handles.append(module.register_forward_pre_hook(partial(_mask_input, mask)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _device(model: nn.Module, consumer: Map) -> torch.device:
    """Where the weights of a map lie; of one that visits its device only while it runs, the host."""
    device = model.get_parameter(consumer.weight).device
    return torch.device("cpu") if device.type == "meta" else device


def _mask_input(mask: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    mask = mask.to(args[0].device)
    if isinstance(module, StackedMap):  # the rows of each expert have its own mask
        mask = mask.view(module.copies, -1)[args[1].experts]
        return (args[0].masked_fill(~mask, 0), *args[1:])
    return (args[0].masked_fill(~along_features(module, mask), 0), *args[1:])


def along_features(module: nn.Module, values: Shaped[Tensor, "*batch features"]) -> Shaped[Tensor, "..."]:
    """Values of each feature in the shape in which the module takes them: the last dimension, or before those of space.

    Args:
        module: a map.
        values: ``[features]``, or ``[batch, features]`` for convolutions.
    """
    space = module.weight.ndim - 2 if isinstance(module, CONVOLUTIONS) else 0
    return values.reshape(*values.shape, *[1] * space)


def features_last(module: nn.Module, values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "... features"]:
    """What a module takes or gives, the features in the last dimension."""
    return values.movedim(1, -1) if isinstance(module, CONVOLUTIONS) else values


@contextmanager
def _norm_over_kept(norm: nn.Module, kept: NDArray[np.bool_], groups: NDArray[np.int64]) -> Iterator[None]:
    """Inside the context an RMS norm takes its means over the kept positions of each group.

    The mean of squares over K kept positions of G is G/K times that over all of them, the others being zero. So the
    input is multiplied by s = sqrt(G/K), and the output divided by it:

        s x / sqrt(mean_G((s x)^2) + eps) / s = x / sqrt(mean_K(x^2) + eps)
    """
    if kept.all() or not kept.any():
        yield
        return
    forward = norm.forward
    of_group = np.maximum(np.bincount(groups, weights=kept), 1)
    mask = torch.from_numpy(kept)
    scale = torch.from_numpy(np.sqrt(np.bincount(groups) / of_group)[groups]).float()

    def over_kept(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        s, wide = scale.to(x.device), x.to(torch.promote_types(x.dtype, torch.float32))
        normed: Tensor = forward(wide.masked_fill(~mask.to(x.device), 0) * s, *args, **kwargs) / s
        return normed.to(x.dtype)

    with _computing(norm, over_kept):
        yield


@contextmanager
def _computing(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Inside the context a module computes something else; afterwards it is as it was, another `forward` included."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        vars(module).pop("forward")
        if before is not None:
            module.forward = before


@contextmanager
def _norm_over_first(norm: nn.Module, width: int, whole: int) -> Iterator[None]:
    """Inside the context a norm over the residual stream takes its statistics over the first columns and gives these.

    With x_K the w columns kept of d, less their mean where the norm takes that away, the norm of s x_K, s = sqrt(d/w),
    filled up with zeros has the mean of squares of x_K. What it adds, its bias, is what it makes of zeros:

        (norm(s x_K) - norm(0)) / s + norm(0) = gain x_K / sqrt(mean_K(x_K^2) + eps) + bias
    """
    forward = norm.forward
    centred, scale = takes_mean(norm, whole), (whole / width) ** 0.5

    def over_first(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept = x[..., :width].to(torch.promote_types(x.dtype, torch.float32))
        kept = kept - kept.mean(-1, keepdim=True) if centred else kept
        padded = nn.functional.pad(kept * scale, (0, whole - width))
        added = forward(torch.zeros_like(padded), *args, **kwargs)
        normed: Tensor = (forward(padded, *args, **kwargs) - added) / scale + added
        normed[..., width:] = 0
        return normed.to(x.dtype)

    with _computing(norm, over_first):
        yield


@torch.no_grad()
def takes_mean(norm: nn.Module, width: int) -> bool:
    """Whether a norm takes the mean away from its input, as LayerNorm does and RMSNorm does not: it is tried.

    Args:
        norm: over the last dimension.
        width: of its input.
    """
    like = next(norm.parameters())
    x = torch.linspace(-1, 2, width, device=like.device, dtype=like.dtype)[None]
    first: Tensor = norm(x)
    return bool(torch.allclose(norm(x + 1), first, atol=0.05 * float(first.abs().max()), rtol=0))


def _zero_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def slice_parameter(tensor: Tensor, architecture: Architecture, plan: Plan, parameter: Parameter) -> Tensor:
    """The rows and columns of a parameter that the plan keeps."""
    for dim, expr in enumerate(parameter.dims):
        positions = positions_kept(architecture, plan, parameter.layer, expr)
        if not positions.all():
            tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(positions)).to(tensor.device))
    return tensor.contiguous()


def sliced_name(architecture: Architecture, plan: Plan, parameter: Parameter) -> str:
    """The name of a parameter in the pruned model, where deleted layers leave no gap."""
    if parameter.layer is None or not architecture.layered:
        return parameter.name
    prefix = f"{architecture.layers_path}."
    inside = parameter.name.removeprefix(f"{prefix}{parameter.layer}.")
    return f"{prefix}{plan.layers.index(parameter.layer)}.{inside}"


def slice_state(
    state: Mapping[str, Tensor],
    architecture: Architecture,
    plan: Plan,
    keep: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Tensor]:
    """All parameters and stored buffers of the pruned model by their new names.

    Args:
        state: those of the dense model by name; read one at a time, so it may be lazy.
        keep: where what is left of each waits, such as a file.

    Raises:
        LibpruneError: if some but not all of the units go that a norm couples, a whole layer that norms stay of, or all
            layers that count the tokens of a cache.
    """
    require_sliceable(architecture, plan)
    sliced, gone = {}, plan.removed
    for parameter in (*architecture.parameters, *architecture.buffers):
        if parameter.layer is None or architecture.home(parameter) not in gone:
            tensor = slice_parameter(state[parameter.name], architecture, plan, parameter)
            sliced[sliced_name(architecture, plan, parameter)] = keep(tensor)
    return sliced


def require_sliceable(architecture: Architecture, plan: Plan) -> None:
    """Stop at a plan that no model can be sliced by.

    Raises:
        LibpruneError: if some but not all of the units go that a norm couples, groups would differ, a router would have
            too few experts, a layer that must stay would go, or all layers that count the tokens of a cache.
    """
    _require_whole(architecture, plan)
    _require_layers(architecture, plan)
    _require_count(architecture, plan)


def _require_layers(architecture: Architecture, plan: Plan) -> None:
    if architecture.layers_stay and len(plan.layers) < architecture.layers:
        first = min(set(range(architecture.layers)) - set(plan.layers))
        raise LibpruneError(
            f"the plan deletes layer {first}, but no layer of family {architecture.family!r} can be deleted: "
            f"{architecture.layers_stay}; something of every layer must stay"
        )


def _require_count(architecture: Architecture, plan: Plan) -> None:
    """Beside recurrent layers, transformers counts the tokens of a cache in a layer that holds something of each."""
    cache = architecture.cache
    if cache is None or architecture.state is None or not plan.layers:
        return
    parts = [part for part, shape in architecture.parts.items() if shape.axes & cache.names]
    counting = {layer for part in parts for layer in architecture.with_part(part)}
    if counting and not counting & set(plan.layers):
        raise LibpruneError(
            f"the plan deletes all {len(counting)} layers with {' or '.join(parts)}, in which transformers counts the "
            "tokens of a cache; something of one of them must stay"
        )


def _require_whole(architecture: Architecture, plan: Plan) -> None:
    for layer, part in architecture.blocks():
        shape, kept = architecture.parts[part], plan.kept(layer, part)
        whole = layer not in plan.layers
        if not whole and kept < shape.least:
            raise LibpruneError(
                f"the plan keeps {kept} of {architecture.units(part)} {part} units of layer {layer}; each layer of "
                f"this model needs {shape.least}, or goes as a whole"
            )
        counts = set(plan.keep[layer, part].reshape(shape.groups, -1).sum(1).tolist())
        if len(counts - {0} if shape.outer else counts) > 1:
            each = "each of those that stay" if shape.outer else "each"
            raise LibpruneError(
                f"the plan keeps different numbers of {part} units in the {shape.groups} groups of layer {layer}; "
                f"family {architecture.family!r} needs as many in {each}"
            )
        if shape.coupled and kept not in {0, architecture.units(part)}:
            raise LibpruneError(
                f"the plan keeps {kept} of {architecture.units(part)} {part} units of layer {layer}, but "
                f"{' and '.join(shape.coupled)} of family {architecture.family!r} couple all of them; such a part can "
                "only stay or go as a whole"
            )


def oriented(consumer: Map, weight: Tensor) -> Float[Tensor, "output input"]:
    """A consumer's weight as ``[output, input]``, whatever its storage order; of a convolution by patches.

    Of a stack as ``[output, copies * input]``, the inputs of all copies side by side.
    """
    if consumer.stack:
        each = weight.mT if consumer.transposed else weight
        return each.transpose(0, 1).flatten(1)
    return weight.T if consumer.transposed else weight.flatten(1)


def stacked(consumer: Map, weight: Float[Tensor, "output input"], like: Tensor) -> Tensor:
    """The weight of a stack that `oriented` gave, in the storage order and shape of another one."""
    each = weight.unflatten(1, (like.shape[0], -1)).transpose(0, 1)
    return (each.mT if consumer.transposed else each).contiguous()


@contextmanager
def hooked(model: nn.Module) -> Iterator[list[RemovableHandle]]:
    """A list for the handles of hooks; on exit they are removed and every `requires_grad` is as it was."""
    handles: list[RemovableHandle] = []
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
