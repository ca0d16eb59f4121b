"""Experiments as a table, and what may be said of their differences."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from math import hypot, isclose

from libprune.experiments.dvc_experiments import Experiment, Measure, Recovered, compared_figures
from libprune.pipeline.terminal import Rows
from libprune.report.markdown import code, escaped_table, prose

SAME_EVALUATION = 1e-4
"""Relative difference of the dense model's perplexities up to which two results are on the same windows: rounding
moves it less; another text, length or dtype more."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_NUMBER = re.compile(r"[+-]?[\d.]+(e[+-]?\d+)?")
SAME_SHARE = 0.005
"""Difference of the removed shares up to which two models count as equally small."""


def differing(rows: Sequence[Experiment]) -> dict[str, str]:
    """The params that differ between rows, in the order of params.yaml: full name to shortest clear name."""
    names = dict.fromkeys(name for row in rows for name in row.params)
    last = {name: name.rpartition(".")[2] for name in names}
    known = list(last.values())
    return {
        name: last[name] if known.count(last[name]) == 1 else name
        for name in names
        if len({setting(row, name) for row in rows}) > 1
    }


def setting(row: Experiment, name: str) -> str:
    """The value of a param as text; a dash where this row's params.yaml does not have it."""
    value = row.params.get(name, "–")
    return value if isinstance(value, str) else json.dumps(value)


def tabulate_experiments(rows: Sequence[Experiment]) -> tuple[Rows, tuple[str, ...]]:
    """Experiments as a table, rounded: its cells and its header. What recovery came to is left out if none has it."""
    names = differing(rows)
    trained, embeds = any(row.recovered for row in rows), any(row.rank_correlation is not None for row in rows)
    after = (("recovered", "trained") if trained else ()) + (("rank correlation",) if embeds else ())
    header = ("experiment", *names.values(), "decoder removed", rows[0].measure.name, *after, "prefill", "size, MB")
    return [
        (row.label, *(setting(row, name) for name in names), *_results(row, trained, embeds)) for row in rows
    ], header


def _results(row: Experiment, trained: bool, embeds: bool) -> tuple[str, ...]:
    correlation = "–" if row.rank_correlation is None else f"{row.rank_correlation:.4f}"
    return (
        f"{100 * row.removed:.2f} %",
        _ratio(row, row.measure),
        *(_recovery(row) if trained else ()),
        *((correlation,) if embeds else ()),
        f"× {row.prefill:.2f}",
        "–" if row.size is None else f"{row.size / 1e6:,.1f}",
    )


def _recovery(row: Experiment) -> tuple[str, str]:
    run = row.recovered
    if run is None:
        return "–", "–"
    return _ratio(run, row.measure), f"{run.tokens:,} tokens, {run.parameters:,} parameters, {run.seconds:,.0f} s"


def _ratio(figures: Experiment | Recovered, measure: Measure) -> str:
    digits = 3 if measure.dense else 4
    return f"{measure.sign}{figures.ratio:.{digits}f} ± {figures.error:.{digits}f}"


def recovered_columns(row: Experiment) -> dict[str, float]:
    """What recovery came to, by the names of columns in CSV; empty if the pruned model was not trained."""
    run = row.recovered
    if run is None:
        return {}
    return {
        "recovered_ratio": run.ratio,
        "recovered_ratio_se": run.error,
        "recovered_tokens": run.tokens,
        "recovered_seconds": run.seconds,
        "recovered_trained_parameters": run.parameters,
    }


def inert(text: str) -> str:
    """A text as a cell of CSV that no spreadsheet takes for a formula: behind an apostrophe if it begins like one."""
    return text if _NUMBER.fullmatch(text) or not text.startswith(_FORMULA) else f"'{text}"


def csv_text(rows: Sequence[Experiment]) -> str:
    """Experiments as CSV, with the params' full names and unrounded figures; unknown ones are empty."""
    names = differing(rows)
    column = rows[0].measure.column
    results = ("decoder_share_removed", column, f"{column}_se", "prefill_ratio", "bytes")
    after = dict.fromkeys(name for row in rows for name in recovered_columns(row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("experiment", *names, *results, *after))
    for row in rows:
        figures = (row.removed, row.ratio, row.error, row.prefill, row.size)
        trained = (recovered_columns(row).get(name) for name in after)
        texts = map(inert, (row.label, *(setting(row, name) for name in names)))
        writer.writerow((*texts, *figures, *trained))
    return text.getvalue()


def markdown_text(rows: Sequence[Experiment], left_out: Mapping[str, str]) -> str:
    """Experiments as a table in Markdown with remarks, the command for the params, and the picture beside it."""
    cells, header = tabulate_experiments(rows)
    command = params_diff(rows)
    parts = ["# Experiments", escaped_table(cells, header)]
    parts += map(prose, remarks(rows, left_out))
    return "\n\n".join([*parts, *([code(command)] if command else []), "![Perplexity](perplexity.png)"]) + "\n"


def remarks(rows: Sequence[Experiment], left_out: Mapping[str, str]) -> list[str]:
    """Sentences under the table: what its figures do and do not say, and what is not in it.

    Args:
        rows: at least one, the best first.
        left_out: why each other experiment is not among them.
    """
    reasons = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
    unproved = _about(
        "Without a dvc.lock, which would say with which params the results were made",
        [row for row in rows if not row.proved],
    )
    absent = [f"Not in the table: {reasons}."] if left_out else []
    return [*_order(rows), *_noise(rows), *_shares(rows), *unproved, *absent]


def _order(rows: Sequence[Experiment]) -> list[str]:
    """By which figure rows are ordered and judged, if some were trained after pruning."""
    if not any(row.recovered for row in rows):
        return []
    if all(row.recovered for row in rows):
        return [f"The rows are ordered and judged by the {rows[0].measure.name} after recovery."]
    return [
        f"The rows are ordered and judged by the {rows[0].measure.name} before recovery, since not all of them were "
        "trained."
    ]


def _noise(rows: Sequence[Experiment]) -> list[str]:
    """Which rows are worse than the best by more than twice the standard error of the difference."""
    best, *others = rows
    least, *figures = compared_figures(rows)
    beyond = [one.ratio - least.ratio > 2 * hypot(one.error, least.error) for one in figures]
    same = [row for row in others if isclose(row.dense, best.dense, rel_tol=SAME_EVALUATION)]
    worse = [row for row, clear in zip(others, beyond, strict=True) if clear and row in same]
    return [
        *_about(f"Worse than {best.label} by more than two standard errors of the difference", worse),
        *_about(f"Within two standard errors of {best.label}", [row for row in same if row not in worse]),
        *_about(
            f"Measured on other windows than {best.label}, or against another dense model, so that the figures compare "
            "only roughly",
            [row for row in others if row not in same],
        ),
        *([_INDEPENDENT] if same else []),
    ]


_INDEPENDENT = (
    "The standard error of a difference is taken as if the two results were independent. Both are on the same windows, "
    "so as a rule it is smaller; and the best of many is in part the luckiest."
)


def _about(what: str, rows: Iterable[Experiment]) -> list[str]:
    labels = ", ".join(row.label for row in rows)
    return [f"{what}: {labels}."] if labels else []


def _shares(rows: Sequence[Experiment]) -> list[str]:
    removed = [row.removed for row in rows]
    if max(removed) - min(removed) <= SAME_SHARE:
        return []
    return [
        f"They remove between {100 * min(removed):.1f} and {100 * max(removed):.1f} % of the decoder: a larger model "
        f"with less {rows[0].measure.name} is not by that the better pruned one."
    ]


def params_diff(rows: Sequence[Experiment]) -> str | None:
    """The command that shows in which params the best row differs from the next one with other params.

    None if all rows have the same params.
    """
    best, *others = rows
    other = next((row for row in others if row.params != best.params), None)
    return f"dvc params diff {best.names[0]} {other.names[0]}" if other else None
