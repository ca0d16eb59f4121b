"""Pictures of the decision: the kept share of every layer, the scores that decided, and the sensitivity to layers."""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.engine.tables import Columns
from libprune.report.canvas import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    Axes,
    Figure,
    Patch,
    layer_axis,
    linear_below,
    new_figure,
    set_title,
    styled,
    value_scale,
    whole_numbers,
)

_BINS = 60
_REMOVED: dict[str, Any] = {"facecolor": ORANGE, "hatch": "///", "edgecolor": "white", "linewidth": 0}
_BAND: dict[str, Any] = {"facecolor": "#e4e4e4", "linewidth": 0}
_NAMES = {"attention": "attention groups", "mlp": "MLP channels"}
_REMOVALS = {"layer": "whole layer", "mlp": "MLP only"}
"""What is removed in words, where that is not the name of a part with `only` behind it."""
_LOOKS = ((INK, "o"), (BLUE, "s"), (ORANGE, "^"), (GREEN, "D"), (PURPLE, "v"), (SKY, "P"))
"""Colour and marker of each kind of removal, in the order of the table."""


def _units(part: str, meta: Mapping[str, Any]) -> str:
    """What the units of a part are called; `heads` of a plan's metadata names the parts that are cut in query heads."""
    return "query heads" if part in meta.get("heads", {}) else _NAMES.get(part, f"{part} units")


@styled()
def draw_kept_share(plan: Columns, meta: Mapping[str, Any]) -> Figure:
    """Draw the kept and the removed share of the units of every layer, one panel for each part that loses some.

    Args:
        plan: rows of the plan, at least one of them removed.
        meta: the plan's metadata; its `ratio` is drawn as a line.
    """
    parts = list(dict.fromkeys(plan["group_type"][~plan["keep"]]))
    figure, panels = new_figure(len(parts), 2.1)
    for axes, part in zip(panels, parts, strict=True):
        here = plan["group_type"] == part
        layers, layer = np.unique(plan["layer_idx"][here], return_inverse=True)
        kept, units = np.bincount(layer, plan["keep"][here]), np.bincount(layer)
        share = 100 * kept / units
        axes.bar(layers, share, width=0.8, color=BLUE, label="kept")
        axes.bar(layers, 100 - share, width=0.8, bottom=share, label="removed", **_REMOVED)
        if meta.get("ratio") is not None:
            asked = 100 * (1 - meta["ratio"])
            label = f"asked for: {asked:.1f} % of the {meta['ratio_of']} {meta['objective']}"
            axes.axhline(asked, color=INK, linestyle="--", linewidth=1.0, label=label)
        layer_axis(axes, layers)
        axes.set_ylim(0, 100)
        axes.set_ylabel(f"{_units(part, meta)}, %")
        told = _kept_text(_units(part, meta), int(kept.sum()), int(units.sum()))
        set_title(axes, f"{told}; {_between(share)}")
    figure.legend(
        handles=[*panels[0].containers, *panels[0].lines], loc="outside lower center", ncols=3, columnspacing=1.0
    )
    return figure


def _kept_text(named: str, kept: int, units: int) -> str:
    return f"{kept:,} of {units:,} {named} kept ({100 * kept / units:.1f} %)"


def _between(share: NDArray[np.float64]) -> str:
    low, high = share.min(), share.max()
    return f"{low:.0f} to {high:.0f} % by layer" if high - low >= 0.5 else "the same share in every layer"


@styled()
def draw_scores(plan: Columns, meta: Mapping[str, Any]) -> Figure:
    """Draw the distribution of the scores of kept and removed units, one panel a part.

    Args:
        plan: rows of the plan, at least one.
        meta: the plan's metadata; `rank_by` names the column that units were ranked by.
    """
    name = meta.get("rank_by", "score")
    parts = list(dict.fromkeys(plan["group_type"]))
    figure, panels = new_figure(len(parts), 2.1)
    for axes, part in zip(panels, parts, strict=True):
        here = (plan["group_type"] == part) & np.isfinite(plan[name])
        values, keep = plan[name][here], plan["keep"][here]
        cuts = _cuts(plan["layer_idx"][here], values, keep)
        _score_panel(axes, values, keep, cuts)
        axes.set_ylabel(_units(part, meta))
        set_title(axes, _cut_text(_units(part, meta), keep, cuts))
    panels[-1].set_xlabel(f"{name} of a unit by {meta.get('criterion', 'the criterion')} (higher: worth more)")
    handles = [Patch(color=BLUE, label="kept"), Patch(label="removed", **_REMOVED), Patch(label="cuts", **_BAND)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _cuts(layers: NDArray[np.int64], values: NDArray[np.float64], keep: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The highest score among the removed units of each layer that keeps some; ``[layers that are cut]``."""
    both = np.intersect1d(layers[keep], layers[~keep])
    return np.array([values[(layers == layer) & ~keep].max() for layer in both])


def _score_panel(axes: Axes, values: NDArray[np.float64], keep: NDArray[np.bool_], cuts: NDArray[np.float64]) -> None:
    edges = _edges(values)
    kept, removed = (np.histogram(values[chosen], edges)[0] for chosen in (keep, ~keep))
    axes.bar(edges[:-1], kept, np.diff(edges), align="edge", color=BLUE, label="kept")
    axes.bar(edges[:-1], removed, np.diff(edges), bottom=kept, align="edge", label="removed", **_REMOVED)
    if len(cuts):
        axes.axvspan(cuts.min(), cuts.max(), zorder=0, **_BAND)
        for cut in (cuts.min(), cuts.max()):
            axes.axvline(cut, color=INK, linestyle="--", linewidth=1.0)
    value_scale(axes, values, "x")
    whole_numbers(axes)


def _edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges of bins that look equally wide on the axis that `value_scale` chooses."""
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    if low == high:
        return low + np.array([-0.5, 0.5]) * (abs(low) or 1.0)
    if low > 0:
        return np.geomspace(low / 1.01, high * 1.01, _BINS + 1)
    around = linear_below(values)
    scaled = np.arcsinh(np.array([low, high]) / around)
    return np.asarray(around * np.sinh(np.linspace(scaled[0] - 0.05, scaled[1] + 0.05, _BINS + 1)))


def _cut_text(named: str, keep: NDArray[np.bool_], cuts: NDArray[np.float64]) -> str:
    """A title that says how many units are removed, and between which scores the cuts lie."""
    removed = f"{int((~keep).sum()):,} of {len(keep):,} {named} removed"
    if not len(cuts):
        return removed
    low, high = f"{cuts.min():.2g}", f"{cuts.max():.2g}"
    return f"{removed}, cut at {low}" if low == high else f"{removed}, layers cut at {low} to {high}"


@styled()
def draw_sensitivity(table: Columns) -> Figure:
    """Draw the loss increase of removing each layer, or one of its parts, with standard errors.

    Args:
        table: rows of the sensitivity table, at least one; `loss_increase` and `standard_error` in nats per token.
    """
    figure, (axes,) = new_figure(1, 3.2)
    increase, error = table["loss_increase"], table["standard_error"]
    kinds = list(dict.fromkeys(table["removed"].tolist()))
    shifts = np.linspace(-0.22, 0.22, len(kinds))
    for kind, shift, (color, marker) in zip(kinds, shifts, cycle(_LOOKS), strict=False):
        here = table["removed"] == kind
        bars = np.where(np.isfinite(error[here]), error[here], 0.0)
        look: dict[str, Any] = {"color": color, "marker": marker, "linestyle": "", "capsize": 1.5}
        label = _REMOVALS.get(kind, f"{kind} only")
        axes.errorbar(table["layer_idx"][here] + shift, increase[here], bars, label=label, elinewidth=0.8, **look)
    value_scale(axes, increase, "y")
    layer_axis(axes, table["layer_idx"])
    axes.set_ylabel("loss increase, nats per token\n(bars: ± one standard error)")
    set_title(axes, _most_and_least(table))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _most_and_least(table: Columns) -> str:
    whole = table["removed"] == "layer"
    rows = whole if whole.any() else np.full(len(whole), True)
    layers, increase = table["layer_idx"][rows], table["loss_increase"][rows]
    most, least = int(increase.argmax()), int(increase.argmin())
    what = "a layer" if whole.any() else "a part"
    return (
        f"Loss increase of removing {what}: most for layer {layers[most]} ({increase[most]:.3g}), "
        f"least for layer {layers[least]} ({increase[least]:.3g})"
    )
