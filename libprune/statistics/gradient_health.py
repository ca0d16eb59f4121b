"""Whether gradients vanish on their way through the layers: their mean by layer, its ratio, and a verdict."""

import numpy as np

from libprune.engine.tables import Columns

MILD, SEVERE = 100.0, 1000.0
"""Gradient ratios from which gradients vanish mildly and severely."""


def gradient_by_layer(rows: Columns) -> Columns:
    """Mean |g| of every layer over its parameters and the batches, from the rows of `layers.parquet`.

    Each parameter counts once, whatever its size.
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
    """The meaning of a gradient ratio in words: fine, mild vanishing or severe vanishing."""
    if ratio < MILD:
        return "fine"
    return "mild vanishing" if ratio < SEVERE else "severe vanishing"
