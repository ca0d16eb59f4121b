"""How far results agree: one setting over calibration seeds, two settings with the same seeds, sets of kept units.

Pure functions of arrays. Perplexity ratios are compared by their logarithm, which is the loss increase in nats per
token: it is what the evaluation averages, its spread does not grow with the ratio, and no interval reaches below a
ratio of 0. Means are therefore geometric, and a difference of logarithms is shown as the factor between two ratios.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Coverage of every interval."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: the mean of the values.
        low: the lower end; NaN if there are fewer than two values.
        high: the upper end; NaN if there are fewer than two values.
        count: the number of values.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def known(self) -> bool:
        """Whether there were enough values for an interval."""
        return self.count > 1

    def leaves_out(self, value: float) -> bool:
        """Whether the interval is known and does not hold a value."""
        return self.known and not self.low <= value <= self.high

    def exp(self) -> "Interval":
        """The interval of the exponentials; from an interval of logarithms, that of the geometric mean."""
        return Interval(math.exp(self.mean), math.exp(self.low), math.exp(self.high), self.count)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and t-interval of independent values, at least one: mean ± t(n - 1) s / √n."""
    data = np.asarray(values, dtype=np.float64)
    mean, count = float(data.mean()), len(data)
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    low, high = stats.t.interval(LEVEL, count - 1, mean, stats.sem(data)) if np.ptp(data) else (mean, mean)
    return Interval(mean, float(low), float(high), count)


def ratio_interval(ratios: Sequence[float]) -> Interval:
    """Geometric mean of positive ratios, and its t-interval on the scale of logarithms."""
    return mean_interval([math.log(ratio) for ratio in ratios]).exp()


def paired_factor(ratios: Mapping[int, float], reference: Mapping[int, float]) -> Interval | None:
    """How many times a setting's ratio is a reference's: geometric mean and t-interval over the seeds of both.

    The pairing takes out what a seed does to both alike.

    Args:
        ratios: the setting's ratios by seed, positive.
        reference: the reference's ratios by seed, positive.

    Returns:
        The factor with its interval; None if no seed is common.
    """
    common = sorted(ratios.keys() & reference.keys())
    return ratio_interval([ratios[seed] / reference[seed] for seed in common]) if common else None


def chance_overlap(share: float, other: float) -> float:
    """The Jaccard overlap of two large sets drawn independently with these shares of all units, not both 0."""
    return share * other / (share + other - share * other)
