"""What units cost and what a plan leaves, counted from the axes alone."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from libprune.engine.architecture import WITH_LAYER, Architecture, Block, Map, Parameter
from libprune.engine.axes import Expr
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan

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


@dataclass(frozen=True)
class Prices:
    """What a budget is counted in: whole numbers of something, additive over what is removed.

    Attributes:
        unit: by (layer, part), what goes with one unit.
        rest: by (layer, part), what goes only with the whole part; by (layer, `WITH_LAYER`), only with the whole layer.
        decoder: all that the layers of the dense model take.
        total: the same with embeddings and head.
        gone: what went with rows of the vocabulary before; not in `total`.
    """

    unit: Mapping[Block, int]
    rest: Mapping[Block, int]
    decoder: int
    total: int
    gone: int = 0

    def removed(self, plan: Plan) -> int:
        """How much a plan removes."""
        units = sum(int((~keep).sum()) * self.unit[block] for block, keep in plan.keep.items())
        return units + sum(self.rest.get(block, 0) for block in plan.removed)


def prices(
    architecture: Architecture,
    objective: str,
    latency: Mapping[str, Any] | None = None,
    bits: Mapping[str, float] | None = None,
) -> Prices:
    """The prices of an objective of `allocate.objective`, or of a budget of `allocate.budgets`.

    Args:
        objective: `parameters` (or `total`), `active` (parameters of the layers that a token goes through), `macs`
            (multiply-accumulates a token), `cache` (elements a token), `state` (elements a sequence), `latency`
            (picoseconds of one forward pass) or `bytes` (thousandths of a bit of the weights as served).
        latency: what the latency stage measured; for that objective.
        bits: of a weight of the `layers` and `outside` of them; for bytes.

    Raises:
        LibpruneError: for the cache or the states of a model that keeps none.
    """
    if objective == "latency":
        assert latency is not None
        return _measured_prices(architecture, latency)
    for name, held, kept in (
        ("cache", architecture.cache, "KV cache"),
        ("state", architecture.state, "recurrent state"),
    ):
        if objective == name and held is None:
            raise LibpruneError(
                f"allocate.objective or a budget is {name}, but a model of family {architecture.family!r} keeps no "
                f"{kept}; choose parameters, macs or latency"
            )
    blocks, dense = list(architecture.blocks()), size(architecture, Plan.dense(architecture))
    outside = 0
    if objective in {"parameters", "total", "bytes", "active"}:
        unit = {block: unit_parameters(architecture, *block) for block in blocks}
        rest = {block: part_overhead(architecture, *block) for block in blocks} | _with_layers(architecture)
        decoder, outside = dense.decoder, dense.total - dense.decoder
        if objective == "active":
            unit, rest = _without_idle(architecture, unit, rest)
            decoder, outside = dense.active, 0
    else:
        cost = partial(_part_cost, architecture, objective)
        unit = {(layer, part): cost(layer, part) - cost(layer, part, fewer=1) for layer, part in blocks}
        rest = {block: cost(*block) - architecture.units(block[1]) * unit[block] for block in blocks}
        decoder, outside = getattr(dense, objective), 0
        if objective == "macs":
            decoder, outside = decoder - architecture.head_macs, architecture.head_macs
    if not architecture.layered:  # no part of a network goes as a whole
        rest = dict.fromkeys(rest, 0)
    trimmed = architecture.trimmed
    gone = 0 if trimmed is None else {"macs": trimmed.macs}.get(objective, trimmed.parameters if outside else 0)
    if objective != "bytes":
        return Prices(unit, rest, decoder, decoder + outside, gone)
    assert bits is not None
    inner, outer = (round(1000 * bits[where]) for where in ("layers", "outside"))
    unit, rest = ({block: inner * number for block, number in some.items()} for some in (unit, rest))
    return Prices(unit, rest, inner * decoder, inner * decoder + outer * outside, outer * gone)


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
    decoder = sum(fixed + ps[part] * architecture.units(part) for _, part in architecture.blocks())
    return Prices(
        unit={(layer, part): ps[part] for layer, part in architecture.blocks()},
        rest=dict.fromkeys(architecture.blocks(), fixed),
        decoder=decoder,
        total=decoder + round(1e12 * latency["outside"]),
    )


def _part_cost(architecture: Architecture, objective: str, layer: int, part: str, fewer: int = 0) -> int:
    """Multiply-accumulates, or elements of the cache, of a part that has lost some units."""
    axis = architecture.parts[part].axis
    sizes = {**architecture.sizes, axis: architecture.sizes[axis] - fewer}
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
    shared = part == "attention" and not any(shape.axis in held.names for shape in architecture.parts.values())
    return held.size(sizes) if shared or architecture.parts[part].axis in held.names else 0


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
    kept = {architecture.parts[part].axis: plan.kept(owner, part) for owner, part in architecture.uses(layer)}
    return {**architecture.sizes, **kept}
