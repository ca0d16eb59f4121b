"""Rank correlation."""

import math

import numpy as np
from numpy.typing import NDArray


def spearman(values: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """Spearman's rank correlation, -1 to 1, with shared ranks for ties; NaN where one side is constant or empty."""
    if len(values) < 2 or np.ptp(values) == 0 or np.ptp(others) == 0:
        return math.nan
    from scipy import stats  # which takes longer than most of what asks for no correlation

    return float(stats.spearmanr(values, others).statistic)
