"""Loss against size, memory or speed as a picture: points with intervals, labels beside them, lines behind them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from libprune.report.canvas import BLUE, GREY, INK, ORANGE, Axes, Bbox, Figure, new_figure, ratio_scale, styled

Style = Literal["plain", "chosen", "reference"]
_LOOKS: dict[Style, dict[str, Any]] = {
    "plain": {"color": BLUE, "marker": "o", "markeredgecolor": BLUE, "markersize": 5, "zorder": 3},
    "chosen": {"color": ORANGE, "marker": "D", "markeredgecolor": INK, "markersize": 8, "zorder": 4},
    "reference": {"color": INK, "marker": "s", "markeredgecolor": INK, "markersize": 5, "zorder": 3},
}
_PLACES = ((0, 9), (9, 0), (7, 6), (-9, 0), (0, -9), (-7, 6), (7, -6), (-7, -6), (16, 14), (-16, -14), (16, -14))
"""Where a label may stand beside its point, the best place first; points of 1/72 inch."""
_HEIGHT = 3.4
_TALLEST = 1e6
"""Largest ratio that is drawn; a model that loses more predicts nothing."""


@dataclass(frozen=True)
class Point:
    """A model in a picture.

    Attributes:
        x: its size, memory or speed.
        y: its loss.
        label: what it is, for the title that a page shows.
        low: the lower end of the loss's interval; NaN if it has none.
        high: the upper end.
        left: the lower end of the range of `x`; NaN if it has none.
        right: the upper end.
        tag: the text that stands beside it.
        style: how it is drawn.
    """

    x: float
    y: float
    label: str
    low: float = math.nan
    high: float = math.nan
    left: float = math.nan
    right: float = math.nan
    tag: str = ""
    style: Style = "plain"


@styled()
def draw_points(
    points: Sequence[Point],
    line: Sequence[tuple[float, float]],
    x_label: str,
    y_label: str,
    behind: Sequence[Point] = (),
    ringed: Sequence[Point] = (),
    above: tuple[float, str] | None = None,
) -> Figure:
    """Draw models by what they take and what they lose.

    Args:
        points: the models, of those here and in `behind` at least one.
        line: the places that a line joins.
        x_label: what `x` is.
        y_label: what `y` is.
        behind: models whose loss is only predicted, as a dashed line behind the others.
        ringed: points around which a ring is drawn.
        above: a second unit of `x` on the upper side: how much of it one of the first is, and its name.
    """
    figure, (axes,) = new_figure(1, _HEIGHT)
    if behind:
        places = [(one.x, min(one.y, _TALLEST)) for one in behind]
        axes.plot(*zip(*places, strict=True), color=GREY, linewidth=1.0, linestyle="--", zorder=1)
        for one, place in zip(behind, places, strict=True):
            axes.plot(*place, label=one.label, color=GREY, marker="o", markersize=3, zorder=2)
    if line:
        axes.plot(*zip(*line, strict=True), color=BLUE, linewidth=1.0)
    for one in points:
        _draw_point(axes, one)
    for one in ringed:
        axes.scatter([one.x], [one.y], s=190, facecolors="none", edgecolors=ORANGE, linewidths=1.6, zorder=5)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    ratio_scale(axes, [min(one.y, _TALLEST) for one in (*points, *behind)], "y")
    if above:
        _name_above(axes, *above)
    _place_labels(figure, axes, points, behind)
    return figure


def _draw_point(axes: Axes, one: Point) -> None:
    up, across = ([[one.y - one.low], [one.high - one.y]], [[one.x - one.left], [one.right - one.x]])
    axes.errorbar(
        one.x,
        one.y,
        up if math.isfinite(one.high - one.low) else None,
        across if math.isfinite(one.right - one.left) else None,
        label=one.label,
        ecolor=INK,
        elinewidth=0.8,
        capsize=2,
        **_LOOKS[one.style],
    )


def _name_above(axes: Axes, factor: float, name: str) -> None:
    def there(x: Any) -> Any:
        return x * factor

    def back(x: Any) -> Any:
        return x / factor

    upper = axes.secondary_xaxis("top", functions=(there, back))
    upper.set_xlabel(name)


def _place_labels(figure: Figure, axes: Axes, points: Sequence[Point], behind: Sequence[Point]) -> None:
    """Write the tags beside their points where they cover the fewest points, lines and other tags."""
    tagged = [one for one in (*points, *behind) if one.tag]
    if not tagged:
        return
    figure.draw_without_rendering()
    taken = _covered(axes, points, behind)
    frame = axes.get_window_extent().frozen()
    for one in tagged:
        texts = [_beside(axes, one, place) for place in _PLACES]
        boxes = [text.get_window_extent() for text in texts]
        best = min(range(len(boxes)), key=lambda i: (_faults(boxes[i], taken, frame), i))
        for i, text in enumerate(texts):
            if i != best:
                text.remove()
        taken.append(boxes[best])


def _beside(axes: Axes, one: Point, place: tuple[int, int]) -> Any:
    across, up = place
    return axes.annotate(
        one.tag,
        (one.x, min(one.y, _TALLEST)),
        xytext=place,
        textcoords="offset points",
        ha="center" if across == 0 else "left" if across > 0 else "right",
        va="center" if up == 0 else "bottom" if up > 0 else "top",
        fontsize=8,
        color=INK,
    )


def _covered(axes: Axes, points: Sequence[Point], behind: Sequence[Point]) -> list[Bbox]:
    """What labels must not cover, in pixels: points, their bars, and the line behind them."""
    to_pixels, half = axes.transData, 5.0
    boxes = []
    for one in (*points, *behind):
        ends = [(one.x, min(one.y, _TALLEST))]
        ends += [(one.x, y) for y in (one.low, one.high) if math.isfinite(y) and y > 0]
        ends += [(x, one.y) for x in (one.left, one.right) if math.isfinite(x)]
        place = to_pixels.transform(ends)
        boxes.append(Bbox([place.min(axis=0) - half, place.max(axis=0) + half]))
    for group in (sorted(points, key=lambda one: one.x), sorted(behind, key=lambda one: one.x)):
        if not group:
            continue
        line = to_pixels.transform([(one.x, min(one.y, _TALLEST)) for one in group])
        for start, end in pairwise(line):
            for share in np.linspace(0, 1, 12):
                middle = start + share * (end - start)
                boxes.append(Bbox([middle - 1.5, middle + 1.5]))
    return boxes


def _faults(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> int:
    """How much a label would cover; what leaves the frame counts most."""
    outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
    return 100 * int(outside) + sum(1 for other in taken if box.overlaps(other))


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of size and perplexity than which no other is both smaller and better, the smallest first."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best
