"""What units cost, what a plan leaves, counted from the axes alone, and in which order query heads go by their cost."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.engine.architecture import WITH_LAYER, Architecture, Block, Map, Parameter
from libprune.engine.axes import Expr
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.tables import split_blocks

COUNTED = {
    "parameters": "parameters of the layers",
    "total": "parameters",
    "active": "active parameters of the layers",
    "macs": "multiply-accumulates a token",
    "cache": "elements of the KV cache a token",
    "state": "elements of states a sequence",
    "latency": "seconds of a forward pass",
    "bytes": "bytes of the weights as served",
}
"""What each budget of `allocate.budgets` counts, in words."""


@dataclass(frozen=True)
class Size:
    """What a model, or a pruned shape of it, amounts to.

    Attributes:
        decoder: parameters inside the layers.
        total: all parameters, tied ones once.
        macs: multiply-accumulates of linear maps per token, or per sample of a network, with the output head and
            without the attention products (which depend on the context).
        cache: elements of the KV cache per token; 0 where there is none.
        state: elements of the cache per sequence, however long it is: recurrent states; 0 where there are none.
        active: parameters inside the layers that one token goes through: all but those of experts not chosen for it.
    """

    decoder: int
    total: int
    macs: int
    cache: int
    state: int
    active: int


def unit_parameters(architecture: Architecture, layer: int, part: str) -> int:
    """Parameters that go with one unit of a part, biases on its outputs included.

    In a network, where parts share weights, fewer go with the second unit than with the first, which is counted here.
    """
    axis = architecture.parts[part].axis
    carrying = {parameter for parameter, _, _ in architecture.carriers(layer, part)}
    fewer = {**architecture.sizes, axis: architecture.sizes[axis] - 1}
    return sum(architecture.numel(parameter) - architecture.numel(parameter, fewer) for parameter in carrying)


def group_parameters(architecture: Architecture, layer: int, part: str) -> int:
    """Parameters that go with the last unit of a group, beside those of the unit itself: keys and values.

    0 where the groups have no axis, and so no rows of their own.
    """
    outer, own = architecture.parts[part].outer, architecture.parameters_of(layer, part)
    if not outer:
        return 0
    fewer = {**architecture.sizes, outer: architecture.sizes[outer] - 1}
    return sum(architecture.numel(parameter) - architecture.numel(parameter, fewer) for parameter in own)


@dataclass(frozen=True)
class Groups:
    """The groups that the units of a block lie in.

    Attributes:
        number: of groups of equal size, which are neighbours.
        each: what goes with the last unit of a group, beside the unit itself.
    """

    number: int
    each: int

    def removed(self, keep: NDArray[np.bool_]) -> int:
        """What goes with the groups of which no unit stays."""
        return int((~keep.reshape(self.number, -1).any(1)).sum()) * self.each


@dataclass(frozen=True)
class Prices:
    """What a budget is counted in: whole numbers of something, additive over what is removed.

    Attributes:
        unit: by (layer, part), what goes with one unit.
        rest: by (layer, part), what goes only with the whole part; by (layer, `WITH_LAYER`), only with the whole layer.
        decoder: all that the layers of the dense model take.
        total: the same with embeddings and head.
        gone: what went with rows of the vocabulary before; not in `total`.
        groups: by (layer, part), the groups of its units, where they have rows of their own.
        narrowing: how much of `decoder` and of `total` goes with columns of the residual stream, whatever else does.
    """

    unit: Mapping[Block, int]
    rest: Mapping[Block, int]
    decoder: int
    total: int
    gone: int = 0
    groups: Mapping[Block, Groups] = field(default_factory=dict)
    narrowing: Mapping[str, int] = field(default_factory=dict)

    def removed(self, plan: Plan) -> int:
        """How much goes with the units that a plan removes."""
        units = sum(int((~keep).sum()) * self.unit[block] for block, keep in plan.keep.items())
        groups = sum(self.groups[block].removed(keep) for block, keep in plan.keep.items() if block in self.groups)
        return units + groups + sum(self.rest.get(block, 0) for block in plan.removed)


def prices(
    architecture: Architecture,
    objective: str,
    latency: Mapping[str, Any] | None = None,
    width: int | None = None,
    bits: Mapping[str, float] | None = None,
) -> Prices:
    """The prices of an objective of `allocate.objective`, or of a budget of `allocate.budgets`.

    Args:
        objective: `parameters` (or `total`), `active` (parameters of the layers that a token goes through), `macs`
            (multiply-accumulates a token), `cache` (elements a token), `state` (elements a sequence), `latency`
            (picoseconds of one forward pass) or `bytes` (thousandths of a bit of the weights as served).
        latency: what the latency stage measured; for that objective.
        width: the columns of the residual stream that stay; units then cost what they do in the narrower model.
        bits: of a weight of the `layers` and `outside` of them; for bytes.

    Raises:
        LibpruneError: for the cache or the states of a model that keeps none.
    """
    if objective == "latency":
        assert latency is not None
        return _measured_prices(architecture, latency)
    asked = (objective, width, None if bits is None else tuple(sorted(bits.items())))
    if asked not in architecture.priced:
        counted = _counted_prices(architecture, objective, bits)
        architecture.priced[asked] = (
            counted if width is None else _narrower(architecture, counted, width, objective, bits)
        )
    known: Prices = architecture.priced[asked]
    return known


def _narrower(
    architecture: Architecture, whole: Prices, width: int, objective: str, bits: Mapping[str, float] | None
) -> Prices:
    """The prices in the model whose residual stream has another width, beside the totals of the whole one."""
    narrow = _counted_prices(architecture.narrowed(width), objective, bits)
    narrowing = {"decoder": whole.decoder - narrow.decoder, "total": whole.total - narrow.total}
    return replace(narrow, decoder=whole.decoder, total=whole.total, gone=whole.gone, narrowing=narrowing)


def _counted_prices(architecture: Architecture, objective: str, bits: Mapping[str, float] | None) -> Prices:
    """The prices of everything that is counted, not measured."""
    for name, held, kept in (
        ("cache", architecture.cache, "KV cache"),
        ("state", architecture.state, "recurrent state"),
    ):
        if objective == name and held is None:
            raise LibpruneError(
                f"allocate.objective or a budget is {name}, but a model of family {architecture.family!r} keeps no "
                f"{kept}; choose parameters, macs or latency"
            )
    shapes = {block: architecture.parts[block[1]] for block in architecture.blocks()}
    dense = size(architecture, Plan.dense(architecture))
    blocks, in_groups = list(shapes), [block for block, shape in shapes.items() if shape.outer]
    if objective in {"parameters", "total", "bytes", "active"}:
        unit = {block: unit_parameters(architecture, *block) for block in blocks}
        each = {block: group_parameters(architecture, *block) for block in in_groups}
        rest = {block: part_overhead(architecture, *block) for block in blocks} | _with_layers(architecture)
        decoder, outside = dense.decoder, dense.total - dense.decoder
        if objective == "active":
            unit, rest = _without_idle(architecture, unit, rest)
            decoder, outside = dense.active, 0
    else:
        cost = partial(_part_cost, architecture, objective)
        unit = {block: cost(*block) - cost(*block, shapes[block].axis) for block in blocks}
        each = {block: cost(*block) - cost(*block, shapes[block].outer) for block in in_groups}
        rest = {block: cost(*block) - architecture.units(block[1]) * unit[block] for block in blocks}
        rest |= {block: rest[block] - shapes[block].groups * each[block] for block in in_groups}
        decoder, outside = getattr(dense, objective), 0
        if objective == "macs":
            decoder, outside = decoder - architecture.head_macs, architecture.head_macs
    if not architecture.layered:  # no part of a network goes as a whole
        rest = dict.fromkeys(rest, 0)
    trimmed = architecture.trimmed
    gone = 0 if trimmed is None else {"macs": trimmed.macs}.get(objective, trimmed.parameters if outside else 0)
    inner = outer = 1
    if objective == "bytes":
        assert bits is not None
        inner, outer = (round(1000 * bits[where]) for where in ("layers", "outside"))
        unit, rest, each = ({block: inner * one for block, one in some.items()} for some in (unit, rest, each))
    groups = {block: Groups(shapes[block].groups, each[block]) for block in in_groups}
    return Prices(unit, rest, inner * decoder, inner * decoder + outer * outside, outer * gone, groups)


def _without_idle(
    architecture: Architecture, unit: Mapping[Block, int], rest: Mapping[Block, int]
) -> tuple[dict[Block, int], dict[Block, int]]:
    """Prices of parameters, less those of copies of a stack that a token does not go through."""
    unit, rest = dict(unit), dict(rest)
    for block in architecture.blocks():
        axis = architecture.parts[block[1]].axis
        stacks = [entry for entry in architecture.maps_of(*block) if entry.stack]
        whole, fewer = (
            sum(
                _idle(architecture, stack, {**architecture.sizes, axis: architecture.sizes[axis] - gone})
                for stack in stacks
            )
            for gone in (0, 1)
        )
        unit[block] -= whole - fewer
        rest[block] -= whole - (whole - fewer) * architecture.units(block[1])
    return unit, rest


def _with_layers(architecture: Architecture) -> dict[Block, int]:
    """Parameters that go only with a whole layer, where there are any."""
    with_layers = Counter[Block]()
    for parameter in () if architecture.layers_stay else architecture.parameters:
        if parameter.layer is not None and parameter.part == WITH_LAYER:
            with_layers[parameter.layer, WITH_LAYER] += architecture.numel(parameter)
    return with_layers


def _measured_prices(architecture: Architecture, latency: Mapping[str, Any]) -> Prices:
    """The prices of the lines that were fitted to measured times; fixed time goes in equal shares with whole parts."""
    ps = {part: round(1e12 * seconds) for part, seconds in latency["unit"].items()}
    fixed = round(1e12 * latency["fixed"] * architecture.layers / sum(1 for _ in architecture.blocks()))
    shapes = {block: architecture.parts[block[1]] for block in architecture.blocks()}
    groups = {block: Groups(shape.groups, ps[shape.outer]) for block, shape in shapes.items() if shape.outer}
    decoder = sum(fixed + ps[part] * architecture.units(part) for _, part in architecture.blocks())
    decoder += sum(own.number * own.each for own in groups.values())
    return Prices(
        unit={(layer, part): ps[part] for layer, part in architecture.blocks()},
        rest=dict.fromkeys(architecture.blocks(), fixed),
        decoder=decoder,
        total=decoder + round(1e12 * latency["outside"]),
        groups=groups,
    )


def _part_cost(architecture: Architecture, objective: str, layer: int, part: str, fewer: str | None = None) -> int:
    """Multiply-accumulates, or elements of the cache, of a part, whole or with one index less of an axis."""
    sizes = {axis: size - (axis == fewer) for axis, size in architecture.sizes.items()}
    if objective in {"cache", "state"}:
        held = architecture.cache if objective == "cache" else architecture.state
        return _held(architecture, held, part, sizes)
    others = sum(architecture.numel(parameter, sizes) for parameter in architecture.matrices_of(layer, part))
    return sum(_macs(entry, sizes) for entry in architecture.maps_of(layer, part)) + others


def _held(architecture: Architecture, held: Expr | None, part: str, sizes: Mapping[str, int]) -> int:
    """Elements of the cache that a part of one layer holds, per token or per sequence as `held` says.

    A cache that has none of the units, such as that of latent attention, goes only with the whole attention.
    """
    if held is None:
        return 0
    shared = part == "attention" and not any(shape.axes & held.names for shape in architecture.parts.values())
    return held.size(sizes) if shared or architecture.parts[part].axes & held.names else 0


def _macs(entry: Map, sizes: Mapping[str, int]) -> int:
    products = entry.rows * entry.input.size(sizes) * entry.output.size(sizes)
    return products * min(entry.active, entry.copies(sizes)) // entry.copies(sizes) if entry.stack else products


def _idle(architecture: Architecture, stack: Map, sizes: Mapping[str, int]) -> int:
    """Parameters of the copies of a stack that a token does not go through."""
    copies = stack.copies(sizes)
    own = (p for p in architecture.parameters_of(stack.layer, stack.part) if p.name in {stack.weight, stack.bias})
    return sum(architecture.numel(p, sizes) for p in own) * max(0, copies - stack.active) // max(1, copies)


def part_overhead(architecture: Architecture, layer: int, part: str) -> int:
    """Parameters that no unit carries and that go only with the whole part: norms, the consumer's bias."""
    carried = unit_parameters(architecture, layer, part) * architecture.units(part)
    carried += group_parameters(architecture, layer, part) * architecture.parts[part].groups
    return sum(map(architecture.numel, architecture.parameters_of(layer, part))) - carried


def size(architecture: Architecture, plan: Plan) -> Size:
    """The exact size of the model that a plan leaves."""
    architecture = architecture.narrowed(plan.width)
    gone = plan.removed if architecture.layered else frozenset()
    if architecture.layers_stay:
        gone = frozenset(block for block in gone if block[1] != WITH_LAYER)
    sizes = [_sizes(architecture, plan, layer) for layer in range(architecture.layers)]
    decoder = sum(
        architecture.numel(parameter, sizes[parameter.layer])
        for parameter in architecture.parameters
        if parameter.layer is not None and architecture.home(parameter) not in gone
    )
    left = [block for block in architecture.blocks() if block not in gone]
    macs = sum(_macs(m, sizes[m.layer]) for m in architecture.maps if architecture.home(m) not in gone)
    others = {p for block in left for p in architecture.matrices_of(*block) if p.part == block[1]}
    macs += sum(architecture.numel(p, sizes[p.layer]) for p in others if p.layer is not None)
    cache, state = (
        sum(_held(architecture, held, part, sizes[layer]) for layer, part in left)
        for held in (architecture.cache, architecture.state)
    )
    outside = architecture.total_parameters - architecture.decoder_parameters
    stacked = [m for m in architecture.maps if m.stack and architecture.home(m) not in gone]
    idle = sum(_idle(architecture, m, sizes[m.layer]) for m in stacked)
    total = decoder + outside
    macs += architecture.head_macs
    return Size(decoder, total, macs=macs, cache=cache, state=state, active=decoder - idle)


def shape_after(architecture: Architecture, plan: Plan, parameter: Parameter) -> tuple[int, ...]:
    """The shape of a parameter that stays, in storage order."""
    architecture = architecture.narrowed(plan.width)
    sizes = architecture.sizes if parameter.layer is None else _sizes(architecture, plan, parameter.layer)
    return tuple(dim.size(sizes) for dim in parameter.dims)


def _sizes(architecture: Architecture, plan: Plan, layer: int) -> dict[str, int]:
    """The sizes of all axes in a layer as the plan leaves it."""
    return {**architecture.sizes, **plan.sizes(architecture, layer)}


Removals = tuple[tuple[int, ...], ...]
"""The units of a block that are removed together, one removal after the other."""


def removals_of_heads(
    architecture: Architecture, importance: NDArray[np.float64], alike: bool, whole: bool = False, floor: int = 1
) -> dict[Block, Removals]:
    """The removals of every block whose units are query heads, up to the whole block.

    Groups that stay must keep the same number of heads. So either the lowest head of each group goes, or the lowest
    group, with its keys and values; each time that which loses less importance for the parameters that go.

    Args:
        importance: of all units, in the order of `libprune.engine.tables.unit_index`.
        alike: whether all blocks go through the same numbers of heads and groups, by the sums of what they lose.
        whole: whether only whole groups go.
        floor: groups that stay until each has one head left; the last group stays so in any case.
    """
    values = {
        block: values.reshape(architecture.parts[block[1]].groups, -1)
        for block, values in split_blocks(architecture, importance)
        if architecture.parts[block[1]].outer
    }
    removals: dict[Block, Removals] = {}
    for part in dict.fromkeys(part for _, part in values):
        blocks = [block for block in values if block[1] == part]
        for together in [blocks] if alike else [[block] for block in blocks]:
            prices = unit_parameters(architecture, *together[0]), group_parameters(architecture, *together[0])
            removals |= _removals([values[block] for block in together], *prices, whole, max(1, floor), together)
    return removals


def _removals(
    values: Sequence[NDArray[np.float64]],
    unit: int,
    group: int,
    whole: bool,
    floor: int,
    blocks: Sequence[Block],
) -> dict[Block, Removals]:
    """The removals of blocks that go through the same numbers of heads and groups.

    Args:
        values: the importance of the units of each block, ``[groups, heads]``.
        unit: parameters that go with a head.
        group: parameters that go with a group beside its heads.
        whole: whether only whole groups go.
        floor: groups that stay until each has one head left.
        blocks: the names of the blocks.
    """
    count, each = values[0].shape
    orders = [np.argsort(of_block, axis=1, kind="stable") for of_block in values]
    ranked = [np.take_along_axis(of_block, order, 1) for of_block, order in zip(values, orders, strict=True)]
    left = [list(range(count)) for _ in values]
    found: list[list[tuple[int, ...]]] = [[] for _ in values]
    gone = 0
    while left[0]:
        groups, heads = len(left[0]), each - gone
        lowest = [min(own, key=lambda g: float(v[g, gone:].sum())) for own, v in zip(left, ranked, strict=True)]
        narrower = sum(float(v[own, gone].sum()) for own, v in zip(left, ranked, strict=True)) / (groups * unit)
        fewer = sum(float(v[g, gone:].sum()) for g, v in zip(lowest, ranked, strict=True)) / (heads * unit + group)
        if heads > 1 and not whole and (groups <= floor or narrower < fewer):
            for own, order, removed in zip(left, orders, found, strict=True):
                removed.append(tuple(each * g + int(order[g, gone]) for g in own))
            gone += 1
            continue
        for own, g, order, removed in zip(left, lowest, orders, found, strict=True):
            removed.append(tuple(each * g + int(head) for head in order[g, gone:]))
            own.remove(g)
    return {block: tuple(removed) for block, removed in zip(blocks, found, strict=True)}
