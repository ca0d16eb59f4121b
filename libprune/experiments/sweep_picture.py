"""Perplexity against settings as one picture, in colours that colour-blind readers can distinguish."""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from pathlib import Path

from libprune.experiments.dvc_experiments import Experiment, Recovered
from libprune.experiments.sweep_table import differing, setting
from libprune.pipeline.atomic import writing
from libprune.report.canvas import Axes, Figure, png, styled

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, https://jfly.uni-koeln.de/color/, without its yellow."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PANELS = 6
"""The largest number of panels in one picture."""


def write_picture(target: Path, rows: Sequence[Experiment]) -> None:
    """Write a PNG: perplexity ratio ± one standard error, in one panel for each param with several numbers, or as bars.

    A row whose value is no number, such as `auto`, is a line across the panel. What is only measured differently
    (`evaluate`) has no panel. The ratio after recovery, where there is one, is a hollow mark or bar. The same rows give
    the same bytes.
    """
    with styled(), writing(target) as partial:
        partial.write_bytes(png(draw_sweep(rows)))


def draw_sweep(rows: Sequence[Experiment]) -> Figure:
    """Draw perplexity against the params that differ; see `write_picture`. The figure is not rendered yet."""
    names = differing(rows)
    numeric = [name for name in names if not name.startswith("evaluate.") and len(_numbers(rows, name)) > 1]
    if not numeric:
        figure = Figure(figsize=(7, 1 + 0.45 * len(rows)), layout="constrained")
        _bars(figure.subplots(), rows, names)
        return figure
    shown = numeric[:PANELS]
    columns = min(3, len(shown))
    lines = ceil(len(shown) / columns)
    figure = Figure(figsize=(1 + 3.8 * columns, 3.4 * lines), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for axes, name in zip(grid, shown, strict=False):
        _panel(axes, rows, name, names)
    for axes in grid[::columns]:
        axes.set_ylabel(_label(rows))
    for axes in grid[len(shown) :]:
        axes.remove()
    if len(numeric) > PANELS:
        figure.suptitle(f"The first {PANELS} of {len(numeric)} numeric params that differ")
    return figure


def _numbers(rows: Sequence[Experiment], name: str) -> set[float]:
    """The numbers that a param is in some of the rows."""
    return {float(row.params[name]) for row in rows if _is_number(row, name)}


def _is_number(row: Experiment, name: str) -> bool:
    return type(row.params.get(name)) in (int, float)


def _panel(axes: Axes, every: Sequence[Experiment], name: str, names: Mapping[str, str]) -> None:
    """Draw the ratio against one param; colour and marker show the others that differ, if there are enough of them."""
    rows = [row for row in every if _is_number(row, name)]
    for row in every:
        if row not in rows:
            axes.axhline(row.ratio, color="grey", linestyle=":", linewidth=1)
            axes.annotate(row.label, (0, row.ratio), xycoords=("axes fraction", "data"), color="grey", fontsize=8)
    others = [other for other in names if other != name and len({repr(row.params.get(other)) for row in rows}) > 1]
    named = [other for other in others if not all(_is_number(row, other) for row in rows)]
    by = next(keys for keys in (others, named, []) if len(_groups(rows, keys)) <= len(COLOURS))
    groups = _groups(rows, by)
    for (label, members), colour, marker in zip(groups.items(), COLOURS, MARKERS, strict=False):
        members.sort(key=lambda row: float(row.params[name]))
        axes.errorbar(
            [row.params[name] for row in members],
            [row.ratio for row in members],
            [row.error for row in members],
            label=label,
            color=colour,
            marker=marker,
            linestyle="-" if by == others else "none",  # a line joins what differs in this param alone
            linewidth=1,
            capsize=3,
        )
        for row in members:
            if row.recovered:
                _draw_recovered(axes, row.params[name], row.recovered, colour, marker)
    if len(groups) > 1:
        title = ", ".join(names[key] for key in by)
        axes.legend(title=title, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=8, title_fontsize=8)
    if _wide([float(row.params[name]) for row in rows]):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    if _wide(_ratios(rows)):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(name)
    axes.grid(alpha=0.3)


def _draw_recovered(axes: Axes, place: float | int, run: Recovered, colour: str, marker: str) -> None:
    axes.errorbar(place, run.ratio, run.error, color=colour, marker=marker, mfc="white", linewidth=1, capsize=3)


def _label(rows: Sequence[Experiment]) -> str:
    scale = rows[0].measure.scale
    return f"{scale}; hollow: after recovery" if any(row.recovered for row in rows) else scale


def _ratios(rows: Iterable[Experiment]) -> list[float]:
    """All ratios that are drawn, before recovery and after it."""
    return [figures.ratio for row in rows for figures in (row, row.recovered) if figures]


def _groups(rows: Sequence[Experiment], names: Sequence[str]) -> dict[str, list[Experiment]]:
    """Rows by their values of these params, in the order of the values' texts."""
    groups: dict[str, list[Experiment]] = {}
    for row in rows:
        groups.setdefault(_settings(row, names), []).append(row)
    return dict(sorted(groups.items()))


def _wide(values: Sequence[float]) -> bool:
    """Whether values, of which there is at least one, need a logarithmic axis."""
    return min(values) > 0 and max(values) / min(values) > 10


def _bars(axes: Axes, rows: Sequence[Experiment], names: Mapping[str, str]) -> None:
    """One bar a row, from the dense model's value to that of the row."""
    places, dense = range(len(rows)), rows[0].measure.dense
    axes.barh(
        places,
        [row.ratio - dense for row in rows],
        left=dense,
        xerr=[row.error for row in rows],
        color=COLOURS[0],
        alpha=0.7,
        capsize=3,
    )
    trained = {place: row.recovered for place, row in enumerate(rows) if row.recovered}
    axes.barh(
        list(trained),
        [run.ratio - dense for run in trained.values()],
        left=dense,
        xerr=[run.error for run in trained.values()] if trained else None,
        fill=False,
        capsize=3,
    )
    axes.set_yticks(places, [": ".join(filter(None, (row.label, _settings(row, names)))) for row in rows])
    axes.invert_yaxis()
    axes.axvline(dense, color="black", linewidth=1)
    if dense and _wide(_ratios(rows)):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(_label(rows))
    axes.grid(axis="x", alpha=0.3)


def _settings(row: Experiment, names: Iterable[str]) -> str:
    return ", ".join(setting(row, name) for name in names)
