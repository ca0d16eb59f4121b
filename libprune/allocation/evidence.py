"""Reading what an allocation needs beside the scores from the artifacts."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.allocation.hgsp import Increases
from libprune.allocation.methods import Evidence, Order
from libprune.engine.architecture import RESIDUAL, Architecture, Block
from libprune.engine.errors import ArtifactError
from libprune.engine.tables import Columns
from libprune.pipeline.artifacts import Scores, read_json, read_table, same_origin
from libprune.pipeline.layout import Layout
from libprune.pipeline.methods import METHODS, allocation_reads
from libprune.pipeline.sections import Allocate
from libprune.statistics.depth import order_identity, order_of, read_change
from libprune.statistics.levels import order_digest, unit_orders
from libprune.statistics.sensitivity import increases_of, removals


def read_evidence(layout: Layout, scores: Scores, params: Allocate) -> Evidence:
    """What the chosen method, worth and objective need, by the artifact that it comes from.

    Args:
        layout: of the artifacts.
        scores: the importance table; its metadata name the model and, where a text was used, the tokens.
        params: what is asked for.

    Raises:
        ArtifactError: if it is missing, or was measured on another model or text, or with units in another order.
    """
    needed = allocation_reads(params.method, params.worth, params.times, params.evaluations, params.depth)
    evidence = {artifact: READERS[artifact](layout, scores) for artifact in needed if artifact in READERS}
    evidence |= {"depth": read_order(layout, scores, params)} if "depth" in needed else {}
    narrowed = params.width is not None and METHODS[params.method].programme
    return evidence | ({"width": read_widths(layout, scores)} if narrowed else {})


def read_layer_change(layout: Layout, scores: Scores) -> NDArray[np.float64]:
    """1 - cosine between the input and the output of each layer, mean over tokens, ``[layers]``.

    Raises:
        ArtifactError: if it is missing, or was measured on another model or text.
    """
    return read_change(layout, scores.architecture.layers, scores.origin)


def read_order(layout: Layout, scores: Scores, params: Allocate) -> Order:
    """The order in which whole layers or parts go, with the divergence after each, nats.

    Raises:
        ArtifactError: if it is missing, or was measured on another model or text, in another way, or with other layers
            frozen.
    """
    table, meta = read_table(layout.depth, "depth")
    asked = order_identity(params.depth, (params.freeze_first, params.freeze_last))
    same_origin(layout.depth, meta, {**scores.origin, **asked})
    return order_of(scores.architecture, table)


def read_increases(layout: Layout, scores: Scores) -> Increases:
    """The measured loss increases of removing layers and blocks, ``[layers]`` each, nats.

    Raises:
        ArtifactError: if they are missing, or were measured on another model or text.
    """
    table, meta = read_table(layout.sensitivity, "sensitivity")
    measured = list(zip(table["layer_idx"].tolist(), table["removed"].tolist(), strict=True))
    if measured != removals(scores.architecture):
        raise ArtifactError(
            f"{layout.sensitivity} does not hold every layer and block of this model, as when no "
            "param asked for them; run `dvc repro sensitivity`"
        )
    same_origin(layout.sensitivity, meta, scores.origin)
    return increases_of(table)


def read_curves(layout: Layout, scores: Scores) -> Mapping[Block, NDArray[np.float64]]:
    """For every block the measured divergence by the number of units removed, ``[units + 1]``, nats.

    Raises:
        ArtifactError: if it is missing, or was measured on another model or text, or with units in another order.
    """
    levels, meta = read_table(layout.levels, "levels")
    order = order_digest(unit_orders(scores.architecture, scores.table))
    same_origin(layout.levels, meta, scores.origin | {"order": order})
    return divergence_curves(scores.architecture, levels)


def divergence_curves(architecture: Architecture, levels: Columns) -> dict[Block, NDArray[np.float64]]:
    """For every block the divergence by the number of units removed, ``[units + 1]``, nats.

    Measured levels are made non-decreasing (what is measured below an earlier level is noise) and
    joined by straight lines from 0 without a removal.
    """
    curves = {}
    for layer, part in architecture.blocks():
        rows = (levels["layer_idx"] == layer) & (levels["group_type"] == part)
        order = np.argsort(levels["removed"][rows])
        removed, measured = levels["removed"][rows][order], levels["divergence"][rows][order]
        rising = np.maximum.accumulate(np.maximum(measured, 0.0))
        counts = np.arange(architecture.units(part) + 1)
        curves[layer, part] = np.interp(counts, [0, *removed], [0.0, *rising])
    return curves


def read_widths(layout: Layout, scores: Scores) -> Mapping[int, float]:
    """The measured divergence by the columns of the residual stream that stay, nats; 0 where all do.

    Raises:
        ArtifactError: if it is missing, or was measured on another model or text.
    """
    table, meta = read_table(layout.widths, "width")
    same_origin(layout.widths, meta, scores.origin)
    measured = zip(table["width"].tolist(), table["divergence"].tolist(), strict=True)
    return {scores.architecture.sizes[RESIDUAL]: 0.0, **dict(measured)}


def read_latency(layout: Layout, scores: Scores) -> Mapping[str, Any]:
    """The straight lines fitted to the measured times of a layer.

    Raises:
        ArtifactError: if they are missing, or were measured for another model.
    """
    latency = read_json(layout.latency, "latency")
    same_origin(layout.latency, latency, {"model": scores.meta["model"]})
    if "unit" not in latency:
        raise ArtifactError(
            f"{layout.latency} holds no times, since the objective was another; run `dvc repro latency`"
        )
    return latency


READERS: dict[str, Callable[[Layout, Scores], Any]] = {
    "activations": read_layer_change,
    "sensitivity": read_increases,
    "levels": read_curves,
    "latency": read_latency,
}
"""The function that reads each artifact for allocation, by its name; the order of whole removals depends on params."""
