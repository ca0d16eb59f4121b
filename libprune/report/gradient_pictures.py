"""Pictures of the gradients by layer, from the rows of `gradients/layers.parquet`.

Every picture needs at least one row. Gradients are those of the mean-token loss, in nats per token and unit of weight.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.engine.tables import Columns
from libprune.report.canvas import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    Axes,
    Figure,
    LogNorm,
    Patch,
    layer_axis,
    new_figure,
    set_title,
    styled,
)
from libprune.report.gradient_text import batch_means, grouped_mean, layer_summary, ratio_text
from libprune.statistics.gradient_health import gradient_by_layer, gradient_ratio, verdict

FIRST_BATCHES = 5
"""Number of batches that `draw_grad_comparison` shows."""
_UNIT = "nats per token and unit of weight"
_BATCH_LOOKS = tuple(zip((BLUE, ORANGE, GREEN, PURPLE, SKY), "os^Dv", strict=True))


@styled()
def draw_grad_dist(rows: Columns) -> Figure:
    """Draw mean |g| of every parameter in every batch, one box a layer; zeros are marked at the lower edge."""
    figure, (axes,) = new_figure(1, 3.4)
    means, ratio = gradient_by_layer(rows), gradient_ratio(rows)
    layers = means["layer_idx"]
    values = [rows["mean_abs"][rows["layer_idx"] == layer] for layer in layers]
    axes.boxplot(
        [one[one > 0] for one in values],
        positions=layers,
        widths=0.6,
        whis=(0, 100),
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": SKY, "edgecolor": INK, "linewidth": 0.7},
        medianprops={"color": INK},
        whiskerprops={"linewidth": 0.7},
        capprops={"linewidth": 0.7},
    )
    _positive_line(axes, layers, means["mean_abs"], marker="D", color=ORANGE, label="mean of the layer", linestyle="")
    _magnitudes(axes, rows["mean_abs"])
    _mark_zeros(axes, layers[[bool((one == 0).any()) for one in values]], "some parameter has no gradient")
    layer_axis(axes, layers)
    axes.set_ylabel(f"mean |g| of a parameter in a batch\n({_UNIT})")
    seen = (
        f"the largest mean is {ratio_text(ratio)} times the smallest"
        if np.isfinite(ratio)
        else "at least one layer has none, the ratio is infinite"
    )
    set_title(axes, f"Gradients by layer: {seen} ({verdict(ratio)})")
    axes.legend()
    return figure


def _positive_line(axes: Axes, x: NDArray[np.int64], y: NDArray[np.float64], **look: Any) -> None:
    """Draw the points whose y is above zero, as a logarithmic axis needs it."""
    axes.plot(x, np.where(y > 0, y, np.nan), **look)


def _magnitudes(axes: Axes, values: NDArray[np.float64]) -> None:
    """Make the y axis logarithmic; without numbers if no value is above zero."""
    if (values > 0).any():
        axes.set_yscale("log")
    else:
        axes.set_yticks([])


def _mark_zeros(axes: Axes, layers: NDArray[np.int64], label: str) -> None:
    """Draw crosses at the lower edge, since a logarithmic axis cannot show a zero."""
    if len(layers):
        where = axes.get_xaxis_transform()
        axes.plot(layers, np.full(len(layers), 0.02), "x", color=INK, label=label, transform=where, clip_on=False)


@styled()
def draw_grad_heatmap(rows: Columns) -> Figure:
    """Draw mean |g| over the batches by parameter type and layer, in colours by its logarithm to base ten."""
    kinds, kind = _kinds(rows)
    layers, layer = np.unique(rows["layer_idx"], return_inverse=True)
    grid = grouped_mean(kind, layer, rows["mean_abs"])
    figure, (axes,) = new_figure(1, max(3.0, 1.6 + 0.2 * len(kinds)))
    positive = np.ma.masked_invalid(np.where(grid > 0, grid, np.nan))
    edges = np.append(layers - 0.5, layers[-1] + 0.5)
    title = "Mean |g| by parameter type and layer: no gradient anywhere"
    if positive.count():
        title = f"Mean |g| by parameter type and layer: {_extremes(positive, kinds, layers)}"
        low, high = float(positive.min()), float(positive.max())
        norm = LogNorm(low, high if high > low else 10 * low)
        mesh = axes.pcolormesh(edges, np.arange(len(kinds) + 1) - 0.5, positive, norm=norm, cmap="viridis")
        figure.colorbar(mesh, ax=axes, label=f"mean |g|, on a scale of log10\n({_UNIT})", pad=0.01, fraction=0.05)
    marks = _hatch(axes, grid == 0, layers, "///", "zero")
    marks += _hatch(axes, np.isnan(grid), layers, "...", "not in the table")
    if marks:
        figure.legend(handles=marks, loc="outside lower left", ncols=2)
    layer_axis(axes, layers, most=8)  # the names of the parameters leave half of the width
    axes.set_xlim(edges[0], edges[-1])
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.grid(visible=False)
    set_title(axes, title, 50)
    return figure


def _kinds(rows: Columns) -> tuple[list[str], NDArray[np.int64]]:
    """Parameter types in the order of the table without the ending `.weight`, and the number of each row's type."""
    names = list(dict.fromkeys(rows["parameter"]))
    number = {name: i for i, name in enumerate(names)}
    return [name.removesuffix(".weight") for name in names], np.array([number[name] for name in rows["parameter"]])


def _extremes(grid: np.ma.MaskedArray, kinds: list[str], layers: NDArray[np.int64]) -> str:
    places = [np.unravel_index(index, grid.shape) for index in (grid.argmin(), grid.argmax())]
    low, high = (f"{grid[row, column]:.1e} ({kinds[row]}, layer {layers[column]})" for row, column in places)
    return f"from {low}\nto {high}"


def _hatch(axes: Axes, cells: NDArray[np.bool_], layers: NDArray[np.int64], hatch: str, label: str) -> list[Patch]:
    """Hatch the cells ``[kinds, layers]`` that have no colour; returns their entry of the legend, if there are any."""
    look: dict[str, Any] = {"facecolor": "white", "edgecolor": GREY, "hatch": hatch, "linewidth": 0.0}
    row, column = np.nonzero(cells)
    axes.bar(layers[column], 1.0, 1.0, row - 0.5, **look)
    return [Patch(label=label, **look)] if len(row) else []


@styled()
def draw_grad_comparison(rows: Columns) -> Figure:
    """Draw mean |g| by layer in each of the first five batches."""
    figure, (axes,) = new_figure(1, 3.2)
    layers, every = np.unique(rows["layer_idx"]), batch_means(rows)
    means = every[:, :FIRST_BATCHES]
    for number, (color, marker) in zip(range(means.shape[1]), _BATCH_LOOKS, strict=False):
        _positive_line(axes, layers, means[:, number], color=color, marker=marker, label=f"batch {number}")
    _magnitudes(axes, means)
    _mark_zeros(axes, layers[(means == 0).any(axis=1)], "no gradient in some batch")
    layer_axis(axes, layers)
    axes.set_ylabel(f"mean |g| of the layer\n({_UNIT})")
    set_title(
        axes,
        f"Mean |g| by layer in the first {means.shape[1]} of {every.shape[1]} batches{_largest_factor(means, layers)}",
    )
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _largest_factor(means: NDArray[np.float64], layers: NDArray[np.int64]) -> str:
    """The largest factor between two batches of one layer, in words; empty if there are no two."""
    usable = (means > 0).all(axis=1)
    if means.shape[1] < 2 or not usable.any():
        return ""
    factors = means[usable].max(axis=1) / means[usable].min(axis=1)
    return f": at most × {factors.max():.2f} apart (layer {layers[usable][factors.argmax()]})"


@styled()
def draw_layer_variance(rows: Columns) -> Figure:
    """Draw the spread of gradients inside a layer and their coefficient of variation over batches (`layer_summary`).

    The variation has no panel where there is one batch or no gradient.
    """
    table = layer_summary(rows)
    layers, std, variation = table["layer_idx"], table["std"], table["variation"]
    measured = np.isfinite(variation)
    figure, (inside, *below) = new_figure(2 if measured.any() else 1, 2.5)
    _positive_line(inside, layers, std, color=BLUE, marker="o", label="standard deviation inside parameters")
    _positive_line(inside, layers, table["mean_abs"], color=ORANGE, marker="s", label="mean |g|")
    _magnitudes(inside, std)
    _mark_zeros(inside, layers[std == 0], "no spread")
    inside.set_ylabel(f"{_UNIT}")
    set_title(inside, f"Spread of the gradient inside a layer: {_range_text(std, layers, '{:.1e}')}")
    inside.legend()
    for over in below:
        over.bar(layers, np.where(measured, 100 * variation, 0), width=0.7, color=BLUE)
        over.set_ylim(bottom=0)
        over.set_ylabel("coefficient of variation, %")
        seen = _range_text(100 * variation[measured], layers[measured], "{:.1f} %")
        set_title(over, f"Variation of the layer's mean |g| over batches: {seen}")
    for axes in (inside, *below):
        layer_axis(axes, layers)
    return figure


def _range_text(values: NDArray[np.float64], layers: NDArray[np.int64], form: str) -> str:
    low, high = int(values.argmin()), int(values.argmax())
    if values[low] == values[high]:
        return f"{form.format(values[low])} in every layer"
    return f"{form.format(values[low])} (layer {layers[low]}) to {form.format(values[high])} (layer {layers[high]})"
