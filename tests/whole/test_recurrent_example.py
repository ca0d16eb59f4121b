"""The comparison of the recurrent example: calibration, judge and table, and its command on a tiny model of bytes."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from examples import recurrent as example
from examples.byte_text import BYTES, split
from examples.recurrent_comparison import REFERENCE, SETTINGS, Calibration, Judge, Result, network_type, table
from examples.recurrent_training import save
from libprune.engine.errors import SourceError
from libprune.networks.recurrent import RecurrentLM
from tests.support.networks import recurrent_lm


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
