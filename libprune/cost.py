"""What units cost and what a plan leaves, counted from the axes alone."""

from dataclasses import dataclass

from libprune.architecture import Architecture, Parameter
from libprune.plan import Plan


@dataclass(frozen=True)
class Size:
    """What a model, or a pruned shape of it, amounts to.

    Attributes:
        decoder: parameters inside the blocks.
        total: all parameters, tied ones once.
        macs: multiply-accumulates of linear maps per token, with the output head and without the
            attention products (which depend on the context).
        cache: elements of the KV cache per token.
    """

    decoder: int
    total: int
    macs: int
    cache: int


def unit_parameters(architecture: Architecture, layer: int, part: str) -> int:
    """Parameters that go with one unit of a part, biases on its outputs included."""
    return sum(
        int((units == 0).sum()) * (architecture.numel(parameter) // parameter.dims[dim].size(architecture.sizes))
        for parameter, dim, units in architecture.carriers(layer, part)
    )


def unit_cost(architecture: Architecture, layer: int, part: str, objective: str) -> int:
    """What goes with one unit of a part: parameters, or multiply-accumulates or elements of the KV cache a token."""
    if objective == "parameters":
        return unit_parameters(architecture, layer, part)
    return _part_cost(architecture, layer, part, 1, objective) - _part_cost(architecture, layer, part, 0, objective)


def overhead(architecture: Architecture, layer: int, part: str, objective: str) -> int:
    """What goes only with the whole part."""
    if objective == "parameters":
        return part_overhead(architecture, layer, part)
    return _part_cost(architecture, layer, part, 0, objective)


def whole(architecture: Architecture, objective: str, of: str) -> int:
    """The dense model's amount: inside the blocks (`decoder`), or with embeddings and head too (`total`)."""
    dense = size(architecture, Plan.dense(architecture))
    if objective == "parameters":
        return dense.decoder if of == "decoder" else dense.total
    head = architecture.sizes["vocab"] * architecture.sizes["model"]
    return {"macs": dense.macs - (head if of == "decoder" else 0), "cache": dense.cache}[objective]


def removed(architecture: Architecture, plan: Plan, objective: str) -> int:
    """How much of an objective a plan removes."""
    dense, left = size(architecture, Plan.dense(architecture)), size(architecture, plan)
    name = {"parameters": "decoder"}.get(objective, objective)
    return int(getattr(dense, name) - getattr(left, name))


def _part_cost(architecture: Architecture, layer: int, part: str, count: int, objective: str) -> int:
    """Multiply-accumulates or cache elements of a part with so many units."""
    axis = architecture.parts[part].axis
    sizes = {**architecture.sizes, axis: count}
    if objective == "cache":
        return architecture.cache.size(sizes) if axis in architecture.cache.names else 0
    return sum(m.input.size(sizes) * m.output.size(sizes) for m in architecture.maps_of(layer, part))


def part_overhead(architecture: Architecture, layer: int, part: str) -> int:
    """Parameters that no unit carries and that go only with the whole part: norms, the consumer's bias."""
    carried = unit_parameters(architecture, layer, part) * architecture.units(part)
    return sum(map(architecture.numel, architecture.parameters_of(layer, part))) - carried


def size(architecture: Architecture, plan: Plan) -> Size:
    """The exact size of the model that a plan leaves."""
    decoder = macs = cache = 0
    for layer, part in architecture.blocks():
        if plan.gone(layer, part):
            continue
        sizes = _sizes(architecture, plan, layer, part)
        decoder += sum(architecture.numel(p, sizes) for p in architecture.parameters_of(layer, part))
        macs += sum(m.input.size(sizes) * m.output.size(sizes) for m in architecture.maps_of(layer, part))
        if architecture.parts[part].axis in architecture.cache.names:
            cache += architecture.cache.size(sizes)
    outside = architecture.total_parameters - architecture.decoder_parameters
    head = architecture.sizes["vocab"] * architecture.sizes["model"]
    return Size(decoder=decoder, total=decoder + outside, macs=macs + head, cache=cache)


def shape_after(architecture: Architecture, plan: Plan, parameter: Parameter) -> tuple[int, ...]:
    """The shape of a parameter that stays, in storage order."""
    if parameter.layer is None or parameter.part is None:
        sizes = dict(architecture.sizes)
    else:
        sizes = _sizes(architecture, plan, parameter.layer, parameter.part)
    return tuple(dim.size(sizes) for dim in parameter.dims)


def _sizes(architecture: Architecture, plan: Plan, layer: int, part: str) -> dict[str, int]:
    return {**architecture.sizes, architecture.parts[part].axis: plan.kept(layer, part)}
