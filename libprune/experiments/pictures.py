"""A comparison as pictures: perplexity by setting with intervals, and the overlaps of the kept sets."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from libprune.experiments.summary import Perplexity, Summary
from libprune.report.canvas import BLUE, GREY, INK, ORANGE, WIDTH, Axes, Figure, ratio_scale, styled


@styled()
def draw_ratios(summaries: Sequence[Summary], reference: Summary) -> Figure:
    """Draw the perplexity ratio of every setting: its seeds, their mean and interval.

    The error over the evaluation windows is drawn below the interval. A line goes through the reference's mean. Where
    a setting was trained after pruning, the ratio after recovery stands beside the one before it, in another colour.
    """
    figure = Figure(figsize=(WIDTH, 1.3 + 0.42 * len(summaries)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for place, one in enumerate(summaries):
        _draw_ratio(axes, place, one.before, BLUE)
        if one.after:
            _draw_ratio(axes, place, one.after, ORANGE)
    axes.axvline(reference.compared.ratio.mean, color=INK, linewidth=0.8, linestyle="--", zorder=0)
    axes.set_yticks(range(len(summaries)), [one.name for one in summaries])
    axes.set_ylim(len(summaries) - 0.5, -0.5)
    trained = any(one.after for one in summaries)
    shown = [value for one in summaries for each in (one.before, one.after) if each for value in each.ratios.values()]
    ratio_scale(axes, shown, "x")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.set_xlabel(reference.measure.scale + ("; blue: before recovery, orange: after it" if trained else ""))
    colours = "colour" if trained else "blue"
    axes.set_title(
        f"Seeds (dots), mean and 95 % interval ({colours}), ± error over windows (grey); dashed: {reference.name}"
    )
    return figure


def _draw_ratio(axes: Axes, place: int, perplexity: Perplexity, colour: str) -> None:
    values, ratio = list(perplexity.ratios.values()), perplexity.ratio
    axes.plot(values, [place] * len(values), linestyle="none", marker="o", color=GREY, alpha=0.55, markersize=5)
    if ratio.known:
        axes.plot([ratio.low, ratio.high], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot([ratio.mean], [place], marker="|", color=colour, markersize=13, markeredgewidth=2)
    axes.errorbar([ratio.mean], [place + 0.28], xerr=[perplexity.error], color=GREY, capsize=2, linewidth=1)


@styled()
def draw_overlaps(matrix: NDArray[np.float64], names: Sequence[str], chance: float) -> Figure:
    """Draw Jaccard overlaps as a heat map from chance to 1; the diagonal is between the seeds of one setting.

    Args:
        matrix: ``[settings, settings]``; NaN where unknown.
        names: the settings' names.
        chance: the overlap that independent choices would have.
    """
    side = 1.6 + 0.62 * len(names)
    figure = Figure(figsize=(max(side + 1.6, 5.5), max(side, 3.2)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    lowest = min(chance, float(np.nanmin(matrix)))
    image = axes.imshow(matrix, cmap="Blues", vmin=lowest, vmax=1)
    for (i, j), value in np.ndenumerate(matrix):
        dark = value > (lowest + 1) / 2
        text = "–" if np.isnan(value) else f"{value:.2f}"
        axes.text(j, i, text, ha="center", va="center", color="white" if dark else INK, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.ax.axhline(chance, color=INK, linewidth=1.2)
    bar.outline.set_visible(False)
    bar.set_label(f"Jaccard; line: by chance, {chance:.2f}")
    axes.set_title("Overlap of kept sets; diagonal: between seeds", fontsize=9.5)
    return figure
