"""A picture of the filters of two convolutions, and of those that each criterion keeps."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from libprune.engine.plan import Plan
from libprune.report.canvas import BLUE, ORANGE, WIDTH, Axes, Figure, Patch, Rectangle, styled

_COLUMNS = (3, 4)
"""Filters beside each other, of either convolution."""
_GAP = 2
"""Cells between two filters."""
_FADED = 0.25
_FRAMES: dict[bool, dict[str, Any]] = {
    True: {"color": BLUE, "linewidth": 1.6, "linestyle": "-"},
    False: {"color": ORANGE, "linewidth": 0.8, "linestyle": ":"},
}


@styled()
def filters(first: Tensor, second: Tensor, plans: Mapping[str, Plan]) -> Figure:
    """A column a criterion, a row a convolution; filters that are removed are faded.

    Args:
        first: weights of the first convolution, ``[filters, 1, height, width]``.
        second: of the second, ``[filters, inputs, height, width]``; its inputs are drawn in rows of three.
        plans: by criterion which units stay, the first two parts being the filters of these.
    """
    figure = Figure(figsize=(WIDTH, 4.1), layout="constrained", facecolor="white")
    rows = figure.subplots(2, len(plans), squeeze=False, height_ratios=(1, 1.25))
    for panels, weight, columns, row in zip(rows, (first, second), _COLUMNS, (0, 1), strict=True):
        for axes, (criterion, plan) in zip(panels, plans.items(), strict=True):
            part = list(plan.keep)[row]
            keep = plan.keep[part]
            _draw(axes, weight.detach().numpy(), keep, columns)
            axes.set_title(f"{criterion}\n{keep.sum()} of {len(keep)}" if row == 0 else f"{keep.sum()} of {len(keep)}")
        panels[0].set_ylabel(f"conv{row + 1}")
    handles = [
        Rectangle((0, 0), 1, 1, fill=False, label="kept", **_FRAMES[True]),
        Rectangle((0, 0), 1, 1, fill=False, label="removed", **_FRAMES[False]),
        Patch(color=_colours(np.array([-1.0]))[0], label="negative weight"),
        Patch(color=_colours(np.array([1.0]))[0], label="positive weight"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _draw(
    axes: Axes,
    weight: Float[np.ndarray, "filters inputs height width"],
    keep: Bool[np.ndarray, " filters"],
    columns: int,
) -> None:
    scale = np.abs(weight).max()
    for number, (kernels, kept) in enumerate(zip(weight, keep, strict=True)):
        tile = _tile(kernels / scale)
        height, width = tile.shape
        x, y = (number % columns) * (width + _GAP), (number // columns) * (height + _GAP)
        colours = _colours(tile)
        axes.imshow(colours if kept else 1 - _FADED * (1 - colours), extent=(x, x + width, y + height, y))
        axes.add_patch(Rectangle((x, y), width, height, fill=False, **_FRAMES[bool(kept)]))
    rows = -(-len(keep) // columns)
    axes.set_xlim(-1, columns * (width + _GAP) - _GAP + 1)
    axes.set_ylim(rows * (height + _GAP) - _GAP + 1, -1)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _tile(kernels: Float[np.ndarray, "inputs height width"]) -> Float[np.ndarray, "rows columns"]:
    """A filter as one image, its inputs in rows of three."""
    rows = [np.concatenate(list(kernels[start : start + 3]), 1) for start in range(0, len(kernels), 3)]
    return np.concatenate(rows, 0)


def _colours(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape 3"]:
    """White at 0, towards blue below and towards red above; values of -1 to 1."""
    ends = np.where(values[..., None] < 0, [0.13, 0.40, 0.67], [0.70, 0.09, 0.17])
    return 1 - np.abs(values)[..., None] * (1 - ends)
