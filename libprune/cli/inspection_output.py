"""An inspection as text, aligned and at most 100 columns wide, and as data for other programs."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from textwrap import fill
from typing import Any

from libprune.cli.footprint import Footprint
from libprune.cli.inspection import Inspection, Shape
from libprune.engine import cost
from libprune.engine.architecture import WHOLE, WITH_LAYER, Architecture, Parameter
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
    facts = [
        ("model", inspection.model),
        ("family", f"{kind}, {architecture.layers} layers, stored as {inspection.dtype}"),
        ("axes", ", ".join(f"{axis} {size:,}" for axis, size in _axes(architecture).items())),
    ]
    for part, shape in architecture.parts.items():
        each = cost.unit_parameters(architecture, architecture.with_part(part)[0], part)
        said = "" if shape.expressible is None else f"; a stock config says {_counts(shape.expressible)}"
        if shape.coupled:
            said = f"; they go together, coupled by {' and '.join(shape.coupled)}"
        facts.append(
            (part, f"{architecture.units(part):,} units a layer (axis {shape.axis}), {each:,} parameters each{said}")
        )
    return "\n".join(f"{name:<10} {fact}" for name, fact in facts)


def _axes(architecture: Architecture) -> dict[str, int]:
    """The axes with their sizes, without those of tensors that stay whole."""
    return {axis: size for axis, size in architecture.sizes.items() if not axis.startswith(WHOLE)}


def _counts(counts: tuple[int, ...]) -> str:
    listed = ", ".join(map(str, counts[:8]))
    return f"{listed}, ... ({len(counts)} counts)" if len(counts) > 8 else listed


def _parameters(architecture: Architecture) -> str:
    total = architecture.total_parameters
    rows: list[Row] = [("layer 0", "axes", "shape", "parameters", "")]
    for part in architecture.parts:
        layers = architecture.with_part(part)
        if layers[0]:
            rows.append((f"layer {layers[0]}", "", "", "", ""))
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
    header = ("remove", *least, *parts, "removed", "all", "weights", "cache a token", "loads")
    rows: list[Row] = [header]
    notes: list[str] = []
    divided: dict[str, list[str]] = {}
    for shape in shapes:
        name = f"{100 * shape.ratio:.3g} %" if shape.ratio else "dense"
        if shape.refused:
            notes.append(f"{name}: nor this" if notes else f"{name}: {shape.refused}")  # larger shares, same reason
            continue
        kept = (f"{shape.kept[part]:,}" for part in parts)
        counts = f"{100 * shape.removed:.1f} %", f"{shape.total:,}"
        loads = "stock" if shape.loads == "uniform" else "own code"
        spared = (shape.spared,) if least else ()
        rows.append((name, *spared, *kept, *counts, _bytes(shape.weights), _bytes(shape.cache), loads))
        divided.setdefault(", ".join(map(str, shape.tensor_parallel)), []).append(f"{name} {shape.spared}".strip())
    sizes = "; ".join(f"{', '.join(names)}: {devices}" for devices, names in divided.items())
    parallel = fill(f"devices of tensor parallelism: {sizes}", 100)
    title = fill(f"uniform shapes: units kept in each layer, {division}", 100)
    return "\n".join([title, _aligned(rows, right=range(len(header) - 1)), parallel, *notes])


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
        "family": architecture.family,
        "layers": architecture.layers,
        "axes": _axes(architecture),
        "parts": {
            part: {
                "axis": shape.axis,
                "units_per_layer": architecture.units(part),
                "parameters_per_unit": cost.unit_parameters(architecture, architecture.with_part(part)[0], part),
                "parameters": _part_parameters(architecture, part),
            }
            for part, shape in architecture.parts.items()
        },
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
