"""What allocation methods need beside the scores, read from the artifacts."""

from dataclasses import replace

import numpy as np

from libprune.architecture import Architecture
from libprune.artifacts import Columns, Layout, read_json, read_table, same_origin
from libprune.errors import ArtifactError
from libprune.levels import order_digest, unit_orders
from libprune.methods import Evidence
from libprune.search import divergence_curves
from libprune.sections import Allocate
from libprune.sensitivity import increases_of
from libprune.shards import read_meta, read_tensor


def read_evidence(layout: Layout, architecture: Architecture, scores: Columns, params: Allocate) -> Evidence:
    """What the chosen method and objective need; empty for those that need nothing.

    Raises:
        ArtifactError: if it is missing, or was measured on another model or with units in another order.
    """
    latency = None
    if params.objective == "latency":
        latency = read_json(layout.latency, "latency")
        same_origin(layout.latency, latency, {"model": architecture.fingerprint})
        if "unit" not in latency:
            raise ArtifactError(
                f"{layout.latency} holds no times, since the objective was another; run `dvc repro latency`"
            )
    return replace(_of_method(layout, architecture, scores, params), latency=latency)


def _of_method(layout: Layout, architecture: Architecture, scores: Columns, params: Allocate) -> Evidence:
    origin = {"model": architecture.fingerprint}
    if params.method == "functional":
        same_origin(layout.activations, read_meta(layout.activations, "activations"), origin)
        cosines = [
            float(read_tensor(layout.activations, layer, "block.cosine_mean", "activations"))
            for layer in range(architecture.layers)
        ]
        return Evidence(change=1 - np.array(cosines))
    if params.method == "hgsp":
        table, meta = read_table(layout.sensitivity, "sensitivity")
        same_origin(layout.sensitivity, meta, origin)
        if not len(table["removed"]):
            raise ArtifactError(
                f"{layout.sensitivity} holds nothing, since allocate.method was another; run `dvc repro sensitivity`"
            )
        return Evidence(sensitivity=increases_of(table))
    if params.method == "search":
        levels, meta = read_table(layout.levels, "levels")
        same_origin(layout.levels, meta, origin | {"order": order_digest(unit_orders(architecture, scores))})
        return Evidence(curves=divergence_curves(architecture, levels))
    return Evidence()
