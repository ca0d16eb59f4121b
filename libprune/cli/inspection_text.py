"""An inspection for reading: aligned, at most 100 columns wide."""

from collections.abc import Iterable

from libprune.cli.footprint import Footprint
from libprune.cli.inspection import Inspection, Shape, part_parameters
from libprune.engine import cost
from libprune.engine.architecture import Architecture, Parameter
from libprune.pipeline.terminal import gigabytes

Row = tuple[str, ...]


def as_text(inspection: Inspection) -> str:
    """All of an inspection, a paragraph for each question."""
    architecture = inspection.architecture
    shown = [_what(inspection), _parameters(architecture), _stages(inspection.stages)]
    return "\n\n".join([*shown, _shapes(inspection.shapes, list(architecture.parts))])


def _what(inspection: Inspection) -> str:
    architecture = inspection.architecture
    kind = f"{architecture.family} ({inspection.model_class})"
    facts = [
        ("model", inspection.model),
        ("family", f"{kind}, {architecture.layers} layers, stored as {inspection.dtype}"),
        ("axes", ", ".join(f"{axis} {size:,}" for axis, size in architecture.sizes.items())),
    ]
    for part, shape in architecture.parts.items():
        each = cost.unit_parameters(architecture, 0, part)
        said = "" if shape.expressible is None else f"; a stock config says {_counts(shape.expressible)}"
        if shape.coupled:
            said = f"; they go together, coupled by {' and '.join(shape.coupled)}"
        facts.append(
            (part, f"{architecture.units(part):,} units a layer (axis {shape.axis}), {each:,} parameters each{said}")
        )
    return "\n".join(f"{name:<10} {fact}" for name, fact in facts)


def _counts(counts: tuple[int, ...]) -> str:
    listed = ", ".join(map(str, counts[:8]))
    return f"{listed}, ... ({len(counts)} counts)" if len(counts) > 8 else listed


def _parameters(architecture: Architecture) -> str:
    total = architecture.total_parameters
    rows: list[Row] = [("layer 0", "axes", "shape", "parameters", "")]
    for part in architecture.parts:
        rows += [
            _parameter(architecture, p, f"{architecture.layers_path}.0.") for p in architecture.parameters_of(0, part)
        ]
        rows.append(_sum(f"{part}, {architecture.layers} layers", part_parameters(architecture, part), total))
    staying = [p for p in architecture.parameters if p.layer is not None and p.part is None]
    if staying:
        rows += [_parameter(architecture, p, f"{architecture.layers_path}.0.") for p in staying if p.layer == 0]
        rows.append(_sum("norms that stay", sum(map(architecture.numel, staying)), total))
    outside = [parameter for parameter in architecture.parameters if parameter.layer is None]
    rows += [_parameter(architecture, parameter, "") for parameter in outside]
    rows += [_sum("outside the layers", part_parameters(architecture, None), total), _sum("all", total, total)]
    return _aligned(rows, right=(3, 4))


def _parameter(architecture: Architecture, parameter: Parameter, prefix: str) -> Row:
    axes = ", ".join(map(str, parameter.dims))
    shape = " × ".join(f"{dim.size(architecture.sizes):,}" for dim in parameter.dims)
    return f"  {parameter.name.removeprefix(prefix)}", axes, shape, f"{architecture.numel(parameter):,}", ""


def _sum(name: str, count: int, total: int) -> Row:
    return name, "", "", f"{count:,}", f"{100 * count / total:.1f} %"


def _stages(stages: Iterable[Footprint]) -> str:
    rows: list[Row] = [("stage", "writes", "running sums", "with")]
    rows += [(s.stage, size(s.written), size(s.sums), s.settings) for s in stages]
    rows.append(("all", size(sum(stage.written for stage in stages)), "", ""))
    return _aligned(rows, right=(1, 2))


def size(number: int) -> str:
    """A number of bytes for reading, small ones too."""
    if number < 100:
        return "-"
    return gigabytes(number) if number >= 1e6 else f"{number / 1e3:,.1f} kB"


def _shapes(shapes: Iterable[Shape], parts: list[str]) -> str:
    header = ("remove", *parts, "decoder", "removed", "all", "weights", "cache a token", "loads")
    rows: list[Row] = [header]
    notes: list[str] = []
    for shape in shapes:
        name = f"{100 * shape.ratio:.0f} %" if shape.ratio else "dense"
        if shape.refused:
            notes.append(f"{name}: nor this" if notes else f"{name}: {shape.refused}")  # larger shares, same reason
            continue
        kept = (f"{shape.kept[part]:,}" for part in parts)
        counts = f"{shape.decoder:,}", f"{100 * shape.removed:.1f} %", f"{shape.total:,}"
        loads = "stock" if shape.loads == "uniform" else "own code"
        rows.append((name, *kept, *counts, size(shape.weights), size(shape.cache), loads))
    title = "uniform shapes: units kept in each layer, if the parts lose alike (allocate.split: proportional)"
    return "\n".join([title, _aligned(rows, right=range(len(header) - 1)), *notes])


def _aligned(rows: list[Row], right: Iterable[int]) -> str:
    """Rows as columns, two blanks apart; the named columns to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = [">" if i in right else "<" for i in range(len(widths))]
    lines = ("  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)
