"""The lines that a collecting stage prints at its end: means by layer and part, and the first tensors that it wrote."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open

from libprune.engine.tables import Columns, Values
from libprune.pipeline.terminal import note


def print_units(units: Columns, names: Sequence[str], folder: Path) -> None:
    """Print the means of per-unit columns by layer and part, and the first tensors of the shards."""
    parts = list(dict.fromkeys(units["group_type"]))
    heads = [(name, part) for name in names for part in parts]
    note(f"{'layer':>5}" + "".join(f"{f'{name} {part}':>32}" for name, part in heads))
    for layer in np.unique(units["layer_idx"]):
        here = units["layer_idx"] == layer
        values = [units[name][here & (units["group_type"] == part)] for name, part in heads]
        note(f"{layer:>5}" + "".join(mean_cell(some, 32) for some in values))
    print_keys(folder)


def mean_cell(values: Values, width: int) -> str:
    """The mean of some values in a column of a table, empty where a layer lacks the part and there are none."""
    return f"{values.mean():>{width}.3e}" if values.size else " " * width


def print_keys(folder: Path) -> None:
    """Print the number of tensors that the shards hold, and the names of the first three."""
    keys: list[str] = []
    for path in sorted(folder.glob("layer-*.safetensors")):
        with safe_open(path, framework="np") as file:
            keys += file.keys()
    note(f"{len(keys)} tensors, the first: {', '.join(keys[:3])}")
