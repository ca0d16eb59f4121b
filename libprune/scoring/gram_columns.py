"""Per-unit columns that need a consumer's whole Gram matrix, not only sums by unit."""

from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from libprune.engine.architecture import Architecture
from libprune.engine.surgery import oriented
from libprune.engine.tables import Columns
from libprune.models.compute import PATIENCE
from libprune.models.folder import WeightFiles
from libprune.pipeline.artifacts import require
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Score
from libprune.pipeline.shards import GRAM, read_tensor
from libprune.scoring.correlation import unit_graph
from libprune.scoring.obs import obs_removal


def gram_columns(layout: Layout, architecture: Architecture, params: Score, in_nats: bool) -> Columns:
    """`obs` and `obs_share` of every unit, summed and averaged over a part's consumers.

    Args:
        layout: where the artifacts are.
        architecture: the model's description.
        params: rounds and damping.
        in_nats: weight each output by half its mean squared gradient.
    """
    weights = WeightFiles(require(layout.model, "prepare"))
    errors, shares = [], []
    for layer, part in tqdm(list(architecture.blocks()), desc="score", unit="block", delay=PATIENCE):
        consumers = architecture.consumers(layer, part)
        units = architecture.units(part)
        error, share = np.zeros(units), np.zeros(units)
        for consumer in consumers:
            gram = read_tensor(layout.activations, layer, consumer.module + GRAM, "activations")
            square = f"{consumer.module}.output_gradient_square"
            curvature = read_tensor(layout.gradients, layer, square, "gradients") / 2 if in_nats else None
            found = obs_removal(
                oriented(consumer, weights[consumer.weight]),
                gram,
                consumer.input.units(architecture.parts[part].axis, architecture.sizes),
                min(params.obs_rounds, units),
                params.obs_damping,
                curvature,
            )
            error, share = error + found.error, share + found.share / len(consumers)
        errors.append(error)
        shares.append(share)
    return {"obs": np.concatenate(errors), "obs_share": np.concatenate(shares)}


def graph_columns(layout: Layout, architecture: Architecture, params: Score) -> Columns:
    """`unit_connection`, `unit_uniqueness`, `unit_centrality` and `unit_cooperation` of every unit.

    Means over a part's consumers of what `libprune.scoring.correlation.UnitGraph` says of each.

    Args:
        layout: where the artifacts are.
        architecture: the model's description.
        params: the threshold.
    """
    weights = WeightFiles(require(layout.model, "prepare"))
    found: dict[str, list[NDArray[np.float64]]] = {}
    for layer, part in tqdm(list(architecture.blocks()), desc="score", unit="block", delay=PATIENCE):
        graphs = []
        for consumer in architecture.consumers(layer, part):
            name = consumer.module + GRAM
            graph = unit_graph(
                read_tensor(layout.activations, layer, name, "activations"),
                read_tensor(layout.activations, layer, f"{name}.mean", "activations"),
                oriented(consumer, weights[consumer.weight]),
                consumer.input.units(architecture.parts[part].axis, architecture.sizes),
                params.cooperative_threshold,
            )
            graphs.append(asdict(graph))
        for name in graphs[0]:
            found.setdefault(f"unit_{name}", []).append(np.mean([graph[name] for graph in graphs], axis=0))
    return {name: np.concatenate(blocks) for name, blocks in found.items()}
