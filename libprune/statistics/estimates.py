"""Means over sequences with their standard errors, as the tables of measurements hold them."""

import numpy as np
from jaxtyping import Float

from libprune.pipeline.artifacts import Columns


def mean_columns(name: str, values: Float[np.ndarray, "rows sequences"]) -> Columns:
    """The means of the rows and their standard errors over sequences, NaN of a single one."""
    number = values.shape[1]
    error = values.std(1, ddof=1) / number**0.5 if number > 1 else np.full(len(values), np.nan)
    return {name: values.mean(1), "standard_error": error}
