"""Per-unit tables: the order of their rows, their columns as numbers, and the rows of each block."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from libprune.engine.architecture import Architecture, Block
from libprune.engine.errors import ArtifactError, missing_key

Columns = dict[str, NDArray[Any]]
"""A table: column name to an array of one value a row."""

Values = NDArray[np.float64]
"""One number for each unit, or for each row of a table."""


def numbers(table: Columns, name: str) -> NDArray[np.float64]:
    """A column of the joined statistics tables, in float64.

    Raises:
        ArtifactError: if there is none of this name.
    """
    return np.asarray(column(table, name, "the joined statistics tables"), dtype=np.float64)


def layers_and_parts(table: Columns) -> list[NDArray[np.intp]]:
    """For each block, the numbers of the rows of a table that belong to it, ascending; blocks by their first rows."""
    rows: dict[tuple[Any, Any], list[int]] = {}
    for row, block in enumerate(zip(table["layer_idx"].tolist(), table["group_type"].tolist(), strict=True)):
        rows.setdefault(block, []).append(row)
    return [np.array(own) for own in rows.values()]


def column(table: Columns, name: str, where: str) -> NDArray[Any]:
    """A column of a table, by its name.

    Raises:
        ArtifactError: with the columns that exist.
    """
    if name not in table:
        raise ArtifactError(missing_key(name, table, where))
    return table[name]


def unit_index(architecture: Architecture) -> Columns:
    """The rows of every per-unit table, in order: `layer_idx`, `group_type`, `group_idx`."""
    rows = [(layer, part, unit) for layer, part in architecture.blocks() for unit in range(architecture.units(part))]
    layers, parts, units = zip(*rows, strict=True)
    return {"layer_idx": np.array(layers), "group_type": np.array(parts, dtype=object), "group_idx": np.array(units)}


def check_rows(architecture: Architecture, table: Columns, path: Path) -> None:
    """Stop unless a table has one row a unit, in the order of `unit_index`."""
    for name, expected in unit_index(architecture).items():
        if not np.array_equal(column(table, name, str(path)), expected):
            raise ArtifactError(f"{path}: the rows do not list the units of this model in order; run `dvc repro`")


def split_blocks(architecture: Architecture, values: NDArray[Any]) -> Iterator[tuple[Block, NDArray[Any]]]:
    """Cut a per-unit column into the blocks' own arrays."""
    start = 0
    for layer, part in architecture.blocks():
        stop = start + architecture.units(part)
        yield (layer, part), values[start:stop]
        start = stop


def join_blocks(architecture: Architecture, arrays: Mapping[Block, NDArray[Any]]) -> NDArray[Any]:
    """Join the blocks' own arrays into a per-unit column, in the order of `unit_index`."""
    return np.concatenate([arrays[block] for block in architecture.blocks()])


def mean_columns(name: str, values: Float[np.ndarray, "rows sequences"]) -> Columns:
    """Two columns: the mean of each row over sequences, and its standard error, NaN for a single sequence."""
    number = values.shape[1]
    error = values.std(1, ddof=1) / number**0.5 if number > 1 else np.full(len(values), np.nan)
    return {name: values.mean(1), "standard_error": error}
