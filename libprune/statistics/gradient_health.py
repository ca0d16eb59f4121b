"""What a collecting stage says at its end: a table by layer, the first keys, and whether gradients vanish."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import typer
from safetensors import safe_open

from libprune.pipeline.artifacts import Columns

MILD, SEVERE = 100.0, 1000.0
"""Gradient ratios from which gradients vanish mildly and severely."""


def gradient_by_layer(rows: Columns) -> Columns:
    """Mean |g| of every layer, over its parameters and the batches, from the rows of `layers.parquet`.

    Each parameter counts once, whatever its size, as in the per-type pictures of the field.
    """
    layers = np.unique(rows["layer_idx"])
    return {
        "layer_idx": layers,
        "mean_abs": np.array([rows["mean_abs"][rows["layer_idx"] == i].mean() for i in layers]),
    }


def gradient_ratio(rows: Columns) -> float:
    """Largest over smallest mean |g| of the layers; infinite where a layer has no gradient at all."""
    means = gradient_by_layer(rows)["mean_abs"]
    return float(means.max() / means.min()) if means.min() > 0 else float("inf")


def verdict(ratio: float) -> str:
    """What a gradient ratio means, in a word: fine, mild or severe vanishing."""
    if ratio < MILD:
        return "fine"
    return "mild vanishing" if ratio < SEVERE else "severe vanishing"


def print_gradients(rows: Columns, folder: Path) -> None:
    """Mean |g| by layer and part, the first keys, the gradient ratio and its verdict."""
    parts = list(dict.fromkeys(rows["group_type"]))
    typer.echo(f"{'layer':>5}" + "".join(f"{f'mean |g| {part}':>22}" for part in parts))
    for layer in np.unique(rows["layer_idx"]):
        means = [rows["mean_abs"][(rows["layer_idx"] == layer) & (rows["group_type"] == part)].mean() for part in parts]
        typer.echo(f"{layer:>5}" + "".join(f"{mean:>22.3e}" for mean in means))
    print_keys(folder)
    ratio = gradient_ratio(rows)
    typer.echo(f"gradient ratio between layers: {ratio:,.1f} ({verdict(ratio)})")


def print_units(units: Columns, names: Sequence[str], folder: Path) -> None:
    """Means of per-unit columns by layer and part, and the first keys."""
    parts = list(dict.fromkeys(units["group_type"]))
    heads = [(name, part) for name in names for part in parts]
    typer.echo(f"{'layer':>5}" + "".join(f"{f'{name} {part}':>32}" for name, part in heads))
    for layer in np.unique(units["layer_idx"]):
        here = units["layer_idx"] == layer
        values = [units[name][here & (units["group_type"] == part)].mean() for name, part in heads]
        typer.echo(f"{layer:>5}" + "".join(f"{value:>32.3e}" for value in values))
    print_keys(folder)


def print_keys(folder: Path) -> None:
    """How many tensors the shards hold, and the first of them."""
    keys: list[str] = []
    for path in sorted(folder.glob("layer-*.safetensors")):
        with safe_open(path, framework="np") as file:
            keys += file.keys()
    typer.echo(f"{len(keys)} tensors, the first: {', '.join(keys[:3])}")
