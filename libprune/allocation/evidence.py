"""What allocation methods need beside the scores, read from the artifacts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.allocation.hgsp import Increases
from libprune.allocation.knapsack import divergence_curves
from libprune.allocation.methods import Evidence
from libprune.engine.architecture import Architecture
from libprune.engine.errors import ArtifactError
from libprune.engine.tables import Columns
from libprune.pipeline.artifacts import read_json, read_table, same_origin
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Allocate
from libprune.pipeline.shards import read_meta, read_tensor
from libprune.statistics.levels import order_digest, unit_orders
from libprune.statistics.sensitivity import increases_of, removals


def read_evidence(
    layout: Layout, architecture: Architecture, scores: Columns, meta: Mapping[str, Any], params: Allocate
) -> Evidence:
    """What the chosen method and objective need; empty for those that need nothing.

    Args:
        layout: of the artifacts.
        architecture: the model's description.
        scores: the importance table.
        meta: its metadata, which name the model and, where a text was used, the tokens.
        params: what is asked for.

    Raises:
        ArtifactError: if it is missing, or was measured on another model or text, or with units in another order.
    """
    latency = None
    if params.objective == "latency":
        latency = read_json(layout.latency, "latency")
        same_origin(layout.latency, latency, {"model": meta["model"]})
        if "unit" not in latency:
            raise ArtifactError(
                f"{layout.latency} holds no times, since the objective was another; run `dvc repro latency`"
            )
    return replace(_of_method(layout, architecture, scores, origin_of(meta), params), latency=latency)


def origin_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The model and, where a text was used, the tokens that scores come from."""
    return {key: meta[key] for key in ("model", "tokens") if key in meta}


def _of_method(
    layout: Layout, architecture: Architecture, scores: Columns, origin: dict[str, Any], params: Allocate
) -> Evidence:
    if params.method == "functional":
        return Evidence(change=read_change(layout, architecture, origin))
    if params.method == "hgsp":
        return Evidence(sensitivity=read_increases(layout, architecture, origin))
    if params.method == "search":
        levels, meta = read_table(layout.levels, "levels")
        same_origin(layout.levels, meta, origin | {"order": order_digest(unit_orders(architecture, scores))})
        change = read_change(layout, architecture, origin) if params.evaluations else None
        return Evidence(curves=divergence_curves(architecture, levels), change=change)
    return Evidence()


def read_change(layout: Layout, architecture: Architecture, origin: Mapping[str, Any]) -> NDArray[np.float64]:
    """1 - cosine between the input and the output of each layer, mean over tokens, ``[layers]``.

    Raises:
        ArtifactError: if it is missing, or was measured on another model or text.
    """
    same_origin(layout.activations, read_meta(layout.activations, "activations"), origin)
    cosines = [
        float(read_tensor(layout.activations, layer, "block.cosine_mean", "activations"))
        for layer in range(architecture.layers)
    ]
    return 1 - np.array(cosines)


def read_increases(layout: Layout, architecture: Architecture, origin: Mapping[str, Any]) -> Increases:
    """The measured loss increases of removing layers and blocks, ``[layers]`` each, nats.

    Raises:
        ArtifactError: if they are missing, or were measured on another model or text.
    """
    table, meta = read_table(layout.sensitivity, "sensitivity")
    if list(zip(table["layer_idx"].tolist(), table["removed"].tolist(), strict=True)) != removals(architecture):
        raise ArtifactError(
            f"{layout.sensitivity} does not hold every layer and block of this model, as when no "
            "param asked for them; run `dvc repro sensitivity`"
        )
    same_origin(layout.sensitivity, meta, origin)
    return increases_of(table)
