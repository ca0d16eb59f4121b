"""The page of a curve: sentences, pictures and tables, as HTML and Markdown, with the table as CSV."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from libprune.curves.beside import loss_label
from libprune.curves.pictures import Point, draw_points
from libprune.curves.plans import Planned
from libprune.curves.table import (
    CONTEXT,
    Drawn,
    curve_csv,
    explain_bends,
    measured_bend,
    memory,
    predicted_bend,
    tabulate_measured,
    tabulate_plans,
)
from libprune.engine.errors import LibpruneError
from libprune.pipeline.atomic import writing
from libprune.pipeline.terminal import text_table
from libprune.report.gallery import draw_picture
from libprune.report.markdown import Picture, escaped_table, picture_paragraphs, prose
from libprune.report.page import html_page

FOLDER = "pictures"
"""The folder of the pictures, beside the page."""


def write_curve(drawn: Drawn, out: Path) -> str:
    """Write `curve.html`, `curve.md`, `curve.csv` and the pictures, each whole or not at all.

    Args:
        drawn: the curve with what was measured of it.
        out: the folder; other files in it stay.

    Returns:
        What to print.

    Raises:
        LibpruneError: if the folder is a file.
    """
    if out.exists() and not out.is_dir():
        raise LibpruneError(f"--out {out} is a file; name a folder")
    pictures = draw_pictures(drawn)
    text = compose_page(drawn, pictures)
    title = f"{drawn.model}, sizes of one measurement"
    page = html_page(text, title, {f"{FOLDER}/{one.file}": one.svg for one in pictures})
    contents = {"curve.html": page.encode(), "curve.md": text.encode(), "curve.csv": curve_csv(drawn).encode()}
    contents |= {f"{FOLDER}/{one.file}": one.png for one in pictures}
    for name, content in contents.items():
        with writing(out / name) as partial:
            partial.write_bytes(content)
    lines = [text_table(*tabulate_plans(drawn.curve))]
    if drawn.known:
        lines += ["", text_table(*tabulate_measured(drawn))]
    return "\n".join([*lines, "", *explain_curve(drawn), "", f"written: {out}/curve.html, curve.md, curve.csv"])


def explain_curve(drawn: Drawn) -> list[str]:
    """What is to be said of a curve beside its tables: where it bends, what was skipped, and what is not known."""
    curve = drawn.curve
    said = explain_bends(drawn)
    said += ["Each smaller model is a part of the larger ones."] if curve.nested else []
    said += [f"Without a plan: {100 * ratio:g} %, since {reason}." for ratio, reason in curve.skipped.items()]
    if not curve.predicts:
        relative = "" if curve.dense.importance is None else "; the importance that goes is a relative figure"
        said.append(
            f"allocate.method: {curve.params.method} measures no divergence, so no loss is predicted{relative}."
        )
    missing = [f"{one.ratio:g}" for one in curve.planned if one.ratio not in drawn.measured]
    if missing:
        said.append(f"Not evaluated: {', '.join(missing)}; `--run` with these ratios, or `--run all`, does it.")
    return [*said, *drawn.remarks]


def compose_page(drawn: Drawn, pictures: Sequence[Picture]) -> str:
    """The page in Markdown."""
    paragraphs = [
        f"# {prose(drawn.model)}: sizes of one measurement",
        *map(prose, explain_curve(drawn)),
        *(paragraph for one in pictures for paragraph in picture_paragraphs(FOLDER, one)),
        "## Plans",
        escaped_table(*tabulate_plans(drawn.curve)),
        _ABOUT_PLANS,
    ]
    if drawn.known:
        paragraphs += ["## Measured", escaped_table(*tabulate_measured(drawn)), _ABOUT_MEASURED]
    return "\n\n".join([*paragraphs, _ABOUT_BENDS]) + "\n"


_ABOUT_PLANS = (
    "All plans were decided from the same scores and statistics. Parameters, weights, cache and operations (MACs) are "
    "counted exactly, without biases that a repair may add. Divergence: the sum of the blocks' measured divergences "
    "from the dense model, in nats a token, as if the losses of blocks added up. Importance lost: the share of the "
    "summed importance of all units. Pass: the time of one forward pass by the lines that the stage `latency` fitted."
)
_ABOUT_MEASURED = (
    "In brackets: for losses the 95 % interval over paired windows, for speeds the slowest and the fastest round. "
    "Speed is over the dense model's, measured on the pruned model before any training. Recovered: after training."
)
_ABOUT_BENDS = (
    "The bend is the point farthest below the straight line from the dense model to the smallest one, in loss against "
    "removed share (Satopää et al. 2011). It counts if the distance exceeds two standard errors, and if the curve is "
    "at least twice as steep behind it. It depends on where the curve ends."
)


def draw_pictures(drawn: Drawn) -> list[Picture]:
    """The pictures of loss against size, memory and speed; without those of what does not differ or is not known."""
    curve = drawn.curve
    if not drawn.known and not curve.predicts:
        return []
    dense = curve.dense
    per_million = dense.weights / dense.size.total
    pictures = [
        _against(
            drawn,
            "loss_size",
            "parameters in millions",
            lambda one: one.size.total / 1e6,
            above=(per_million, "weights in MB"),
        )
    ]
    if len({one.cache for one in curve.points}) > 1:
        label = "KV cache in bytes a token"
        pictures.append(_against(drawn, "loss_cache", label, lambda one: float(one.cache)))
    if dense.cache or dense.state:
        label = f"memory in MB (weights, and cache of {CONTEXT:,} tokens)"
        pictures.append(_against(drawn, "loss_memory", label, lambda one: memory(one) / 1e6))
    return [*pictures, *(_speed_picture(drawn, name) for name in ("prefill", "decode") if _timed(drawn, name))]


def _timed(drawn: Drawn, name: str) -> bool:
    return any(one.speed(name) is not None for _, one in drawn.known)


def _against(
    drawn: Drawn,
    name: str,
    x_label: str,
    x_of: Callable[[Planned], float],
    above: tuple[float, str] | None = None,
) -> Picture:
    """A picture of the loss against what plans take."""
    places = {one.ratio: x_of(one) for one in drawn.curve.points}
    points = [_reference(drawn, places[0.0]), *_points(drawn, places)]
    behind = _predicted(drawn, places)
    line = [(one.x, one.y) for one in points] if drawn.known else []  # from ratio to ratio
    y_label = loss_label(drawn.measure, drawn.trained)
    ringed = _ringed(drawn, points, behind)
    figure = draw_points(points, line, x_label, y_label, behind, ringed, above)
    what = (
        x_label.partition(" (")[0].removesuffix(" in millions").removesuffix(" in MB").removesuffix(" in bytes a token")
    )
    return draw_picture(name, figure, f"{drawn.measure.name} against {what}", _caption(drawn, behind, ringed))


def _speed_picture(drawn: Drawn, name: str) -> Picture:
    """A picture of the loss against a measured speed."""
    speeds = {plan.ratio: one.speed(name) for plan, one in drawn.known}
    ranges = {ratio: found for ratio, found in speeds.items() if found is not None}
    points = [_reference(drawn, 1.0), *_points(drawn, {ratio: found[0] for ratio, found in ranges.items()}, ranges)]
    figure = draw_points(points, [], f"{name} speed ÷ dense", loss_label(drawn.measure, drawn.trained))
    caption = f"{_caption(drawn, [], [])} Bars to the sides: the slowest and the fastest round."
    return draw_picture(f"loss_{name}", figure, f"{drawn.measure.name} against {name} speed", caption)


def _reference(drawn: Drawn, x: float) -> Point:
    return Point(x, drawn.measure.dense, "dense", tag="dense", style="reference")


def _points(
    drawn: Drawn, places: dict[float, float], ranges: dict[float, tuple[float, float, float]] | None = None
) -> list[Point]:
    """The measured models whose places are known."""
    points = []
    for (plan, one), figures in zip(drawn.known, drawn.figures, strict=True):
        if plan.ratio not in places:
            continue
        low, high = one.interval(figures.ratio, figures.error)
        _, left, right = (ranges or {}).get(plan.ratio, (0.0, math.nan, math.nan))
        tag = f"{100 * plan.ratio:g} %"
        points.append(Point(places[plan.ratio], figures.ratio, tag, low, high, left, right, tag))
    return points


def _predicted(drawn: Drawn, places: dict[float, float]) -> list[Point]:
    """The predicted losses of all plans, on the scale of perplexities; labelled where nothing is measured."""
    if not drawn.curve.predicts or not drawn.measure.dense:
        return []
    alone = not drawn.known
    return [
        Point(
            places[one.ratio],
            math.exp(min(one.divergence or 0.0, 50.0)),
            f"predicted {100 * one.ratio:g} %",
            tag=f"{100 * one.ratio:g} %" if alone and one.ratio else "",
        )
        for one in drawn.curve.points
    ]


def _ringed(drawn: Drawn, points: Sequence[Point], behind: Sequence[Point]) -> list[Point]:
    """The point at which the measured curve bends, or else that of the predicted one."""
    if len(drawn.known) > 1:
        bend, _ = measured_bend(drawn)
        return [points[bend.place]] if bend else []
    bend = predicted_bend(drawn.curve)
    return [behind[bend.place]] if bend and behind else []


def _caption(drawn: Drawn, behind: Sequence[Point], ringed: Sequence[Point]) -> str:
    said = ["Square: the dense model."]
    if drawn.known:
        said.append("Dots: measured, by the share removed; bars: 95 % intervals over paired windows.")
    if behind:
        said.append("Dashed: predicted, the exponential of the summed divergences of the blocks.")
    if ringed:
        said.append("Ring: where the curve bends.")
    return " ".join(said)
