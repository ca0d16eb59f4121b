"""A comparison as tables: for the terminal and Markdown rounded, as CSV not."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from libprune.experiments.agreement import Interval
from libprune.experiments.costs import Cost
from libprune.experiments.results import Gathered
from libprune.experiments.summary import Summary, difference, overlap, overlap_matrix, reference_of
from libprune.pipeline.terminal import Rows

NOTHING = "–"


def times(value: float) -> str:
    """A ratio."""
    return f"× {value:,.0f}" if value >= 100 else f"× {value:.3f}"


def interval_text(found: Interval) -> str:
    """A ratio with its interval, if there is one."""
    if not found.known:
        return times(found.mean)
    low, high = (times(end).removeprefix("× ") for end in (found.low, found.high))
    return f"{times(found.mean)} ({low} to {high})"


def correlation_text(found: Interval) -> str:
    """A correlation with its interval, if there is one."""
    return f"{found.mean:.2f}" + (f" ({found.low:.2f} to {found.high:.2f})" if found.known else "")


def table(gathered: Gathered, found: Sequence[Summary]) -> tuple[Rows, tuple[str, ...]]:
    """The cells and the header; columns of which nothing is known are left out."""
    reference = reference_of(gathered, found)
    parts = list(dict.fromkeys(part for one in found for part in one.correlations))
    columns = {
        "setting": [one.name for one in found],
        "seeds": [str(len(one.ratios)) for one in found],
        "removed": [f"{100 * one.removed:.1f} %" for one in found],
        "perplexity": [interval_text(one.ratio) for one in found],
        "± windows": [f"{one.error:,.3f}" if one.ratio.mean < 100 else f"{one.error:,.0f}" for one in found],
        f"to {reference.name}": [_factor(one, reference) for one in found],
        "kept, by seed": [_number(one.seed_overlap) for one in found],
        f"kept, to {reference.name}": [
            _number(overlap(gathered, one.name, reference.name)) if one is not reference else NOTHING for one in found
        ],
        **{
            f"ranks, {part}": [_correlation(one, part) for one in found]
            for part in parts
        },
        "collecting, s": [_seconds(one.collecting) for one in found],
        "pruning, s": [_seconds(one.pruning) for one in found],
        "peak, MB": [_peak(one) for one in found],
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


def _factor(one: Summary, reference: Summary) -> str:
    found = difference(one, reference) if one is not reference else None
    return interval_text(found.factor) if found else NOTHING


def _correlation(one: Summary, part: str) -> str:
    return correlation_text(one.correlations[part]) if part in one.correlations else NOTHING


def _number(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.3f}"


def _seconds(cost: Cost | None) -> str:
    return NOTHING if cost is None else f"{cost.seconds:,.1f}"


def _peak(one: Summary) -> str:
    known = [cost.peak_memory_bytes for cost in (one.collecting, one.pruning) if cost is not None]
    return f"{max(known) / 1e6:,.0f}" if any(known) else NOTHING


def settings_csv(gathered: Gathered, found: Sequence[Summary]) -> str:
    """One row a setting, unrounded; what is not known is empty."""
    reference = reference_of(gathered, found)
    parts = list(dict.fromkeys(part for one in found for part in one.correlations))
    rows = []
    for one in found:
        to = difference(one, reference)
        row: dict[str, Any] = {
            "setting": one.name,
            "changes": json.dumps(dict(gathered.setting(one.name).changes)),
            "seeds": len(one.ratios),
            "decoder_share_removed": one.removed,
            **_ends("perplexity_ratio", one.ratio),
            "perplexity_ratio_se_windows": one.error,
            "reference": reference.name,
            **_ends("factor", to.factor if to else None),
            "difference": to.kind if to else None,
            "seed_overlap": one.seed_overlap,
            "reference_overlap": overlap(gathered, one.name, reference.name) if one is not reference else None,
        }
        for part in parts:
            row |= _ends(f"correlation_{part}", one.correlations.get(part))
        rows.append(row | _cost("collecting", one.collecting) | _cost("pruning", one.pruning))
    return _csv(rows)


def runs_csv(gathered: Gathered) -> str:
    """One row a run, unrounded; what is not known is empty."""
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
                    "perplexity_ratio": one.ratio,
                    "perplexity_ratio_se": one.error,
                    "dense_perplexity": one.dense,
                    "prefill_ratio": one.prefill,
                    "bytes": one.size,
                    **{f"correlation_{part}": value for part, value in result.correlations.items()},
                    **_cost("collecting", result.collecting),
                    **_cost("pruning", result.pruning),
                }
            )
    return _csv(rows)


def overlaps_csv(gathered: Gathered, found: Sequence[Summary]) -> str:
    """One row a pair of settings; of a setting with itself, between its seeds."""
    matrix = overlap_matrix(gathered, found)
    return _csv(
        {"setting": one.name, "other": other.name, "overlap": float(matrix[i, j])}
        for i, one in enumerate(found)
        for j, other in enumerate(found[: i + 1])
    )


def _ends(name: str, found: Interval | None) -> dict[str, float | None]:
    ends = (found.mean, found.low, found.high) if found else (None,) * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def _cost(name: str, cost: Cost | None) -> dict[str, float | None]:
    return {
        f"{name}_seconds": cost.seconds if cost else None,
        f"{name}_peak_memory_bytes": cost.peak_memory_bytes if cost else None,
    }


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    """All columns of all rows; None and NaN are empty."""
    known = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in known for name in row)), lineterminator="\n")
    writer.writeheader()
    for row in known:
        writer.writerow({key: None if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()})
    return text.getvalue()
