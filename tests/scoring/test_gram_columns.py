"""Columns from Gram matrices, read from shards, against the functions of one consumer."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from libprune.engine.architecture import Architecture, Map
from libprune.engine.describe_module import describe_module
from libprune.engine.errors import ArtifactError
from libprune.engine.surgery import oriented
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Score
from libprune.pipeline.shards import GRAM, read_tensor, write_shard
from libprune.scoring.correlation import unit_graph
from libprune.scoring.gram_columns import graph_columns, read_gram_columns
from libprune.scoring.obs import obs_removal
from tests.support.networks import CASES

PARAMS = Score(obs_rounds=3, cooperative_threshold=0.2)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return CASES["recurrent"].network()


@pytest.fixture(scope="module")
def architecture(network) -> Architecture:
    """A network of which one part has several consumers, some with columns of other parts."""
    architecture = describe_module(network, CASES["recurrent"].family, CASES["recurrent"].samples(2).inputs, "here")
    assert max(len(architecture.consumers(*block)) for block in architecture.blocks()) > 1
    return architecture


@pytest.fixture(scope="module")
def layout(tmp_path_factory, network, architecture) -> Layout:
    """The weights, and made-up inputs of every consumer."""
    layout, generator = Layout(tmp_path_factory.mktemp("artifacts")), torch.Generator().manual_seed(0)
    layout.model.mkdir()
    save_file(dict(network.state_dict()), layout.model / "model.safetensors")
    grams, squares = {}, {}
    for entry in architecture.maps:
        x = torch.randn(60, entry.input.size(architecture.sizes), generator=generator)
        x = x @ torch.randn(x.shape[1], x.shape[1], generator=generator)
        grams |= {entry.module + GRAM: x.T @ x / len(x), f"{entry.module}{GRAM}.mean": x.mean(0)}
        width = entry.output.size(architecture.sizes)
        squares[f"{entry.module}.output_gradient_square"] = torch.rand(width, generator=generator)
    for folder, tensors in ((layout.activations, grams), (layout.gradients, squares)):
        folder.mkdir()
        write_shard(folder, 0, tensors, {"model": "here"})
    return layout


def parts_of(architecture: Architecture, network: torch.nn.Module, layout: Layout, consumer: Map, part: str) -> tuple:
    """A consumer's weight, Gram matrix, and the unit of each input."""
    weight = oriented(consumer, network.get_parameter(consumer.weight).detach())
    gram = read_tensor(layout.activations, 0, consumer.module + GRAM, "activations")
    return weight, gram, consumer.input.units(architecture.parts[part].axis, architecture.sizes)


@pytest.mark.parametrize("in_nats", [False, True])
def test_errors_are_summed_and_shares_averaged_over_consumers(layout, network, architecture, in_nats):
    columns = read_gram_columns(layout, architecture, PARAMS, in_nats)
    errors, shares = [], []
    for block in architecture.blocks():
        costs = []
        for consumer in architecture.consumers(*block):
            weight, gram, units = parts_of(architecture, network, layout, consumer, block[1])
            name = f"{consumer.module}.output_gradient_square"
            factors = read_tensor(layout.gradients, 0, name, "gradients") / 2 if in_nats else None
            costs.append(obs_removal(weight, gram, units, 3, PARAMS.obs_damping, factors))
        errors.append(np.sum([cost.error for cost in costs], axis=0))
        shares.append(np.mean([cost.share for cost in costs], axis=0))
    np.testing.assert_allclose(columns["obs"], np.concatenate(errors))
    np.testing.assert_allclose(columns["obs_share"], np.concatenate(shares))


def test_the_graph_is_the_mean_of_those_at_the_consumers(layout, network, architecture):
    columns, expected = graph_columns(layout, architecture, PARAMS), {}
    for block in architecture.blocks():
        graphs = []
        for consumer in architecture.consumers(*block):
            weight, gram, units = parts_of(architecture, network, layout, consumer, block[1])
            mean = read_tensor(layout.activations, 0, f"{consumer.module}{GRAM}.mean", "activations")
            graphs.append(asdict(unit_graph(gram, mean, weight, units, PARAMS.cooperative_threshold)))
        for name in graphs[0]:
            expected.setdefault(f"unit_{name}", []).append(sum(graph[name] for graph in graphs) / len(graphs))
    assert columns.keys() == expected.keys()
    for name, blocks in expected.items():
        np.testing.assert_allclose(columns[name], np.concatenate(blocks))


def test_statistics_that_were_not_collected_are_named(layout, architecture, tmp_path):
    empty = Layout(tmp_path)
    empty.model.symlink_to(layout.model)
    with pytest.raises(ArtifactError, match="run `dvc repro activations`"):
        graph_columns(empty, architecture, PARAMS)
