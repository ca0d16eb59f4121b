"""A drawn figure as SVG inside a page: its colours follow the page's theme, and its points show their values."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.collections import QuadMesh
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.lines import Line2D

from libprune.report.canvas import Axes, Figure, styled

_THEMED = {
    "#000000": "currentColor",
    "#222222": "currentColor",
    "#ffffff": "var(--paper)",
    "#dddddd": "var(--line)",
    "#e4e4e4": "var(--band)",
}
"""What stands for a colour of the pictures in the page, whose style sheet names both themes' colours."""
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NAMED = re.compile(r"(?<=url\(#)[\w-]+")
_POINT = 9.0
"""Side of the square that answers for a point, and shortest side of that of a bar, in points of 1/72 inch."""
_DROPPED = {"metadata", "style"}


@dataclass(frozen=True)
class Spot:
    """A rectangle of a picture that has something to say.

    Attributes:
        box: left, top, width and height in points of 1/72 inch, from the upper left corner of the figure.
        text: what is drawn there, in words and numbers.
    """

    box: tuple[float, float, float, float]
    text: str


def svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as an element of HTML, which shows the value of a point as its title, and needs no style of its own.

    The same figure gives the same text. Style attributes, which a strict policy forbids, become attributes of SVG.

    Args:
        figure: the figure; it is drawn, and so laid out.
        name: begins all identifiers in it, so that several pictures can stand on one page.
        alt: a description for readers who cannot see it.
    """
    buffer = io.StringIO()
    with styled(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(_NOT_XML.sub("\ufffd", buffer.getvalue()))
    written = [(_local(key), value) for element in root.iter() for key, value in element.attrib.items()]
    named = {value[1:] for key, value in written if key == "href" and value.startswith("#")}
    named |= {match for _, value in written for match in _NAMED.findall(value)}
    drawn = _plain(root, name, named)
    drawn.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": _NOT_XML.sub("\ufffd", alt),
        "fill": "currentColor",
        "font-family": "DejaVu Sans, Verdana, sans-serif",
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }
    spots = ElementTree.SubElement(drawn, "g", {"class": "spots", "fill": "none", "pointer-events": "all"})
    for spot in find_spots(figure):
        box = zip(("x", "y", "width", "height"), (f"{side:.1f}" for side in spot.box), strict=True)
        title = ElementTree.SubElement(ElementTree.SubElement(spots, "rect", dict(box)), "title")
        title.text = _NOT_XML.sub("\ufffd", spot.text)
    return ElementTree.tostring(drawn, encoding="unicode")


def _plain(element: ElementTree.Element, name: str, named: set[str]) -> ElementTree.Element:
    """An element of matplotlib's SVG without name spaces, style attributes, and identifiers that nothing names."""
    plain = ElementTree.Element(_local(element.tag))
    written = {_local(key): value for key, value in element.attrib.items()}
    style = (entry.split(":", 1) for entry in written.pop("style", "").split(";") if entry.strip())
    written |= {key.strip(): value.strip() for key, value in style}
    for key, value in written.items():
        if key == "href" and value.startswith("#"):
            plain.set(key, f"#{name}-{value[1:]}")
        elif key == "id" and value in named:
            plain.set(key, f"{name}-{value}")
        elif key not in {"id", "font-family"} and not value.startswith("rotate(-0 "):
            plain.set(key, _THEMED.get(value, " ".join(_NAMED.sub(rf"{name}-\g<0>", value).split())))
    plain.text = element.text if (element.text or "").strip() else None
    plain.extend(_plain(child, name, named) for child in element if _local(child.tag) not in _DROPPED)
    return plain


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def find_spots(figure: Figure) -> Iterator[Spot]:
    """Bars, cells of a heat map, and marked points of lines, in the order in which they are drawn.

    Args:
        figure: a figure that was drawn, so that its layout is final.
    """
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    below = next((axes.get_xlabel() for axes in reversed(panels) if axes.get_xlabel()), "").partition(" (")[0]
    for axes in panels:
        for mesh in (one for one in axes.collections if isinstance(one, QuadMesh)):
            yield from _cells(axes, mesh, below)
        inside: set[Any] = set()
        for part in axes.containers:
            if isinstance(part, BarContainer):
                yield from _bars(axes, part, below)
            elif isinstance(part, ErrorbarContainer):
                inside |= {part.lines[0], *part.lines[1]}
                yield from _points(axes, part.lines[0], str(part.get_label()), below, _errors(part))
        for line in axes.lines:
            if line not in inside and line.get_marker() not in {"None", "none", "", " ", None}:
                yield from _points(axes, line, str(line.get_label()), below, None)


def _cells(axes: Axes, mesh: QuadMesh, below: str) -> Iterator[Spot]:
    corners, values = np.asarray(mesh.get_coordinates()), mesh.get_array()
    assert values is not None
    rows = [label.get_text() for label in axes.get_yticklabels()]
    for (row, column), value in np.ndenumerate(np.ma.filled(values.astype(float), np.nan)):
        if np.isfinite(value):
            low, high = corners[row, column], corners[row + 1, column + 1]
            place = _place(below, float(low[0]), float(high[0]))
            yield Spot(_box(axes, low, high, 0.0), f"{place}, {rows[row]}: {value:.3g}")


def _bars(axes: Axes, bars: BarContainer, below: str) -> Iterator[Spot]:
    what, unit = _measured(axes, str(bars.get_label()))
    for bar in bars.patches:
        (x0, y0), (x1, y1) = bar.get_bbox().get_points()
        if y0 != y1 and not what.startswith("_"):
            text = f"{_place(below, x0, x1)}, {what}: {_number(y1 - y0)}{unit}"
            yield Spot(_box(axes, np.array([x0, y0]), np.array([x1, y1]), _POINT), text)


def _points(axes: Axes, line: Line2D, label: str, below: str, errors: list[float] | None) -> Iterator[Spot]:
    what, unit = _measured(axes, label)
    in_data = line.get_transform().contains_branch_seperately(axes.transData)[1]
    points = np.column_stack([np.asarray(values, dtype=float) for values in line.get_data()])
    for index, (x, y) in enumerate(points):
        if np.isfinite([x, y]).all():
            value = f": {_number(y)}{unit}" if in_data else ""
            error = f" ± {errors[index]:.2g}" if errors and errors[index] else ""
            shown = line.get_transform().transform((x, y))
            here = axes.transData.inverted().transform(shown)
            yield Spot(_box(axes, here, here, _POINT), f"{_place(below, x, x)}, {what}{value}{error}")


def _errors(bars: ErrorbarContainer) -> list[float]:
    """Half the length of the vertical bar of each point."""
    lines = bars.lines[2][-1].get_segments() if bars.has_yerr else []
    return [float(line[1][1] - line[0][1]) / 2 for line in lines]


def _measured(axes: Axes, label: str) -> tuple[str, str]:
    """What a value is of, by its label or else by the y axis, and its unit if that is a percentage."""
    axis = axes.get_ylabel().partition("\n")[0]
    return label if not label.startswith("_") else axis.partition(",")[0] or label, " %" if axis.endswith("%") else ""


def _place(below: str, low: float, high: float) -> str:
    """Where a value stands along x: the layer, a number, or the range of a bin."""
    if below == "layer":
        return f"layer {(low + high) / 2:.0f}"
    return f"{below} {_number(low)}" + (f" to {_number(high)}" if high > low else "")


def _number(value: float) -> str:
    """A number in four digits, or a whole one in all of its own."""
    return f"{value:,.0f}" if abs(value) < 1e15 and value == round(value) else f"{value:.4g}"


def _box(axes: Axes, low: Any, high: Any, least: float) -> tuple[float, float, float, float]:
    """The rectangle between two corners in the units of the axes, with sides that are at least as long."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    corners = axes.transData.transform([low, high]) * 72 / figure.dpi
    (left, bottom), (right, top) = corners.min(axis=0), corners.max(axis=0)
    wide, tall = max(least, right - left), max(least, top - bottom)
    upper = figure.get_figheight() * 72
    return (left + right - wide) / 2, upper - (bottom + top + tall) / 2, wide, tall
