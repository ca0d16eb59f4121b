"""An inspection as text, aligned and at most 100 columns wide, and as data for other programs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from textwrap import fill
from typing import Any

from libprune.cli.footprint import Footprint
from libprune.cli.inspection import Inspection, Shape
from libprune.engine import cost
from libprune.engine.architecture import WHOLE, WITH_LAYER, Architecture, Parameter
from libprune.engine.plan import Plan
from libprune.pipeline.terminal import gigabytes

Row = tuple[str, ...]
"""The cells of a row of a table."""


def as_text(inspection: Inspection) -> str:
    """The inspection for readers: the model, its parameters, the bytes that stages write, and uniform shapes."""
    architecture = inspection.architecture
    shown = [_what(inspection), _parameters(architecture), _stages(inspection.stages)]
    return "\n\n".join([*shown, _shapes(inspection.shapes, list(architecture.parts), inspection.division)])


def _what(inspection: Inspection) -> str:
    architecture = inspection.architecture
    kind = f"{architecture.family} ({inspection.model_class})"
    stored = f"{inspection.dtype}, dequantised from {inspection.stored}" if inspection.stored else inspection.dtype
    facts = [
        ("model", inspection.model),
        ("family", f"{kind}, {architecture.layers} layers, stored as {stored}"),
        ("axes", ", ".join(f"{axis} {size:,}" for axis, size in _axes(architecture).items())),
    ]
    if inspection.vocabulary:
        facts.append(("vocabulary", f"rows go that {inspection.vocabulary} never needs; below are all of them"))
    for part, shape in architecture.parts.items():
        each = cost.unit_parameters(architecture, architecture.with_part(part)[0], part)
        said = "" if shape.expressible is None else f"; a stock config says {_counts(shape.expressible)}"
        if shape.pairs is not None:
            said = f"; a stock config says {_counts(tuple(f'{heads} in {groups}' for groups, heads in shape.pairs))}"
        if shape.coupled:
            said = f"; they go together, coupled by {' and '.join(shape.coupled)}"
        units = f"{architecture.units(part):,} {shape.units} a layer (axis {shape.axis})"
        if shape.outer:
            more = cost.group_parameters(architecture, architecture.with_part(part)[0], part)
            units = f"{architecture.units(part):,} query heads a layer in {shape.groups:,} groups (axes {shape.axis}, "
            units += f"{shape.outer}; {more:,} parameters more go with a group)"
        facts.append((part, f"{units}, {each:,} parameters each{said}"))
    mixture = _mixture(architecture)
    if mixture is not None:
        facts += [("mixture", line) for line in _mixture_lines(mixture)]
    width = max(10, *(len(name) for name, _ in facts))
    return "\n".join(f"{name:<{width}} {fact}" for name, fact in facts)


def _mixture(architecture: Architecture) -> dict[str, Any] | None:
    """What a mixture of experts is made of, for programs; None for a dense model."""
    stacks = [entry for entry in architecture.maps if entry.stack]
    if not stacks:
        return None
    inside = any(architecture.multiple(part) > 1 for part in architecture.parts)
    size = cost.size(architecture, Plan.dense(architecture))
    return {
        "layers": len({entry.layer for entry in stacks}),
        "experts": stacks[0].copies(architecture.sizes),
        "experts_per_token": stacks[0].active,
        "least_experts": max((shape.least for shape in architecture.parts.values() if shape.router), default=None),
        "groups": max(shape.groups for shape in architecture.parts.values()),
        "units": "channels" if inside else "whole",
        "active_parameters": size.total - size.decoder + size.active,
        "total_parameters": size.total,
    }


def _mixture_lines(mixture: Mapping[str, Any]) -> Iterator[str]:
    active, total = mixture["active_parameters"], mixture["total_parameters"]
    each, chosen = f"{mixture['experts']} experts in each of {mixture['layers']} layers", mixture["experts_per_token"]
    yield f"{each}, {chosen} for a token"
    yield f"{active:,} parameters are active for a token, {100 * active / total:.1f} % of all"
    if mixture["units"] == "channels":
        yield "this run cuts channels, the same in all experts of a layer, in multiples of 8"
        yield "prepare.experts: whole cuts whole experts; a result can be the model of the other run"
        return
    groups = f", as many in each of its {mixture['groups']} groups" if mixture["groups"] > 1 else ""
    yield f"this run cuts whole experts; a layer keeps {mixture['least_experts']} or more{groups}"
    yield "prepare.experts: channels cuts inside of experts; a result can be the model of the other run"


def _axes(architecture: Architecture) -> dict[str, int]:
    """The axes with their sizes, without those of tensors that stay whole."""
    return {axis: size for axis, size in architecture.sizes.items() if not axis.startswith(WHOLE)}


def _counts(counts: tuple[int | str, ...]) -> str:
    listed = ", ".join(map(str, counts[:8]))
    return f"{listed}, ... ({len(counts)} counts)" if len(counts) > 8 else listed


def _parameters(architecture: Architecture) -> str:
    total = architecture.total_parameters
    rows: list[Row] = []
    shown = None
    for part in architecture.parts:
        layers = architecture.with_part(part)
        if layers[0] != shown:
            shown = layers[0]
            rows.append((f"layer {shown}", *(("", "", "", "") if rows else ("axes", "shape", "parameters", ""))))
        before = f"{architecture.layers_path}.{layers[0]}."
        rows += [_parameter(architecture, p, before) for p in architecture.parameters_of(layers[0], part)]
        rows.append(_sum(f"{part}, {len(layers)} layers", _part_parameters(architecture, part), total))
    for kind, said in ((WITH_LAYER, "what several parts read"), (None, "norms that stay")):
        norms = [p for p in architecture.parameters if p.layer is not None and p.part == kind]
        if norms:
            rows += [_parameter(architecture, p, f"{architecture.layers_path}.0.") for p in norms if p.layer == 0]
            rows.append(_sum(said, sum(map(architecture.numel, norms)), total))
    outside = [parameter for parameter in architecture.parameters if parameter.layer is None]
    rows += [_parameter(architecture, parameter, "") for parameter in outside if not parameter.whole]
    whole = [parameter for parameter in outside if parameter.whole]
    if whole:
        number = f"{sum(map(architecture.numel, whole)):,}"
        rows.append((f"  beside the language model, {len(whole)} tensors", "", "", number, ""))
    rows += [_sum("outside the layers", _part_parameters(architecture, None), total), _sum("all", total, total)]
    return _aligned(rows, right=(3, 4))


def _parameter(architecture: Architecture, parameter: Parameter, prefix: str) -> Row:
    axes = ", ".join(map(str, parameter.dims))
    shape = " × ".join(f"{dim.size(architecture.sizes):,}" for dim in parameter.dims)
    return f"  {parameter.name.removeprefix(prefix)}", axes, shape, f"{architecture.numel(parameter):,}", ""


def _sum(name: str, count: int, total: int) -> Row:
    return name, "", "", f"{count:,}", f"{100 * count / total:.1f} %"


def _stages(stages: Sequence[Footprint]) -> str:
    rows: list[Row] = [("stage", "writes", "running sums", "with")]
    rows += [(s.stage, _bytes(s.written), _bytes(s.sums), s.settings) for s in stages]
    rows.append(("all", _bytes(sum(stage.written for stage in stages)), "", ""))
    notes = (
        f"{s.stage} takes {_bytes(s.training)} of memory, beside the activations, and up to {_bytes(s.checkpoints)} of "
        "checkpoints"
        for s in stages
        if s.training
    )
    return "\n".join([_aligned(rows, right=(1, 2)), *notes])


def _bytes(number: int) -> str:
    """A number of bytes as text, in GB, MB or kB; a dash for less than 100."""
    if number < 100:
        return "-"
    return gigabytes(number) if number >= 1e6 else f"{number / 1e3:,.1f} kB"


def _shapes(shapes: Sequence[Shape], parts: list[str], division: str) -> str:
    least = ("least from",) if any(shape.spared for shape in shapes) else ()
    states = ("state a sequence",) if any(shape.state for shape in shapes) else ()
    header = ("remove", *least, *parts, "removed", "all", "weights", "cache a token", *states, "loads")
    rows: list[Row] = [header]
    notes: list[str] = []
    divided: dict[str, list[str]] = {}
    for shape in shapes:
        name = f"{100 * shape.ratio:.3g} %" if shape.ratio else "dense"
        if shape.refused:
            notes.append(f"{name}: nor this" if notes else f"{name}: {shape.refused}")  # larger shares, same reason
            continue
        kept = (f"{shape.kept[part]:,}" + _in_groups(shape.groups.get(part)) for part in parts)
        counts = f"{100 * shape.removed:.1f} %", f"{shape.total:,}"
        loads = "stock" if shape.loads == "uniform" else "own code"
        spared = (shape.spared,) if least else ()
        state = (_bytes(shape.state),) if states else ()
        rows.append((name, *spared, *kept, *counts, _bytes(shape.weights), _bytes(shape.cache), *state, loads))
        divided.setdefault(", ".join(map(str, shape.tensor_parallel)), []).append(f"{name} {shape.spared}".strip())
    sizes = "; ".join(f"{', '.join(names)}: {devices}" for devices, names in divided.items())
    parallel = fill(f"devices of tensor parallelism: {sizes}", 100)
    title = fill(f"uniform shapes: units kept in each layer, {division}", 100)
    return "\n".join([title, _aligned(rows, right=range(len(header) - 1)), parallel, *notes])


def _in_groups(groups: int | None) -> str:
    return "" if groups is None else f" in {groups:,}"


def _aligned(rows: list[Row], right: Iterable[int]) -> str:
    """Rows as text in columns with two blanks between them; the columns of these numbers are right aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = [">" if i in right else "<" for i in range(len(widths))]
    lines = ("  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def as_data(inspection: Inspection) -> dict[str, Any]:
    """The inspection for programs, as it is written to JSON: numbers unrounded, and the bytes of every file."""
    architecture = inspection.architecture
    return {
        "model": inspection.model,
        "class": inspection.model_class,
        "dtype": inspection.dtype,
        "stored": inspection.stored,
        "family": architecture.family,
        "layers": architecture.layers,
        "axes": _axes(architecture),
        "parts": {
            part: {
                "axis": shape.axis,
                "units": shape.units,
                "units_per_layer": architecture.units(part),
                "parameters_per_unit": cost.unit_parameters(architecture, architecture.with_part(part)[0], part),
                "parameters": _part_parameters(architecture, part),
            }
            for part, shape in architecture.parts.items()
        },
        "mixture": _mixture(architecture),
        "outside": _part_parameters(architecture, None),
        "decoder_parameters": architecture.decoder_parameters,
        "total_parameters": architecture.total_parameters,
        "parameters": [
            {
                "name": parameter.name,
                "axes": [str(dim) for dim in parameter.dims],
                "shape": [dim.size(architecture.sizes) for dim in parameter.dims],
                "layer": parameter.layer,
                "part": parameter.part,
            }
            for parameter in architecture.parameters
        ],
        "shapes": [asdict(shape) for shape in inspection.shapes],
        "division": inspection.division,
        "stages": [asdict(stage) | {"written": stage.written} for stage in inspection.stages],
    }


def _part_parameters(architecture: Architecture, part: str | None) -> int:
    """Number of parameters of a part in all layers; for None, of all that lies outside the layers."""
    chosen = (p for p in architecture.parameters if p.part == part and (p.layer is None) == (part is None))
    return sum(map(architecture.numel, chosen))
