"""Made-up tables for pictures and reports: gradients by layer, sensitivity, and plans."""

import numpy as np

from libprune.engine.tables import Columns

KINDS = ("self_attn.q_proj.weight", "input_layernorm.weight", "mlp.up_proj.weight")


def gradient_rows(layers: int, batches: int = 3, seed: int = 0) -> Columns:
    """Rows like those of `gradients/layers.parquet`: three parameters a layer, gradients larger in later layers."""
    rng = np.random.default_rng(seed)
    index = [(layer, kind, batch) for layer in range(layers) for kind in KINDS for batch in range(batches)]
    layer, kind, batch = (np.array(values) for values in zip(*index, strict=True))
    mean_abs = 1e-6 * np.exp(layer / 10) * rng.lognormal(0, 0.5, len(layer))
    part = np.where(kind == KINDS[2], "mlp", "attention").astype(object)
    sizes = {"mean_abs": mean_abs, "std": 2 * mean_abs, "norm": 30 * mean_abs}
    return {"layer_idx": layer, "group_type": part, "parameter": kind.astype(object), "batch": batch, **sizes}


def sensitivity_rows(layers: int, seed: int = 0) -> Columns:
    """Rows like those of `sensitivity.parquet`, some increases below zero."""
    removed = np.array(["layer", "attention", "mlp"] * layers, dtype=object)
    increase = np.random.default_rng(seed).normal(0.2, 0.3, len(removed))
    errors = np.full(len(removed), 0.01)
    layer = np.repeat(np.arange(layers), 3)
    return {"layer_idx": layer, "removed": removed, "loss_increase": increase, "standard_error": errors}


def without_layer(rows: Columns, layer: int = 0) -> Columns:
    """The rows with zeros in the place of one layer's gradients."""
    here = rows["layer_idx"] == layer
    return rows | {name: np.where(here, 0.0, rows[name]) for name in ("mean_abs", "std", "norm")}


def shortened(rows: Columns) -> Columns:
    """The rows without the last parameter of the last layer."""
    gone = (rows["layer_idx"] == rows["layer_idx"].max()) & (rows["parameter"] == KINDS[-1])
    return {name: values[~gone] for name, values in rows.items()}


PLAN_META = {
    "ratio": 0.3,
    "ratio_of": "decoder",
    "objective": "parameters",
    "criterion": "taylor_2nd",
    "rank_by": "score",
}
"""Metadata that the pictures of a plan read."""


def plan_rows(layers: int, values: np.ndarray, removed: float = 0.3) -> Columns:
    """A plan that removes the lowest of the scores, three attention groups a layer; ``values`` repeat as needed."""
    parts = ["attention"] * 3 + ["mlp"] * 7
    score = np.resize(values.astype(float), layers * len(parts))
    keep = np.argsort(np.argsort(score, kind="stable")) >= removed * len(score)
    layer = np.repeat(np.arange(layers), len(parts))
    return {"layer_idx": layer, "group_type": np.array(parts * layers, dtype=object), "score": score, "keep": keep}


def block_rows(table: Columns) -> list[np.ndarray]:
    """The row numbers of each block of a per-unit table."""
    keys = list(zip(table["layer_idx"], table["group_type"], strict=True))
    return [np.array([i for i, key in enumerate(keys) if key == wanted]) for wanted in sorted(set(keys))]
