"""Pictures of a curve: all models are in them, and labels cover neither points nor each other."""

import itertools

import numpy as np
import pytest

from libprune.curves.pictures import Point, draw_points
from libprune.report.canvas import styled

DENSE = Point(100.0, 1.0, "dense", tag="dense", style="reference")


def curve(count: int, bend: float = 3.0) -> list[Point]:
    """Models that lose more and more, the smallest last."""
    shares = np.linspace(0.1, 0.9, count)
    return [
        Point(100 * (1 - s), float(np.exp(bend * s**2)), f"{s:.2f}", float(np.exp(bend * s**2) * 0.97),
              float(np.exp(bend * s**2) * 1.03), tag=f"{100 * s:.0f} %")
        for s in shares
    ]  # fmt: skip


def boxes(figure):
    with styled():
        figure.draw_without_rendering()
        return {text.get_text(): text.get_window_extent() for text in figure.axes[0].texts}


@pytest.mark.parametrize(("count", "bend"), [(1, 3.0), (9, 0.3), (9, 3.0), (9, 8.0)])
def test_labels_cover_neither_points_nor_each_other(count, bend):
    points = [DENSE, *curve(count, bend)]
    figure = draw_points(points, [(one.x, one.y) for one in points], "size", "loss")
    found = boxes(figure)
    assert found.keys() == {one.tag for one in points}
    assert not any(one.overlaps(other) for one, other in itertools.combinations(found.values(), 2))
    places = figure.axes[0].transData.transform([(one.x, one.y) for one in points])
    assert not any(box.contains(*place) for box in found.values() for place in places)


def test_predictions_lie_behind_as_a_dashed_line_and_the_bend_has_a_ring():
    points, behind = [DENSE, *curve(3)], [DENSE, *curve(5, 2.0)]
    figure = draw_points(points, [], "size", "loss", behind, points[2:3])
    (axes,) = figure.axes
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in dashed] == [[one.x for one in behind]]
    assert dashed[0].get_zorder() < min(part.lines[0].get_zorder() for part in axes.containers)
    (ring,) = axes.collections[-1:]
    assert ring.get_offsets().tolist() == [[points[2].x, points[2].y]]


@pytest.mark.parametrize(("highest", "scale"), [(2.0, "linear"), (8.0, "log"), (1e30, "log")])
def test_losses_that_differ_much_are_on_a_logarithmic_axis(highest, scale):
    behind = [DENSE, Point(50.0, highest, "predicted")]
    (axes,) = draw_points([DENSE], [], "size", "loss", behind).axes
    assert axes.get_yscale() == scale
    assert axes.get_ylim()[1] < 1e7, "what predicts nothing does not stretch the picture"


def test_a_second_unit_stands_above():
    (axes,) = draw_points([DENSE, *curve(2)], [], "parameters", "loss", above=(2.0, "MB")).axes
    (upper,) = axes.child_axes
    assert upper.get_xlabel() == "MB"
    low, high = axes.get_xlim()
    axes.figure.draw_without_rendering()
    assert upper.get_xlim() == pytest.approx((2 * low, 2 * high))
