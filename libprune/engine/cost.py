"""What units cost and what a plan leaves, counted from the axes alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from libprune.engine.architecture import Architecture, Block, Parameter
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan


@dataclass(frozen=True)
class Size:
    """What a model, or a pruned shape of it, amounts to.

    Attributes:
        decoder: parameters inside the layers.
        total: all parameters, tied ones once.
        macs: multiply-accumulates of linear maps per token, or per sample of a network, with the output head and
            without the attention products (which depend on the context).
        cache: elements of the KV cache per token; 0 where there is none.
    """

    decoder: int
    total: int
    macs: int
    cache: int


def unit_parameters(architecture: Architecture, layer: int, part: str) -> int:
    """Parameters that go with one unit of a part, biases on its outputs included; of a network with the first one."""
    axis = architecture.parts[part].axis
    carrying = {parameter for parameter, _, _ in architecture.carriers(layer, part)}
    fewer = {**architecture.sizes, axis: architecture.sizes[axis] - 1}
    return sum(architecture.numel(parameter) - architecture.numel(parameter, fewer) for parameter in carrying)


@dataclass(frozen=True)
class Prices:
    """What a budget is counted in: whole numbers of something, additive over what is removed.

    Attributes:
        unit: by (layer, part), what goes with one unit.
        rest: by (layer, part), what goes only with the whole part.
        decoder: all that the layers of the dense model take.
        total: the same with embeddings and head.
    """

    unit: Mapping[Block, int]
    rest: Mapping[Block, int]
    decoder: int
    total: int

    def removed(self, plan: Plan) -> int:
        """How much a plan removes."""
        units = sum(int((~keep).sum()) * self.unit[block] for block, keep in plan.keep.items())
        return units + sum(self.rest[block] for block in plan.keep if plan.gone(*block))


def prices(architecture: Architecture, objective: str, latency: Mapping[str, Any] | None = None) -> Prices:
    """The prices of an objective of `allocate.objective`.

    Args:
        architecture: the model's description.
        objective: `parameters`, `macs` (multiply-accumulates a token), `cache` (elements a token) or `latency`
            (picoseconds of one forward pass).
        latency: what the latency stage measured; for that objective.

    Raises:
        LibpruneError: for the cache of a model that keeps none.
    """
    if objective == "latency":
        assert latency is not None
        return _measured_prices(architecture, latency)
    if objective == "cache" and architecture.cache is None:
        raise LibpruneError(
            f"allocate.objective is cache, but a model of family {architecture.family!r} keeps no KV cache; choose "
            "parameters, macs or latency"
        )
    blocks = list(architecture.blocks())
    if architecture.is_network:
        return _network_prices(architecture, objective)
    if objective == "parameters":
        unit = {block: unit_parameters(architecture, *block) for block in blocks}
        rest = {block: part_overhead(architecture, *block) for block in blocks}
        return Prices(unit, rest, architecture.decoder_parameters, architecture.total_parameters)
    rest = {block: _part_cost(architecture, *block, 0, objective) for block in blocks}
    unit = {block: _part_cost(architecture, *block, 1, objective) - rest[block] for block in blocks}
    dense = size(architecture, Plan.dense(architecture))
    if objective == "cache":
        return Prices(unit, rest, dense.cache, dense.cache)
    return Prices(unit, rest, dense.macs - architecture.head_macs, dense.macs)


def _network_prices(architecture: Architecture, objective: str) -> Prices:
    """What goes with the first unit of each part; less goes with the next, which shares weights with it.

    No part of a network goes as a whole.
    """
    amount = {"parameters": "decoder", "macs": "macs"}[objective]
    dense = getattr(size(architecture, Plan.dense(architecture)), amount)
    unit = {}
    for block in architecture.blocks():
        plan = Plan.dense(architecture)
        plan.keep[block][0] = False
        unit[block] = dense - getattr(size(architecture, plan), amount)
    return Prices(unit, dict.fromkeys(unit, 0), dense, dense)


def _measured_prices(architecture: Architecture, latency: Mapping[str, Any]) -> Prices:
    """Of the lines that were fitted to measured times; what is fixed goes in equal shares with whole parts."""
    ps = {part: round(1e12 * seconds) for part, seconds in latency["unit"].items()}
    fixed = round(1e12 * latency["fixed"] / len(architecture.parts))
    decoder = sum(fixed + ps[part] * architecture.units(part) for _, part in architecture.blocks())
    return Prices(
        unit={(layer, part): ps[part] for layer, part in architecture.blocks()},
        rest=dict.fromkeys(architecture.blocks(), fixed),
        decoder=decoder,
        total=decoder + round(1e12 * latency["outside"]),
    )


def _part_cost(architecture: Architecture, layer: int, part: str, count: int, objective: str) -> int:
    """Multiply-accumulates or cache elements of a part with so many units."""
    axis = architecture.parts[part].axis
    sizes = {**architecture.sizes, axis: count}
    if objective == "cache":
        assert architecture.cache is not None, "prices refuses the objective without one"
        return architecture.cache.size(sizes) if axis in architecture.cache.names else 0
    return sum(m.input.size(sizes) * m.output.size(sizes) for m in architecture.maps_of(layer, part))


def part_overhead(architecture: Architecture, layer: int, part: str) -> int:
    """Parameters that no unit carries and that go only with the whole part: norms, the consumer's bias."""
    carried = unit_parameters(architecture, layer, part) * architecture.units(part)
    return sum(map(architecture.numel, architecture.parameters_of(layer, part))) - carried


def size(architecture: Architecture, plan: Plan) -> Size:
    """The exact size of the model that a plan leaves."""
    if architecture.is_network:
        return _network_size(architecture, plan)
    decoder = macs = cache = 0
    for layer, part in architecture.blocks():
        if plan.gone(layer, part):
            continue
        sizes = _sizes(architecture, plan, layer, part)
        decoder += sum(architecture.numel(p, sizes) for p in architecture.parameters_of(layer, part))
        macs += sum(m.input.size(sizes) * m.output.size(sizes) for m in architecture.maps_of(layer, part))
        if architecture.cache and architecture.parts[part].axis in architecture.cache.names:
            cache += architecture.cache.size(sizes)
    decoder += sum(architecture.numel(p) for p in architecture.parameters if p.layer is not None and p.part is None)
    outside = architecture.total_parameters - architecture.decoder_parameters
    return Size(decoder=decoder, total=decoder + outside, macs=macs + architecture.head_macs, cache=cache)


def _network_size(architecture: Architecture, plan: Plan) -> Size:
    sizes = _network_sizes(architecture, plan)
    parameters = sum(architecture.numel(parameter, sizes) for parameter in architecture.parameters)
    macs = sum(m.rows * m.input.size(sizes) * m.output.size(sizes) for m in architecture.maps)
    return Size(decoder=parameters, total=parameters, macs=macs, cache=0)


def _network_sizes(architecture: Architecture, plan: Plan) -> dict[str, int]:
    kept = {architecture.parts[part].axis: plan.kept(layer, part) for layer, part in architecture.blocks()}
    return {**architecture.sizes, **kept}


def shape_after(architecture: Architecture, plan: Plan, parameter: Parameter) -> tuple[int, ...]:
    """The shape of a parameter that stays, in storage order."""
    if architecture.is_network:
        sizes = _network_sizes(architecture, plan)
    elif parameter.layer is None or parameter.part is None:
        sizes = dict(architecture.sizes)
    else:
        sizes = _sizes(architecture, plan, parameter.layer, parameter.part)
    return tuple(dim.size(sizes) for dim in parameter.dims)


def _sizes(architecture: Architecture, plan: Plan, layer: int, part: str) -> dict[str, int]:
    return {**architecture.sizes, architecture.parts[part].axis: plan.kept(layer, part)}
