"""Gradients by layer in numbers: their size, their spread inside a layer, and how steady they are over batches."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.engine.tables import Columns
from libprune.statistics.gradient_health import gradient_by_layer, gradient_ratio, verdict

Diagnosis = Mapping[str, Any]
"""The plan's metadata under `diagnosis`, which allocate writes of the gradients; empty if it wrote none."""


def batch_means(rows: Columns) -> NDArray[np.float64]:
    """Mean |g| of every layer in every batch, over the layer's parameters; ``[layers, batches]``.

    A cell is NaN where the table has no row.
    """
    _, layer = np.unique(rows["layer_idx"], return_inverse=True)
    _, batch = np.unique(rows["batch"], return_inverse=True)
    return grouped_mean(layer, batch, rows["mean_abs"])


def grouped_mean(row: NDArray[np.int64], column: NDArray[np.int64], values: NDArray[Any]) -> NDArray[np.float64]:
    """Mean of the values that fall into each cell of a grid ``[rows, columns]``; NaN in cells without any."""
    shape = (row.max() + 1, column.max() + 1)
    cell = np.ravel_multi_index((row, column), shape)
    counts = np.bincount(cell, minlength=shape[0] * shape[1])
    sums = np.bincount(cell, values, minlength=len(counts))
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0).reshape(shape)


def layer_summary(rows: Columns) -> Columns:
    """Size, spread and steadiness of the gradients, one row a layer, from the rows of `gradients/layers.parquet`.

    Returns:
        `layer_idx`; `mean_abs`, as `gradient_by_layer` computes it; `std`, the spread inside the layer: the root mean
        square, over its parameters and the batches, of the standard deviation of one parameter's gradient entries;
        `variation`, over batches: the standard deviation of the layer's mean |g| in a batch over its mean, NaN
        where there is one batch or no gradient.
    """
    by_layer = gradient_by_layer(rows)
    _, layer = np.unique(rows["layer_idx"], return_inverse=True)
    variance = grouped_mean(layer, np.zeros_like(layer), rows["std"] ** 2)[:, 0]
    return by_layer | {"std": np.sqrt(variance), "variation": _variation(batch_means(rows))}


def _variation(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviation over mean along the batches of ``[layers, batches]``; batches that are NaN do not count."""
    counts = np.isfinite(means).sum(axis=1)
    centre = np.nansum(means, axis=1) / counts
    squares = np.nansum((means - centre[:, None]) ** 2, axis=1)
    usable = (counts > 1) & (centre > 0)
    deviation = np.sqrt(squares / np.maximum(counts - 1, 1))
    return np.divide(deviation, centre, out=np.full(len(means), np.nan), where=usable)


def ratio_text(ratio: float | None) -> str:
    """A gradient ratio in words; None stands for an infinite one, as in JSON."""
    return f"{ratio:,.1f}" if ratio is not None and np.isfinite(ratio) else "infinite"


def gradient_report(rows: Columns, diagnosis: Diagnosis) -> str:
    """The content of `gradient_report.txt`: a line a layer, the ratio and its verdict, and the advice.

    Args:
        rows: the rows of `gradients/layers.parquet`.
        diagnosis: the plan's metadata under `diagnosis`.
    """
    if not len(rows["layer_idx"]):
        return "No gradients were collected.\n"
    table, ratio = layer_summary(rows), gradient_ratio(rows)
    smallest, largest = (int(table["layer_idx"][pick(table["mean_abs"])]) for pick in (np.argmin, np.argmax))
    lines = [
        "Gradients of the mean-token loss by layer, over its parameters and the batches.",
        "mean |g|: each parameter counts once. std: root mean square of the standard deviations inside parameters.",
        "variation: standard deviation over batches of the layer's mean |g|, over its mean.",
        "",
        f"{'layer':>5}{'mean |g|':>13}{'std':>13}{'variation':>13}",
        *(
            f"{layer:>5}{mean:>13.3e}{std:>13.3e}{f'{100 * share:.1f} %' if np.isfinite(share) else 'none':>13}"
            for layer, mean, std, share in zip(*table.values(), strict=True)
        ),
        "",
        f"smallest mean |g|: layer {smallest}; largest: layer {largest}",
        f"gradient ratio between layers: {ratio_text(ratio)} ({verdict(ratio)})",
        *_applied(diagnosis),
        *(f"advice: {' '.join(str(line).split())}" for line in diagnosis.get("advice", [])),
    ]
    return "\n".join(lines) + "\n"


def _applied(diagnosis: Diagnosis) -> list[str]:
    if diagnosis.get("fix", "none") == "none":
        return []
    after = ratio_text(diagnosis.get("gradient_ratio_after_fix"))
    return [f"fix applied by allocate: {diagnosis['fix']}; the ratio after it: {after}"]
