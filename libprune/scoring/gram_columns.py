"""Per-unit columns that need the whole Gram matrix of a consumer's inputs, not only sums by unit."""

from dataclasses import asdict

import numpy as np

from libprune.engine.architecture import Architecture
from libprune.engine.errors import LibpruneError
from libprune.engine.surgery import oriented
from libprune.engine.tables import Columns, Values
from libprune.models.compute import PATIENCE
from libprune.models.folder import WeightFiles, own_model
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Score
from libprune.pipeline.shards import GRAM, ROUTED, read_tensor
from libprune.pipeline.terminal import Bar
from libprune.scoring.correlation import unit_graph
from libprune.scoring.obs import obs_removal, stack_removal


def read_gram_columns(layout: Layout, architecture: Architecture, params: Score, in_nats: bool) -> Columns:
    """The columns `obs` and `obs_share`: errors summed, and shares averaged, over the consumers of a block.

    Args:
        params: rounds and damping.
        in_nats: weight each output by half its mean squared gradient.

    Raises:
        ArtifactError: if statistics are missing.
        StatisticsError: if a damped Gram matrix is not positive definite.
    """
    weights = WeightFiles(own_model(layout, architecture))
    errors, shares = [], []
    for layer, part in Bar(list(architecture.blocks()), desc="score", unit="block", delay=PATIENCE):
        consumers = architecture.consumers(layer, part)
        units = architecture.units(part)
        error, share = np.zeros(units), np.zeros(units)
        for consumer in consumers:
            gram = read_tensor(layout.activations, consumer.layer, consumer.module + GRAM, "activations")
            square = f"{consumer.module}.output_gradient_square"
            curvature = read_tensor(layout.gradients, consumer.layer, square, "gradients") / 2 if in_nats else None
            of = consumer.input.units(architecture.parts[part].axis, architecture.sizes)
            weight, rounds = oriented(consumer, weights[consumer.weight]), min(params.obs_rounds, units)
            if consumer.stack:
                tokens = read_tensor(
                    layout.activations, consumer.layer, f"{consumer.module}{ROUTED}.frequency", "activations"
                )
                removal = stack_removal(weight, gram, tokens, of, rounds, params.obs_damping, curvature)
            else:
                removal = obs_removal(weight, gram, of, rounds, params.obs_damping, curvature)
            error, share = error + removal.error, share + removal.share / len(consumers)
        errors.append(error)
        shares.append(share)
    return {"obs": np.concatenate(errors), "obs_share": np.concatenate(shares)}


def require_one_text(architecture: Architecture) -> None:
    """Stop the criterion `cooperative` at a mixture, whose experts see different tokens.

    Raises:
        LibpruneError: saying so.
    """
    if architecture.experts is not None:
        raise LibpruneError(
            "the criterion cooperative compares inputs that the same tokens have, which those of different experts are "
            "not; choose another criterion for a mixture of experts"
        )


def graph_columns(layout: Layout, architecture: Architecture, params: Score) -> Columns:
    """The columns `unit_connection`, `unit_uniqueness`, `unit_centrality` and `unit_cooperation`.

    Each is the mean, over the consumers of a block, of an array of `libprune.scoring.correlation.UnitGraph`.

    Args:
        params: the threshold.

    Raises:
        LibpruneError: if statistics are missing, or the model is a mixture of experts.
    """
    require_one_text(architecture)
    weights = WeightFiles(own_model(layout, architecture))
    columns: dict[str, list[Values]] = {}
    for layer, part in Bar(list(architecture.blocks()), desc="score", unit="block", delay=PATIENCE):
        graphs = []
        for consumer in architecture.consumers(layer, part):
            name = consumer.module + GRAM
            graph = unit_graph(
                read_tensor(layout.activations, consumer.layer, name, "activations"),
                read_tensor(layout.activations, consumer.layer, f"{name}.mean", "activations"),
                oriented(consumer, weights[consumer.weight]),
                consumer.input.units(architecture.parts[part].axis, architecture.sizes),
                params.cooperative_threshold,
            )
            graphs.append(asdict(graph))
        for name in graphs[0]:
            columns.setdefault(f"unit_{name}", []).append(np.mean([graph[name] for graph in graphs], axis=0))
    return {name: np.concatenate(blocks) for name, blocks in columns.items()}
