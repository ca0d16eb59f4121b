"""A comparison as tables: rounded for the terminal and Markdown, unrounded as CSV."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from libprune.experiments.agreement import Interval
from libprune.experiments.costs import Cost
from libprune.experiments.dvc_experiments import DISTANCE, Measure
from libprune.experiments.results import Gathered
from libprune.experiments.summary import Perplexity, Summary, compare_settings, overlap, overlap_matrix, reference_of
from libprune.experiments.sweep_table import inert, recovered_columns
from libprune.pipeline.terminal import Rows

NOTHING = "–"
"""The text of a cell whose value is unknown."""


def times(value: float | int) -> str:
    """A ratio as text, with the sign for times."""
    return f"× {value:,.0f}" if value >= 100 else f"× {value:.3f}"


def interval_text(interval: Interval) -> str:
    """A ratio as text, with its interval if there is one."""
    if not interval.known:
        return times(interval.mean)
    low, high = (times(end).removeprefix("× ") for end in (interval.low, interval.high))
    return f"{times(interval.mean)} ({low} to {high})"


def measured_text(figures: Perplexity, measure: Measure) -> str:
    """The measure of a setting as text, with its interval if there is one."""
    return interval_text(figures.ratio).replace(times(0)[:2], measure.sign)


def correlation_text(interval: Interval) -> str:
    """A correlation as text, with its interval if there is one."""
    return f"{interval.mean:.2f}" + (f" ({interval.low:.2f} to {interval.high:.2f})" if interval.known else "")


def tabulate_settings(gathered: Gathered, summaries: Sequence[Summary]) -> tuple[Rows, tuple[str, ...]]:
    """The settings of a comparison as a table: its cells and its header. Columns without a known value are left out.

    The perplexities before and after recovery have columns of their own; see `Summary.compared` for the factor.
    """
    reference = reference_of(gathered, summaries)
    parts = list(dict.fromkeys(part for one in summaries for part in one.correlations))
    columns = {
        "setting": [one.name for one in summaries],
        "seeds": [str(len(one.before.ratios)) for one in summaries],
        "removed": [f"{100 * one.removed:.1f} %" for one in summaries],
        reference.measure.name: [measured_text(one.before, one.measure) for one in summaries],
        "± windows": [_error(one.before) for one in summaries],
        "recovered": [measured_text(one.after, one.measure) if one.after else NOTHING for one in summaries],
        "recovered, ± windows": [_error(one.after) for one in summaries],
        "trained on, tokens": [_mean(run.tokens for run in one.recovered.values()) for one in summaries],
        "trained parameters": [_mean(run.parameters for run in one.recovered.values()) for one in summaries],
        f"to {reference.name}": [_factor(one, reference) for one in summaries],
        "kept, by seed": [_number(one.seed_overlap) for one in summaries],
        f"kept, to {reference.name}": [
            NOTHING if one is reference else _number(overlap(gathered, one.name, reference.name)) for one in summaries
        ],
        **{
            f"ranks, {part}": [_correlation(one, part) for one in summaries]
            for part in parts
        },
        "collecting, s": [_seconds(one.collecting) for one in summaries],
        "pruning, s": [_seconds(one.pruning) for one in summaries],
        "recovering, s": [_seconds(one.recovering) for one in summaries],
        "peak, MB": [_peak(one) for one in summaries],
    }  # fmt: skip
    shown = {name: cells for name, cells in columns.items() if any(cell != NOTHING for cell in cells)}
    return list(zip(*shown.values(), strict=True)), tuple(shown)


EXPLAINED = (
    "Perplexity: over the dense model's, geometric mean over the calibration seeds, with its 95 % interval over them; "
    "± windows: one standard error over the evaluation windows; to a setting: the factor between the two, paired by "
    "seed; kept: Jaccard overlap of the sets of kept units, between the seeds of one setting and between two settings; "
    "ranks: Spearman's correlation of importances and measured loss increases; collecting: the statistics that the "
    "setting reads; pruning: from the scores to the pruned model; peak: the most memory of one process of these."
)


def explain_columns(summaries: Sequence[Summary]) -> str:
    """What the columns of the table say, in a paragraph; of recovery only where a setting has it."""
    measure = summaries[0].measure
    explained = EXPLAINED
    if measure is DISTANCE:
        explained = EXPLAINED.replace("Perplexity: over the dense model's, geometric", f"{DISTANCE.scale}: geometric")
    if not any(one.after for one in summaries):
        return explained
    return (
        f"{explained} {measure.name.capitalize()} is that of the pruned model before recovery; recovered: after it, "
        "likewise; trained: mean over the seeds; recovering: drawing the text and training the pruned model. "
        f"{ordered_by(summaries)}"
    )


def ordered_by(summaries: Sequence[Summary]) -> str:
    """The sentence that says by which perplexity settings are ordered and compared, where some were trained."""
    if summaries[0].compares_after:
        return f"The settings are ordered and compared by the {summaries[0].measure.name} after recovery."
    return (
        f"The settings are ordered and compared by the {summaries[0].measure.name} before recovery, since not all of "
        "them were trained."
    )


def _error(perplexity: Perplexity | None) -> str:
    if perplexity is None:
        return NOTHING
    return f"{perplexity.error:,.3f}" if perplexity.ratio.mean < 100 else f"{perplexity.error:,.0f}"


def _mean(counts: Iterable[int]) -> str:
    known = list(counts)
    return f"{sum(known) / len(known):,.0f}" if known else NOTHING


def _factor(one: Summary, reference: Summary) -> str:
    difference = compare_settings(one, reference) if one is not reference else None
    return interval_text(difference.factor) if difference else NOTHING


def _correlation(one: Summary, part: str) -> str:
    return correlation_text(one.correlations[part]) if part in one.correlations else NOTHING


def _number(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.3f}"


def _seconds(cost: Cost | None) -> str:
    return NOTHING if cost is None else f"{cost.seconds:,.1f}"


def _peak(one: Summary) -> str:
    costs = (one.collecting, one.pruning, one.recovering)
    known = [cost.peak_memory_bytes for cost in costs if cost is not None]
    return f"{max(known) / 1e6:,.0f}" if any(known) else NOTHING


def settings_csv(gathered: Gathered, summaries: Sequence[Summary]) -> str:
    """The settings of a comparison as CSV, one in each row; figures are unrounded, and unknown ones are empty."""
    reference = reference_of(gathered, summaries)
    parts = list(dict.fromkeys(part for one in summaries for part in one.correlations))
    rows = []
    for one in summaries:
        to = compare_settings(one, reference)
        row: dict[str, Any] = {
            "setting": one.name,
            "changes": json.dumps(dict(gathered.setting(one.name).changes)),
            "seeds": len(one.before.ratios),
            "decoder_share_removed": one.removed,
            **_ends(one.measure.column, one.before.ratio),
            f"{one.measure.column}_se_windows": one.before.error,
            "reference": reference.name,
            **_ends("factor", to.factor if to else None),
            "difference": to.kind if to else None,
            "seed_overlap": one.seed_overlap,
            "reference_overlap": overlap(gathered, one.name, reference.name) if one is not reference else None,
        }
        for part in parts:
            row |= _ends(f"correlation_{part}", one.correlations.get(part))
        row |= _cost("collecting", one.collecting) | _cost("pruning", one.pruning)
        if one.after:
            row |= _ends("recovered_ratio", one.after.ratio)
            row |= {"recovered_ratio_se_windows": one.after.error} | _cost("recovering", one.recovering)
        rows.append(row)
    return rows_csv(rows)


def runs_csv(gathered: Gathered) -> str:
    """The runs of a comparison as CSV, one in each row; figures are unrounded, and unknown ones are empty."""
    rows = []
    for name, by_seed in gathered.results.items():
        for seed, result in by_seed.items():
            one = result.experiment
            rows.append(
                {
                    "setting": name,
                    "seed": seed,
                    "experiment": one.names[0],
                    "decoder_share_removed": one.removed,
                    one.measure.column: one.ratio,
                    f"{one.measure.column}_se": one.error,
                    "dense_perplexity": one.dense,
                    "prefill_ratio": one.prefill,
                    "bytes": one.size,
                    **{f"correlation_{part}": value for part, value in result.correlations.items()},
                    **_cost("collecting", result.collecting),
                    **_cost("pruning", result.pruning),
                    **recovered_columns(one),
                    **(_cost("recovering", result.recovering) if one.recovered else {}),
                }
            )
    return rows_csv(rows)


def overlaps_csv(gathered: Gathered, summaries: Sequence[Summary]) -> str:
    """The overlaps of a comparison as CSV, one pair of settings in each row; with itself, between a setting's seeds."""
    matrix = overlap_matrix(gathered, summaries)
    return rows_csv(
        {"setting": one.name, "other": other.name, "overlap": float(matrix[i, j])}
        for i, one in enumerate(summaries)
        for j, other in enumerate(summaries[: i + 1])
    )


def _ends(name: str, interval: Interval | None) -> dict[str, float | None]:
    ends = (interval.mean, interval.low, interval.high) if interval else (None,) * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def _cost(name: str, cost: Cost | None) -> dict[str, float | None]:
    return {
        f"{name}_seconds": cost.seconds if cost else None,
        f"{name}_peak_memory_bytes": cost.peak_memory_bytes if cost else None,
    }


def _known(value: Any) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    return inert(value) if isinstance(value, str) else value


def rows_csv(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as CSV, with the columns of all of them; None and NaN are empty."""
    known = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in known for name in row)), lineterminator="\n")
    writer.writeheader()
    for row in known:
        writer.writerow({key: _known(value) for key, value in row.items()})
    return text.getvalue()
