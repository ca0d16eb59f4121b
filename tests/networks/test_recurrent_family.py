"""Recurrent language models, pruned: their families, and the way there from torch.nn.LSTM."""

import pytest
import torch
from torch import Tensor, nn

from libprune.networks import Network, NetworkFamily
from libprune.networks.recurrent import RecurrentLM, from_torch
from libprune.networks.recurrent_family import family
from libprune.pipeline.sections import Allocate, Score
from tests.support.networks import CASES, LSTM, MIXED, recurrent_lm


def test_the_family_of_a_model_is_what_one_writes_by_hand():
    assert family(recurrent_lm(0.0)) == NetworkFamily.read(LSTM)
    assert family(recurrent_lm(0.5)) == NetworkFamily(**MIXED)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_with_the_embedding_its_features_go_too_and_without_none_of_them(ratio, tmp_path):
    model, samples = recurrent_lm(ratio).eval(), CASES["lstm"].samples()
    for embedding in (False, True):
        network = Network(model, family(model, embedding), samples, tmp_path / str(embedding))
        pruned = network.prune(network.plan(Score(criterion="magnitude"), Allocate(ratio=0.5)))
        assert (pruned.network.embedding.embedding_dim < 5) == embedding
        assert pruned.parameters == sum(weight.numel() for weight in pruned.network.parameters())


class Torch(nn.Module):
    """A language model of torch.nn.LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(7, 5), nn.LSTM(5, 6, 2, batch_first=True)
        self.decoder = nn.Linear(6, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(self.lstm(self.embedding(ids))[0])


@pytest.mark.parametrize("repair", ["none", "local", "sequential"])
def test_a_model_of_torchs_lstm_is_converted_and_pruned(repair, tmp_path):
    torch.manual_seed(0)
    dense, samples = Torch().eval(), CASES["lstm"].samples()
    model = RecurrentLM(7, 5, 6, 2)
    model.embedding, model.layers, model.decoder = dense.embedding, from_torch(dense.lstm), dense.decoder
    torch.testing.assert_close(model.eval()(samples.inputs), dense(samples.inputs))
    network = Network(model, family(model), samples, tmp_path / "work")
    pruned = network.prune(network.plan(Score(criterion="unit_fisher"), Allocate(ratio=0.4)), repair)
    layers = [layer.hidden for layer in pruned.network.layers]
    assert layers == [pruned.plan.kept(0, axis) for axis in ("h0", "h1")]
    assert max(layers) < 6
    assert pruned.network.step(samples.inputs)[0].shape == (24, 5, 7)


def test_a_unit_that_another_repeats_goes_without_loss(tmp_path):
    """A LIF unit and an LSTM unit, each with a twin of the same input and recurrent weights."""
    model = recurrent_lm(0.5).eval()
    with torch.no_grad():
        for layer in model.layers:
            for name, size in (("gates", 3), ("current", 3)):
                read, recurrent = (layer.get_submodule(f"{name}_{kind}") for kind in ("input", "recurrent"))
                for tensor in (read.weight, read.bias, recurrent.weight):
                    tensor[1::size] = tensor[::size]
    network = Network(model, family(model), CASES["mixed"].samples(64), tmp_path / "work")
    plan = network.plan(Score(criterion="random"), Allocate(ratio=0.1))
    for block in network.architecture.blocks():
        plan.keep[block][:] = True
        plan.keep[block][1] = False
    fresh = CASES["mixed"].samples(10, seed=5).inputs
    with torch.no_grad():
        expected, scale = model(fresh), float(model(fresh).abs().max())
        found = network.prune(plan, "local", damping=1e-7).network(fresh)
        without = network.prune(plan, "none").network(fresh)
    assert float((found - expected).abs().max()) < 1e-3 * scale
    assert float((without - expected).abs().max()) > 0.02 * scale
