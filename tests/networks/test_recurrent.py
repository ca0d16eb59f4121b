"""Recurrent networks of explicit maps: against torch's LSTM and LIF units written out, cut in time and in width."""

import copy
import json
import math
import pickle
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from examples import byte_text, recurrent_training
from examples import recurrent as example
from libprune.engine.errors import ArtifactError, NetworkError, SourceError
from libprune.networks.recurrent import BETA, THRESHOLD, RecurrentLayer, RecurrentLM, detached, from_torch

SIZES = st.integers(1, 6)
RATIOS = pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])


def layer_of(hidden: int, spiking: int, inputs: int = 4, seed: int = 0) -> RecurrentLayer:
    """A layer in float64, whose LIF units fire often."""
    if spiking:
        pytest.importorskip("snntorch")
    torch.manual_seed(seed)
    layer = RecurrentLayer(inputs, hidden, spiking).double()
    if spiking:
        nn.init.normal_(layer.current_input.weight)
    return layer


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(layers: nn.ModuleList, values: Tensor) -> Tensor:
    for layer in layers:
        values, _ = layer(values)
    return values


@given(inputs=SIZES, hidden=SIZES, depth=st.integers(1, 3), batch=SIZES, time=SIZES, bias=st.booleans())
@settings(max_examples=20)
def test_converted_layers_compute_what_torchs_lstm_does(inputs, hidden, depth, batch, time, bias):
    torch.manual_seed(0)
    lstm = nn.LSTM(inputs, hidden, depth, bias=bias, batch_first=True).double()
    values = numbers(batch, time, inputs)
    torch.testing.assert_close(run(from_torch(lstm), values), lstm(values)[0], rtol=0, atol=1e-12)


def test_converted_layers_get_torchs_gradient_and_share_no_weight_with_it():
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4, 2, batch_first=True).double()
    layers, values = from_torch(lstm), numbers(2, 5, 3)
    run(layers, values).square().sum().backward()
    lstm(values)[0].square().sum().backward()
    for layer, (read, recurrent, bias, _) in zip(layers, lstm.all_weights, strict=True):
        torch.testing.assert_close(layer.gates_input.weight.grad, read.grad)
        torch.testing.assert_close(layer.gates_recurrent.weight.grad, recurrent.grad)
        torch.testing.assert_close(layer.gates_input.bias.grad, bias.grad)
        assert layer.gates_input.weight.data_ptr() != read.data_ptr()


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (nn.GRU(2, 3), "GRU"),
        (nn.LSTM(2, 3, bidirectional=True), "bidirectional"),
        (nn.LSTM(2, 3, proj_size=2), "proj_size=2"),
    ],
    ids=["gru", "bidirectional", "projected"],
)
def test_what_cannot_be_converted_is_refused_by_name(module, named):
    with pytest.raises(NetworkError, match=named):
        from_torch(module)


@given(batch=SIZES, time=st.integers(1, 12), units=SIZES, seed=st.integers(0, 99))
def test_spiking_units_follow_the_recurrence_written_out(batch, time, units, seed):
    layer = layer_of(0, units, seed=seed)
    values = numbers(batch, time, 4, seed=seed)
    read, bias, recurrent = layer.current_input.weight, layer.current_input.bias, layer.current_recurrent.weight
    beta, threshold = layer.neuron.beta.item(), layer.neuron.threshold.item()
    potential = spikes = torch.zeros(batch, units, dtype=torch.float64)
    expected = []
    for x in values.unbind(1):
        potential = beta * potential + x @ read.T + bias + spikes @ recurrent.T - threshold * spikes
        spikes = (potential > threshold).double()
        expected.append(spikes)
    found, state = layer(values)
    torch.testing.assert_close(found, torch.stack(expected, 1))
    torch.testing.assert_close(state.membrane, potential)
    assert beta == pytest.approx(BETA)
    assert threshold == THRESHOLD


def test_a_spike_has_the_gradient_of_a_fast_sigmoid():
    layer = layer_of(0, 3)
    values = numbers(2, 1, 4)
    outputs, state = layer(values)
    outputs.sum().backward()
    slope = (1 + 25 * (state.membrane - THRESHOLD).abs()) ** -2
    torch.testing.assert_close(layer.current_input.bias.grad, slope.sum(0))


def cut(linear: nn.Linear, rows: Tensor, columns: Tensor) -> nn.Linear:
    """The given rows and columns of a map; a row that is not there has no bias either."""
    narrow = copy.deepcopy(linear)
    narrow.weight = nn.Parameter(linear.weight[rows][:, columns])
    if linear.bias is not None:
        narrow.bias = nn.Parameter(linear.bias[rows])
    return narrow


def masked(model: RecurrentLM, kept: list[Tensor]) -> RecurrentLM:
    """The model with a zero at every map that reads a unit that is not kept."""
    model = copy.deepcopy(model)
    readers = [layer.gates_input for layer in model.layers[1:]] + [model.decoder]
    more = [getattr(layer, "current_input", None) for layer in model.layers[1:]] + [None]
    for layer, units, *reading in zip(model.layers, kept, readers, more, strict=True):
        for reader in [layer.gates_recurrent, getattr(layer, "current_recurrent", None), *reading]:
            if reader is not None:
                reader.weight.data[:, ~units] = 0
    return model


def sliced(model: RecurrentLM, kept: list[Tensor]) -> RecurrentLM:
    """The model without the units that are not kept."""
    model, columns = copy.deepcopy(model), torch.ones(model.embedding.embedding_dim, dtype=torch.bool)
    for layer, units in zip(model.layers, kept, strict=True):
        hidden = layer.hidden
        rows = units[:hidden].repeat(4)
        layer.gates_input = cut(layer.gates_input, rows, columns)
        layer.gates_recurrent = cut(layer.gates_recurrent, rows, units)
        if layer.spiking:
            layer.current_input = cut(layer.current_input, units[hidden:], columns)
            layer.current_recurrent = cut(layer.current_recurrent, units[hidden:], units)
        columns = units
    model.decoder = cut(model.decoder, torch.ones(len(model.decoder.weight), dtype=torch.bool), columns)
    return model


def lm_of(snn_ratio: float, seed: int = 0) -> RecurrentLM:
    """A model of two layers of 8 units in float64, whose LIF units fire often."""
    if snn_ratio:
        pytest.importorskip("snntorch")
    torch.manual_seed(seed)
    model = RecurrentLM(11, 5, 8, 2, snn_ratio).double()
    for layer in model.layers:
        if layer.spiking:
            nn.init.normal_(layer.current_input.weight)
    return model


def ids_of(batch: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(11, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@given(data=st.data())
@settings(max_examples=20)
def test_a_model_of_narrower_maps_computes_what_zeros_at_the_readers_leave(ratio, data):
    model = lm_of(ratio)
    some = st.lists(st.booleans(), min_size=8, max_size=8).filter(any)
    kept = [torch.tensor(data.draw(some)) for _ in model.layers]
    narrow, ids = sliced(model, kept), ids_of(3, 6)
    assert [layer.hidden + layer.spiking for layer in narrow.layers] == [int(units.sum()) for units in kept]
    torch.testing.assert_close(narrow(ids), masked(model, kept)(ids))


@RATIOS
@pytest.mark.parametrize("cut_at", [1, 4, 8])
def test_two_pieces_of_a_text_one_after_the_other_give_what_the_whole_does(ratio, cut_at):
    model, ids = lm_of(ratio), ids_of(3, 9)
    whole = model(ids)
    first, state = model.step(ids[:, :cut_at])
    second, _ = model.step(ids[:, cut_at:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    expected = torch.autograd.grad(whole.square().sum(), model.embedding.weight)[0]
    found = torch.autograd.grad(first.square().sum() + second.square().sum(), model.embedding.weight)[0]
    torch.testing.assert_close(found, expected)


@RATIOS
def test_a_detached_state_has_the_values_and_ends_the_gradient(ratio):
    model, ids = lm_of(ratio), ids_of(2, 8)
    _, state = model.step(ids[:, :4])
    torch.testing.assert_close(model.step(ids[:, 4:], detached(state))[0], model.step(ids[:, 4:], state)[0])
    assert not any(tensor.requires_grad for layer in detached(state) for tensor in layer)


@RATIOS
def test_the_units_of_each_kind_are_counted_from_the_share(ratio):
    layers = lm_of(ratio).layers
    assert [(layer.hidden, layer.spiking) for layer in layers] == [(8 - round(8 * ratio), round(8 * ratio))] * 2
    assert [layer.gates_input.in_features for layer in layers if layer.hidden] == ([5, 8] if ratio < 1 else [])


@RATIOS
def test_a_model_that_has_run_can_be_copied_and_pickled_and_computes_the_same(ratio):
    model, ids = lm_of(ratio), ids_of(2, 5)
    expected = model(ids)
    assert torch.equal(copy.deepcopy(model)(ids), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), expected)


@RATIOS
def test_no_tensor_but_the_maps_has_an_axis_of_units(ratio):
    model = lm_of(ratio)
    model(ids_of(2, 5))
    assert all(buffer.numel() <= 1 for buffer in model.buffers())
    assert {name.rpartition(".")[2] for name, _ in model.named_parameters()} == {"weight", "bias"}


@RATIOS
def test_half_precision_runs_and_stays_half_precision(ratio):
    assert lm_of(ratio).to(torch.bfloat16)(ids_of(2, 5)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"hidden": 0}, "hidden = 0"),
        ({"layers": -1}, "layers = -1"),
        ({"vocab": 0}, "vocab = 0"),
        ({"snn_ratio": 1.5}, "snn_ratio = 1.5"),
        ({"snn_ratio": math.nan}, "snn_ratio = nan"),
        ({"dropout": 1.0}, "dropout = 1.0"),
    ],
)
def test_an_argument_out_of_range_is_named(changed, named):
    with pytest.raises(NetworkError, match=named):
        RecurrentLM(**{"vocab": 11, "embedding": 5, "hidden": 8, "layers": 1} | changed)


def test_a_layer_needs_a_unit_of_some_kind():
    with pytest.raises(NetworkError, match="0 LSTM and 0 spiking"):
        RecurrentLayer(4, 0, 0)


def test_ids_without_a_position_are_refused():
    with pytest.raises(NetworkError, match="no position"):
        lm_of(0.0)(ids_of(2, 0))


def test_a_state_of_another_batch_or_model_is_refused():
    model = lm_of(0.0)
    _, state = model.step(ids_of(2, 3))
    with pytest.raises(NetworkError, match=r"\(2, 8\).* needs .*\(3, 8\)"):
        model.step(ids_of(3, 3), state)
    with pytest.raises(NetworkError, match="1 layers does not fit a model of 2"):
        model.step(ids_of(2, 3), state[:1])


def test_without_snntorch_the_extra_that_brings_it_is_named_and_lstm_units_need_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "snntorch", None)
    with pytest.raises(NetworkError, match=r"snntorch.*libprune\[networks\]"):
        RecurrentLM(11, 5, 8, 1, snn_ratio=0.5)
    assert RecurrentLM(11, 5, 8, 1)(ids_of(1, 2)).shape == (1, 2, 11)


@RATIOS
def test_training_learns_more_than_frequencies_and_the_folder_holds_what_it_learned(ratio, tmp_path):
    if ratio:
        pytest.importorskip("snntorch")
    text = torch.arange(3000) % 5
    training, validation = (byte_text.streams(part, 4) for part in byte_text.split(text)[:2])
    torch.manual_seed(0)
    config = {"vocab": byte_text.BYTES, "embedding": 8, "hidden": 16, "layers": 1, "snn_ratio": ratio, "dropout": 0.0}
    model = RecurrentLM(**config)
    epochs = list(
        recurrent_training.epochs_of(
            model, training, validation, recurrent_training.Schedule(batch=4, bptt=4, epochs=2)
        )
    )
    assert epochs[1].training_loss < epochs[0].training_loss
    assert epochs[1].validation_loss < byte_text.unigram_loss(training, validation)
    assert math.isnan(epochs[1].firing) if ratio == 0 else 0 < epochs[1].firing <= 1
    recurrent_training.save(model, config, tmp_path / "model")
    loaded = recurrent_training.load(tmp_path / "model")
    assert recurrent_training.mean_loss(loaded, validation, 16) == pytest.approx(epochs[1].validation_loss)


@given(st.lists(st.integers(0, 255), min_size=40, max_size=80))
def test_the_unigram_loss_is_that_of_the_frequencies_with_one_added(values):
    training, validation = (byte_text.streams(part, 2) for part in byte_text.split(torch.tensor(values))[:2])
    counts = torch.bincount(training.flatten(), minlength=256).double() + 1
    expected = torch.nn.functional.nll_loss(
        (counts / counts.sum()).log()[None].expand(validation[:, 1:].numel(), -1), validation[:, 1:].flatten()
    )
    assert byte_text.unigram_loss(training, validation) == pytest.approx(expected.item())


def test_the_command_reads_a_file_and_says_where_the_model_is(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    text, out = tmp_path / "text.txt", tmp_path / "model"
    text.write_text("so und so und anders\n" * 60)
    sizes = ["--hidden", "8", "--embedding", "4", "--layers", "1", "--batch", "4", "--epochs", "1"]
    done = CliRunner().invoke(example.app, ["train", "--text", str(text), "--out", str(out), *sizes])
    assert done.exit_code == 0, done.output
    assert "epoch 1/1: perplexity per byte" in done.output
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((out / "config.json").read_text())["hidden"] == recurrent_training.load(out).layers[0].hidden == 8


def test_a_text_that_is_too_short_is_refused_with_what_would_do():
    parts = byte_text.split(torch.zeros(100, dtype=torch.long))
    with pytest.raises(SourceError, match="10 bytes, too few for 8 streams; give a text of some 160"):
        byte_text.streams(parts.validation, 8)


@given(st.integers(0, 300))
def test_a_text_is_split_into_eight_tenths_and_two_times_one_in_its_order(length):
    ids = torch.arange(length)
    parts = byte_text.split(ids)
    assert torch.equal(torch.cat(parts), ids)
    assert len(parts.validation) == len(parts.evaluation)
    assert abs(len(parts.evaluation) - length / 10) <= 0.5


@pytest.mark.parametrize("content", [None, "{", '{"width": 3}'], ids=["nothing", "broken", "another"])
def test_a_folder_without_a_whole_model_is_refused_with_how_to_write_one(content, tmp_path):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"no whole recurrent model .* examples\.recurrent train"):
        recurrent_training.load(tmp_path)
