"""Recurrent language models, pruned: their families, the way there from torch.nn.LSTM, and the example's comparison."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from examples import recurrent as example
from examples.byte_text import BYTES, split
from examples.recurrent_comparison import REFERENCE, SETTINGS, Calibration, Judge, Result, network_type, table
from examples.recurrent_training import save
from libprune.engine.errors import SourceError
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


@pytest.mark.parametrize(("ratio", "kind"), [(0.0, "rnn"), (0.5, "mixed"), (1.0, "snn")])
def test_the_kind_of_a_model_is_told_by_its_units(ratio, kind):
    assert network_type(recurrent_lm(ratio)) == kind


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=20)
def test_calibration_sequences_are_pieces_of_the_training_part_with_the_bytes_that_follow(sequences, length, seed):
    training = split(torch.arange(40)).training
    samples = Calibration(sequences, length).draw(training, seed)
    assert samples.inputs.shape == (sequences, length)
    assert torch.equal(samples.targets, samples.inputs + 1)
    assert torch.equal(samples.inputs, samples.inputs[:, :1] + torch.arange(length))
    assert int(samples.targets.max()) <= int(training[-1])
    assert torch.equal(Calibration(sequences, length).draw(training, seed).inputs, samples.inputs)


def test_a_training_part_shorter_than_a_sequence_is_refused():
    with pytest.raises(SourceError, match="32 bytes, too few for sequences of 32"):
        Calibration(8, 32).draw(split(torch.arange(40)).training, 0)


def test_the_judge_reads_the_evaluation_part_as_streams_whose_state_goes_on():
    torch.manual_seed(0)
    model, ids = recurrent_lm(0.0), torch.randint(7, (2000,))
    judge = Judge.of(split(ids), 4, 160)
    whole = ids[1800:1960].view(4, 40)
    expected = nn.functional.cross_entropy(model.eval()(whole[:, :-1]).flatten(0, 1), whole[:, 1:].flatten())
    assert Judge(judge.text, 7).loss(model) == pytest.approx(judge.loss(model), rel=1e-6)
    assert judge.loss(model) == pytest.approx(expected.item(), rel=1e-6)


def test_the_table_has_intervals_over_seeds_and_factors_of_the_same_seeds():
    kept = {"h0": (3, 6)}
    results = [Result(*REFERENCE, seed, 2.0 + seed, 100, kept) for seed in range(3)]
    results += [Result("random", "uniform", seed, 3 * (2.0 + seed), 90 + seed, kept) for seed in range(3)]
    one, other = table(results).splitlines()[2:]
    mean = math.exp((math.log(2) + math.log(3) + math.log(4)) / 3)
    assert f"× {mean:.3f} (" in one
    assert "| 3.000 (3.000 to 3.000) | 91 | h0 3/6 |" in other


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a tiny mixed model of bytes, and a text for it."""
    root = tmp_path_factory.mktemp("recurrent")
    (root / "text.txt").write_text("so und so und anders\n" * 60)
    config = {"vocab": BYTES, "embedding": 4, "hidden": 8, "layers": 2, "snn_ratio": 0.5, "dropout": 0.0}
    torch.manual_seed(0)
    model = RecurrentLM(**config)
    for layer in model.layers:
        nn.init.normal_(layer.current_input.weight, 0, 2)
    save(copy.deepcopy(model), config, root / "model")
    return root


def compared(folder, *options: str):
    sizes = ["--sequences", "16", "--length", "6", "--batch", "2", "--seeds", "1"]
    return CliRunner().invoke(
        example.app, ["compare", str(folder / "model"), "--text", str(folder / "text.txt"), *sizes, *options]
    )


def test_the_command_prunes_by_every_setting_to_the_same_number_of_parameters(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    done = compared(folder, "--ratio", "0.2", "--repair", "local")
    assert done.exit_code == 0, done.output
    head, _, _, *rows = done.stdout.splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [tuple(row[:2]) for row in cells] == list(SETTINGS)
    dense = sum(weight.numel() for weight in RecurrentLM(BYTES, 4, 8, 2, 0.5).parameters())
    assert f"{dense:,} parameters" in head
    assert all(0.8 * dense - 1 <= int(row[4].replace(",", "")) < 0.9 * dense for row in cells)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ratio", "0.99"], "cannot be removed"),
        (["--length", "5000"], "too few for sequences of 5000"),
        (["--batch", "900"], "too few for 900 streams"),
        (["--repair", "bias"], "bias"),
        (["--ratio", "1.5"], "--ratio"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_what_was_found(options, said, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    done = compared(folder, *options)
    assert done.exit_code > 0
    assert said in done.output
    assert "Traceback" not in done.output
