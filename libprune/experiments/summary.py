"""A comparison in figures: each setting over its seeds, and which differences are larger than the noise."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from libprune.engine.plan import jaccard
from libprune.experiments.agreement import Interval, chance_overlap, mean_interval, paired_factor, ratio_interval
from libprune.experiments.costs import Cost
from libprune.experiments.dvc_experiments import PERPLEXITY, Experiment, Measure, Recovered
from libprune.experiments.results import Gathered, Result

Kind = Literal["clear", "seeds", "none"]


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of one setting, before or after recovery.

    Attributes:
        ratios: perplexity divided by the dense model's, by seed; at least one.
        errors: one standard error of each ratio over the evaluation windows, by seed.
    """

    ratios: Mapping[int, float]
    errors: Mapping[int, float]

    @staticmethod
    def of(figures: Mapping[int, Experiment | Recovered]) -> "Perplexity":
        """The perplexity of runs by seed."""
        return Perplexity(
            {seed: one.ratio for seed, one in figures.items()}, {seed: one.error for seed, one in figures.items()}
        )

    @cached_property
    def ratio(self) -> Interval:
        """Geometric mean of the ratios and its interval over the seeds."""
        return ratio_interval(list(self.ratios.values()))

    @property
    def error(self) -> float:
        """One standard error of the ratio over the windows, mean over the seeds."""
        return sum(self.errors.values()) / len(self.errors)


@dataclass(frozen=True)
class Summary:
    """The figures of one setting over its seeds.

    Attributes:
        name: as in the comparison file.
        before: perplexity of the pruned model before any recovery.
        removed: removed share of the decoder's parameters, mean over the seeds.
        dense: perplexities of the dense model, by seed.
        correlations: Spearman's correlation with measured loss increases, by part: mean over the seeds, and interval.
        seed_overlap: Jaccard overlap of the kept sets, mean over the pairs of seeds; NaN without two known sets.
        collecting: the cost of the statistics that it reads, mean over the seeds with a known cost; None without any.
        pruning: the cost from the scores to the pruned model, mean over the seeds with a known cost; None without any.
        recovered: what training the pruned model came to, by seed; empty if it was not trained.
        recovering: the cost of this training, mean over the seeds with a known cost; None without any.
        compares_after: whether the settings of the comparison are compared by their perplexity after recovery.
        measure: what the settings are compared by; where it is no perplexity, it stands in place of one.
    """

    name: str
    before: Perplexity
    removed: float
    dense: Mapping[int, float]
    correlations: Mapping[str, Interval]
    seed_overlap: float
    collecting: Cost | None
    pruning: Cost | None
    recovered: Mapping[int, Recovered] = field(default_factory=dict)
    recovering: Cost | None = None
    compares_after: bool = False
    measure: Measure = PERPLEXITY

    @cached_property
    def after(self) -> Perplexity | None:
        """Perplexity of the model after recovery; None if it was not trained."""
        return Perplexity.of(self.recovered) if self.recovered else None

    @property
    def compared(self) -> Perplexity:
        """The perplexity by which the settings are compared."""
        return self.after if self.after and self.compares_after else self.before

    @property
    def seconds(self) -> float | None:
        """Seconds of all that leads to the compared perplexity; None if a part of them is unknown."""
        costs = [self.collecting, self.pruning, *([self.recovering] if self.compares_after else [])]
        known = [cost.seconds for cost in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None


@dataclass(frozen=True)
class Difference:
    """The difference between two settings.

    Attributes:
        factor: the first one's perplexity over the second's, paired by seed.
        kind: `clear` if it is larger than the noise of seeds and windows, `seeds` if it is larger than that of the
            seeds alone, else `none`.
    """

    factor: Interval
    kind: Kind


def summarize(gathered: Gathered) -> list[Summary]:
    """Summarize every setting with results, the lowest perplexity first.

    The settings are ordered and compared by the perplexity before recovery, unless every run has one after it.
    """
    after = all(result.experiment.recovered for by_seed in gathered.results.values() for result in by_seed.values())
    summaries = [_summary(name, by_seed, after) for name, by_seed in gathered.results.items()]
    return sorted(summaries, key=lambda one: one.compared.ratio.mean)


def _summary(name: str, by_seed: Mapping[int, Result], after: bool) -> Summary:
    rows = {seed: result.experiment for seed, result in by_seed.items()}
    kept = [result.kept for result in by_seed.values() if result.kept is not None]
    parts = dict.fromkeys(part for result in by_seed.values() for part in result.correlations)
    return Summary(
        name=name,
        before=Perplexity.of(rows),
        removed=sum(row.removed for row in rows.values()) / len(rows),
        dense={seed: row.dense for seed, row in rows.items()},
        correlations={
            part: mean_interval([one.correlations[part] for one in by_seed.values() if part in one.correlations])
            for part in parts
        },
        seed_overlap=_mean_overlap(combinations(kept, 2)),
        collecting=_mean_cost([result.collecting for result in by_seed.values()]),
        pruning=_mean_cost([result.pruning for result in by_seed.values()]),
        recovered={seed: row.recovered for seed, row in rows.items() if row.recovered},
        recovering=_mean_cost([result.recovering for result in by_seed.values()]),
        compares_after=after,
        measure=next(iter(rows.values())).measure,
    )


def _mean_cost(costs: Sequence[Cost | None]) -> Cost | None:
    """The mean time and the largest memory of the known costs; None without any."""
    known = [cost for cost in costs if cost is not None]
    if not known:
        return None
    return Cost(sum(cost.seconds for cost in known) / len(known), max(cost.peak_memory_bytes for cost in known))


def reference_of(gathered: Gathered, summaries: Sequence[Summary]) -> Summary:
    """The setting that the others are compared with: the one that the file names, if it has results, else the best."""
    return next((one for one in summaries if one.name == gathered.comparison.reference), summaries[0])


def compare_settings(one: Summary, other: Summary) -> Difference | None:
    """How many times one setting's perplexity is the other's, and whether that is more than noise.

    The perplexity is that of `Summary.compared`.

    The noise of the seeds: a paired t-interval that leaves out 1. The noise of the windows: two standard errors of the
    difference of the logarithms, as if the two were independent, which is slow to call a difference larger, since both
    are on the same windows. With a single common seed only the windows can say something.

    Returns:
        The difference; None without a common seed.
    """
    factor = paired_factor(one.compared.ratios, other.compared.ratios)
    if factor is None:
        return None
    relative = [side.error / side.ratio.mean for side in (one.compared, other.compared)]
    beyond_windows = abs(math.log(factor.mean)) > 2 * math.hypot(*relative)
    if not factor.known:
        return Difference(factor, "clear" if beyond_windows else "none")
    if not factor.leaves_out(1.0):
        return Difference(factor, "none")
    return Difference(factor, "clear" if beyond_windows else "seeds")


def overlap(gathered: Gathered, one: str, other: str) -> float:
    """Jaccard overlap of two settings' kept sets with the same seed, mean over the seeds; NaN where unknown."""
    first, second = (
        {seed: result.kept for seed, result in gathered.results[name].items() if result.kept is not None}
        for name in (one, other)
    )
    return _mean_overlap((first[seed], second[seed]) for seed in first.keys() & second.keys())


def overlap_matrix(gathered: Gathered, summaries: Sequence[Summary]) -> NDArray[np.float64]:
    """Jaccard overlaps of all pairs of settings, ``[settings, settings]``; on the diagonal between the seeds of one."""
    return np.array(
        [
            [one.seed_overlap if one is other else overlap(gathered, one.name, other.name) for other in summaries]
            for one in summaries
        ]
    )


def _mean_overlap(pairs: Iterable[tuple[NDArray[np.bool_], NDArray[np.bool_]]]) -> float:
    values = [jaccard(*pair) for pair in pairs]
    return sum(values) / len(values) if values else math.nan


def overlap_by_chance(gathered: Gathered) -> float | None:
    """The Jaccard overlap of independent choices of as many units, from the mean kept share; None if unknown."""
    shares = [
        float(result.kept.mean())
        for by_seed in gathered.results.values()
        for result in by_seed.values()
        if result.kept is not None
    ]
    return chance_overlap(*[sum(shares) / len(shares)] * 2) if shares else None
