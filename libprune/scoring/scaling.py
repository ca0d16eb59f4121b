"""Scalings, which put the importance of the units of each block on a scale of its own."""

import numpy as np

from libprune.engine.tables import Columns, Values, layers_and_parts


def scale(importance: Values, table: Columns, how: str) -> Values:
    """Put the importance of each block on a scale of its own.

    Args:
        importance: ``[units]``.
        table: the index columns `layer_idx` and `group_type` of the units.
        how: `zscore`: mean 0 and standard deviation 1; `minmax`: 0 to 1; `rank`: (rank + 1/2) / units, of which equal
            units share the mean. Where all units of a block are equal, they become 0, 0 and 1/2.
    """
    scaled = np.empty_like(importance)
    for rows in layers_and_parts(table):
        scaled[rows] = SCALINGS[how](importance[rows])
    return scaled


def _zscore(values: Values) -> Values:
    spread = values.std()
    return (values - values.mean()) / spread if np.ptp(values) > 0 and spread > 0 else np.zeros_like(values)


def _minmax(values: Values) -> Values:
    spread = np.ptp(values)
    return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)


def _rank(values: Values) -> Values:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2  # of the ranks that equal values share, plus 1/2
    return middle[place] / len(values)


SCALINGS = {"zscore": _zscore, "minmax": _minmax, "rank": _rank}
"""The scalings by name, functions of one block's values."""
