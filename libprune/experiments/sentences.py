"""What a comparison's figures say, in sentences: which differences are larger than the noise, and what is not known."""

from collections.abc import Sequence
from math import isclose

import numpy as np
from scipy import stats

from libprune.experiments.results import Gathered
from libprune.experiments.summary import (
    Kind,
    Summary,
    compare_settings,
    overlap_by_chance,
    overlap_matrix,
    reference_of,
)
from libprune.experiments.sweep_table import SAME_EVALUATION, SAME_SHARE
from libprune.experiments.table import interval_text, measured_text, ordered_by


def explain_results(gathered: Gathered, summaries: Sequence[Summary]) -> list[str]:
    """Explain a comparison in paragraphs: the verdict, how it was reached, overlaps, cautions, what is missing."""
    trained = any(one.after for one in summaries)
    return [
        " ".join([_best(summaries, trained), *_differences(gathered, summaries)]),
        *([ordered_by(summaries)] if trained else []),
        *([_noise(gathered, summaries)] if len(summaries) > 1 else []),
        *_overlaps(gathered, summaries),
        *_cautions(summaries),
        *_missing(gathered),
        *gathered.remarks,
    ]


def _best(summaries: Sequence[Summary], trained: bool) -> str:
    best, figures = summaries[0], summaries[0].compared
    seeds = ", ".join(map(str, figures.ratios))
    over = f"over the calibration seeds {seeds}" if len(figures.ratios) > 1 else f"with the calibration seed {seeds}"
    when = f" {'after' if best.compares_after else 'before'} recovery" if trained else ""
    found = measured_text(figures, best.measure)
    beside = " the dense model's" if best.measure.dense else ""
    return f"The lowest {best.measure.name}{when} {over} is that of {best.name}: {found}{beside}."


_SAID: dict[Kind, str] = {
    "clear": "Larger than the noise: {}.",
    "seeds": "Larger than what the calibration seeds do, but within two standard errors over the windows: {}.",
    "none": "Not larger than the noise: {}.",
}


def _differences(gathered: Gathered, summaries: Sequence[Summary]) -> list[str]:
    reference = reference_of(gathered, summaries)
    others = [(one, compare_settings(one, reference)) for one in summaries if one is not reference]
    said = [f"Beside {reference.name}, with the factor between the two {_several(reference)}."] if others else []
    for kind, sentence in _SAID.items():
        named = [f"{one.name} {interval_text(to.factor)}" for one, to in others if to is not None and to.kind == kind]
        said += [sentence.format("; ".join(named))] if named else []
    alone = [one.name for one, to in others if to is None]
    return said + ([f"Without a seed in common: {', '.join(alone)}."] if alone else [])


def _several(one: Summary) -> str:
    return "perplexities" if one.measure.dense else f"values of {one.measure.name}"


def _noise(gathered: Gathered, summaries: Sequence[Summary]) -> str:
    reference = reference_of(gathered, summaries)
    counts = [to.factor.count for one in summaries if one is not reference and (to := compare_settings(one, reference))]
    said = []
    if any(count > 1 for count in counts):
        fewest = min(count for count in counts if count > 1)
        said.append(
            f"A factor's interval is Student's over the seeds, paired, at 95 %: with {fewest} seeds it reaches "
            f"{stats.t.ppf(0.975, fewest - 1):.1f} standard errors to each side, and one comparison in twenty "
            "leaves out 1 by chance."
        )
    if 1 in counts:
        said.append("With one seed nothing is known of what another calibration text would do.")
    if _on_same_windows(summaries):
        said.append(
            "All are on the same evaluation windows; the error over these is taken as if two results were independent, "
            "which is slow to call a difference larger."
        )
    if reference is summaries[0] and gathered.comparison.reference is None:
        said.append("The best of several is in part the luckiest.")
    return " ".join(said)


def _overlaps(gathered: Gathered, summaries: Sequence[Summary]) -> list[str]:
    matrix = overlap_matrix(gathered, summaries)
    own, between = np.diag(matrix), matrix[np.tril_indices(len(summaries), -1)]
    said = [
        f"{where} by {_range(values)}"
        for where, values in (("between the seeds of one setting", own), ("between settings", between))
        if np.isfinite(values).any()
    ]
    chance = overlap_by_chance(gathered)
    if not said or chance is None:
        return []
    return [
        f"The sets of kept units overlap {' and '.join(said)}; independent choices would by {chance:.2f} (Jaccard)."
    ]


def _range(values: np.ndarray) -> str:
    low, high = (f"{end:.2f}" for end in (np.nanmin(values), np.nanmax(values)))
    return low if low == high else f"{low} to {high}"


def _cautions(summaries: Sequence[Summary]) -> list[str]:
    said = []
    if not _on_same_windows(summaries):
        said.append(
            "The dense model's perplexity is not the same in all runs, so that they were on other windows or another "
            "dense model: the factors compare only roughly."
        )
    removed = [one.removed for one in summaries]
    if max(removed) - min(removed) > SAME_SHARE:
        said.append(
            f"The settings remove between {100 * min(removed):.1f} and {100 * max(removed):.1f} % of the decoder: a "
            f"larger model with less {summaries[0].measure.name} is not by that the better pruned one."
        )
    return said


def _on_same_windows(summaries: Sequence[Summary]) -> bool:
    dense = [value for one in summaries for value in one.dense.values()]
    return all(isclose(value, dense[0], rel_tol=SAME_EVALUATION) for value in dense)


def _missing(gathered: Gathered) -> list[str]:
    if not gathered.missing:
        return []
    reasons = "; ".join(f"{name} ({reason})" for name, reason in gathered.missing.items())
    return [f"Without results: {reasons}."]
