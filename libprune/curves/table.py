"""A curve as tables: rounded for the terminal and Markdown, unrounded as CSV; and where it bends, in sentences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from libprune.curves.bend import Bend, find_bend
from libprune.curves.measured import Measured
from libprune.curves.plans import Curve, Planned
from libprune.experiments.dvc_experiments import PERPLEXITY, Experiment, Measure, Recovered, compared_figures
from libprune.experiments.sweep_table import recovered_columns
from libprune.experiments.table import NOTHING, rows_csv
from libprune.pipeline.terminal import Rows

CONTEXT = 4096
"""Tokens of the sequence whose cache is counted into the memory."""


@dataclass(frozen=True)
class Drawn:
    """A curve with what was measured of it.

    Attributes:
        model: the name of the dense model.
        curve: the plans.
        measured: by ratio, the models that were sliced and evaluated.
        remarks: sentences on what is not known.
    """

    model: str
    curve: Curve
    measured: Mapping[float, Measured]
    remarks: Sequence[str] = ()

    @cached_property
    def known(self) -> list[tuple[Planned, Measured]]:
        """The plans that were measured, the smallest ratio first."""
        return [(one, self.measured[one.ratio]) for one in self.curve.planned if one.ratio in self.measured]

    @cached_property
    def figures(self) -> Sequence[Experiment | Recovered]:
        """The figures that `known` models are compared by: after recovery if all have them, else before it."""
        return compared_figures([one.experiment for _, one in self.known])

    @property
    def trained(self) -> bool:
        """Whether these are the figures after recovery."""
        return bool(self.known) and isinstance(self.figures[0], Recovered)

    @property
    def measure(self) -> Measure:
        """What models are compared by."""
        return self.known[0][1].experiment.measure if self.known else PERPLEXITY


def memory(one: Planned) -> int:
    """Bytes that the weights take together with the cache and the states of one sequence of `CONTEXT` tokens."""
    return one.weights + CONTEXT * one.cache + one.state


def tabulate_plans(curve: Curve) -> tuple[Rows, tuple[str, ...]]:
    """The plans as a table, the dense model first: its cells and its header. Columns that say nothing are left out."""
    dense, points = curve.dense, curve.points
    columns = {
        "ratio": ["dense", *(f"{100 * one.ratio:g} %" for one in curve.planned)],
        "removed": [NOTHING, *(f"{100 * one.removed:.2f} %" for one in curve.planned)],
        "decoder, M": [_millions(one.size.decoder) for one in points],
        "all, M": [_millions(one.size.total) for one in points],
        "active, M": _where(dense.size.active != dense.size.decoder, [_millions(one.size.active) for one in points]),
        "weights, MB": [_millions(one.weights) for one in points],
        "cache, B/token": _where(dense.cache > 0, [f"{one.cache:,}" for one in points]),
        "states, B": _where(dense.state > 0, [f"{one.state:,}" for one in points]),
        "MMACs/token": [_millions(one.size.macs) for one in points],
        "pass, ms": _where(
            dense.seconds is not None,
            [NOTHING if one.seconds is None else f"{1e3 * one.seconds:,.1f}" for one in points],
        ),
        "divergence": _where(curve.predicts, [f"{one.divergence or 0:.3g}" for one in points]),
        "importance lost": _where(
            dense.importance is not None, [f"{100 * (one.importance or 0):.1f} %" for one in points]
        ),
        "shape": ["", *(one.shape for one in curve.planned)],
    }  # fmt: skip
    shown = {name: cells for name, cells in columns.items() if cells}
    return list(zip(*shown.values(), strict=True)), tuple(shown)


def tabulate_measured(drawn: Drawn) -> tuple[Rows, tuple[str, ...]]:
    """The measured models as a table: its cells and its header. Columns without a known value are left out."""
    columns: dict[str, list[str]] = {}
    for plan, one in drawn.known:
        row, measure = one.experiment, one.experiment.measure
        cells = {
            "ratio": f"{100 * plan.ratio:g} %",
            measure.name: _value(one, row, measure),
            "recovered": NOTHING if row.recovered is None else _value(one, row.recovered, measure),
            "on disk, MB": NOTHING if row.size is None else _millions(row.size),
            "prefill": _speed(one.speed("prefill")),
            "decode": _speed(one.speed("decode")),
            "experiment": row.label,
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    shown = {name: cells for name, cells in columns.items() if set(cells) != {NOTHING}}
    return list(zip(*shown.values(), strict=True)), tuple(shown)


def _where(known: bool, cells: list[str]) -> list[str]:
    return cells if known else []


def _millions(number: int) -> str:
    """A number in millions, with three digits at least."""
    return f"{number / 1e6:,.1f}" if number >= 1e8 or number == 0 else f"{number / 1e6:#.3g}"


def _value(one: Measured, figures: Experiment | Recovered, measure: Measure) -> str:
    digits = 3 if measure.dense else 4
    low, high = one.interval(figures.ratio, figures.error)
    ends = f" ({low:,.{digits}f} to {high:,.{digits}f})" if math.isfinite(low) else f" ± {figures.error:.{digits}f}"
    return f"{measure.sign}{figures.ratio:,.{digits}f}{ends}"


def _speed(found: tuple[float, float, float] | None) -> str:
    return NOTHING if found is None else "× {:.2f} ({:.2f} to {:.2f})".format(*found)


def curve_csv(drawn: Drawn) -> str:
    """The dense model and the plans as CSV, one a row, with what was measured; unrounded, unknown cells are empty."""
    rows = []
    for one in drawn.curve.points:
        row: dict[str, Any] = {
            "ratio": one.ratio,
            "share_removed": one.removed,
            "shape": one.shape if one.ratio else None,
            "decoder_parameters": one.size.decoder,
            "total_parameters": one.size.total,
            "active_parameters": one.size.active,
            "bytes": one.weights,
            "cache_bytes": one.cache,
            "state_bytes": one.state,
            "memory_bytes": memory(one),
            "macs_per_token": one.size.macs,
            "predicted_seconds": one.seconds,
            "predicted_divergence": one.divergence,
            "importance_lost": one.importance,
            "skipped": None,
        }
        rows.append(row | _measured_columns(drawn.measured.get(one.ratio)))
    rows += [{"ratio": ratio, "skipped": reason} for ratio, reason in drawn.curve.skipped.items()]
    return rows_csv(rows)


def _measured_columns(one: Measured | None) -> dict[str, Any]:
    if one is None:
        return {}
    row, name = one.experiment, one.experiment.measure.column
    low, high = one.interval(row.ratio, row.error)
    columns: dict[str, Any] = {
        "experiment": row.names[0],
        name: row.ratio,
        f"{name}_se": row.error,
        f"{name}_low": low,
        f"{name}_high": high,
        **recovered_columns(row),
        "disk_bytes": row.size,
    }
    for kind in ("prefill", "decode"):
        ends = one.speed(kind) or (None,) * 3
        columns |= dict(zip((f"{kind}_ratio", f"{kind}_slowest", f"{kind}_fastest"), ends, strict=True))
    return columns


def measured_bend(drawn: Drawn) -> tuple[Bend | None, list[Planned]]:
    """Where the measured curve bends, and the models that its points are; the first is the dense one."""
    found, measure = [drawn.curve.dense], drawn.measure
    losses, errors = [0.0], [0.0]
    for (plan, _), one in zip(drawn.known, drawn.figures, strict=True):
        found.append(plan)
        losses.append(math.log(one.ratio) if measure.dense else one.ratio)
        errors.append(one.error / one.ratio if measure.dense else one.error)
    return find_bend([one.removed for one in found], losses, errors), found


def predicted_bend(curve: Curve) -> Bend | None:
    """Where the curve of predicted divergences bends."""
    if not curve.predicts:
        return None
    return find_bend([one.removed for one in curve.points], [one.divergence or 0.0 for one in curve.points])


def explain_bends(drawn: Drawn) -> list[str]:
    """Sentences that say where the predicted and the measured curve bend, or that they have no clear bend."""
    curve, said = drawn.curve, []
    of = f"the {curve.params.ratio_of} {curve.params.objective}"
    if curve.predicts and len(curve.planned) > 1:
        points = curve.points
        said.append(_explain("predicted", predicted_bend(curve), points, of, "nats of divergence a token"))
    if len(drawn.known) > 1:
        bend, found = measured_bend(drawn)
        unit = "nats a token" if drawn.measure.dense else f"of {drawn.measure.name}"
        said.append(_explain("measured", bend, found, of, unit))
    return said


def _explain(kind: str, bend: Bend | None, points: Sequence[Planned], of: str, unit: str) -> str:
    last = f"{100 * points[-1].ratio:g} %"
    if bend is None:
        return f"The {kind} curve has no clear bend up to {last}."
    place = f"{100 * points[bend.place].ratio:g} %"
    return (
        f"The {kind} curve bends at {place}: up to there a tenth of {of} costs {bend.before / 10:.3g} {unit} on "
        f"average, and from there to {last} {bend.after / 10:.3g}."
    )
