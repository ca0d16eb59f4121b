"""Reading per-unit tables: columns as numbers, and which rows are of one layer and type."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from libprune.pipeline.artifacts import Columns, column


def numbers(table: Columns, name: str) -> NDArray[np.float64]:
    """A column of the joined statistics tables, in float64.

    Raises:
        ArtifactError: if there is none of this name.
    """
    return np.asarray(column(table, name, "the joined statistics tables"), dtype=np.float64)


def layers_and_types(table: Columns) -> Iterator[NDArray[np.bool_]]:
    """The rows of every layer and type, one after the other; ``[units]`` each."""
    for layer, part in sorted(set(zip(table["layer_idx"].tolist(), table["group_type"].tolist(), strict=True))):
        yield (table["layer_idx"] == layer) & (table["group_type"] == part)
