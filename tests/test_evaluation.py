"""What is measured: losses and perplexity against their definitions, speed, and the report's numbers."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from libprune.evaluation import compare_speed, perplexity, perplexity_ratio, window_losses
from libprune.report import HEADER, headline, how_to_load, markdown, markdown_table, text_table
from tests.collected import MODELS
from tests.models import FAMILIES, tokens

losses = arrays(np.float64, st.integers(2, 12), elements=st.integers(0, 80).map(lambda k: k / 8))

WINDOWS, LENGTH = 5, 12


# Losses


@pytest.mark.parametrize("family", MODELS)
def test_the_loss_of_a_window_is_transformers_own_whatever_the_batch(family):
    model, ids = MODELS[family](0), tokens(WINDOWS, LENGTH)
    with torch.no_grad():
        expected = [model(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in ids]
    for batch_tokens in (1, LENGTH, 2 * LENGTH + 1, 100 * LENGTH):
        found = window_losses(model, ids.numpy(), batch_tokens, "windows")
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_loss_is_the_mean_negative_log_probability_of_each_next_token():
    model, ids = FAMILIES["llama"](0), tokens(2, LENGTH)
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=ids).logits.double(), -1)
    expected = [-np.mean([float(log_p[w, t, ids[w, t + 1]]) for t in range(LENGTH - 1)]) for w in range(2)]
    np.testing.assert_allclose(window_losses(model, ids.numpy(), 64, "windows"), expected, rtol=1e-5)


def test_measuring_leaves_no_gradient_graph_and_no_change():
    model = FAMILIES["llama"](0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    window_losses(model, tokens(WINDOWS, LENGTH).numpy(), 64, "windows")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Perplexity


@given(losses)
def test_perplexity_and_its_error_are_those_of_the_delta_method(values):
    """exp(m) and exp(m) s / sqrt(n), with m and s the mean and the sample deviation of the windows' losses."""
    n = len(values)
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    found = perplexity(values)
    assert found.value == pytest.approx(math.exp(mean), rel=1e-12)
    assert found.error == pytest.approx(math.exp(mean) * deviation / math.sqrt(n), rel=1e-9, abs=1e-12)


def test_the_error_is_the_spread_of_perplexities_over_repeated_samples():
    """The delta method against what it stands for: 4000 samples of 50 windows, whose perplexities spread so."""
    samples = np.random.default_rng(0).normal(3.0, 0.4, (4000, 50))
    estimates = [perplexity(sample) for sample in samples]
    spread = np.std([estimate.value for estimate in estimates])
    assert np.mean([estimate.error for estimate in estimates]) == pytest.approx(spread, rel=0.05)


@given(losses)
def test_a_model_compared_with_itself_has_ratio_1_without_error(values):
    assert perplexity_ratio(values, values) == perplexity(np.zeros(len(values)))
    assert (perplexity_ratio(values, values).value, perplexity_ratio(values, values).error) == (1.0, 0.0)


@given(st.data())
def test_the_ratio_is_that_of_the_perplexities_and_pairing_makes_its_error(data):
    dense = data.draw(losses)
    pruned = data.draw(arrays(np.float64, len(dense), elements=st.integers(0, 80).map(lambda k: k / 8)))
    found = perplexity_ratio(dense, pruned)
    assert found.value == pytest.approx(perplexity(pruned).value / perplexity(dense).value, rel=1e-9)
    shifted = perplexity_ratio(dense, dense + 0.25)
    assert shifted.value == pytest.approx(math.exp(0.25))
    assert shifted.error == pytest.approx(0, abs=1e-9)


def test_one_window_has_no_standard_error():
    assert math.isnan(perplexity(np.array([2.0])).error)


def test_a_ruined_models_perplexity_is_infinite_rather_than_an_error():
    assert perplexity(np.array([800.0, 900.0])).value == math.inf


# Speed


def test_speeds_are_finite_and_positive_and_ratios_lie_in_their_spread():
    dense, pruned = FAMILIES["llama_mha"](0), FAMILIES["mistral"](0)
    found = compare_speed(dense, pruned, tokens(1, 16), decode_tokens=3, rounds=3)
    numbers = [found.dense.prefill, found.dense.decode, found.pruned.prefill, found.pruned.decode]
    assert all(0 < number < math.inf for number in numbers)
    for ratio, (low, high) in (
        (found.prefill_ratio, found.prefill_spread),
        (found.decode_ratio, found.decode_spread),
    ):
        assert 0 < low <= ratio <= high < math.inf


def test_a_slower_model_is_seen_to_be_slower():
    """Sixteen times the layers against one: the ratio is dense time over pruned time."""
    dense, pruned = FAMILIES["llama_mha"](0), FAMILIES["llama_mha"](0)
    dense.model.layers = torch.nn.ModuleList([*dense.model.layers])
    pruned.model.layers = torch.nn.ModuleList([pruned.model.layers[0]])
    pruned.config.num_hidden_layers = 1
    found = compare_speed(dense, pruned, tokens(1, 16), decode_tokens=4, rounds=5)
    assert found.prefill_ratio > 1.2
    assert found.decode_ratio > 1.2
    assert found.pruned.decode > found.dense.decode


# The report


EVALUATION = {
    "dense": {
        "perplexity": 20.741,
        "perplexity_se": 0.311,
        "decoder_parameters": 106_168_320,
        "total_parameters": 134_515_008,
        "bytes": 269_030_016,
        "cache_bytes": 23_040,
        "macs_per_token": 134_479_872,
        "prefill": 1234.5,
        "decode": 56.7,
    },
    "pruned": {
        "perplexity": 26.372,
        "perplexity_se": 0.405,
        "decoder_parameters": 84_934_656,
        "total_parameters": 113_281_344,
        "bytes": 226_562_688,
        "cache_bytes": 15_360,
        "macs_per_token": 113_246_208,
        "prefill": 1481.4,
        "decode": 68.9,
        "decoder_share_removed": 0.2,
        "total_share_removed": 0.1578,
        "macs_share_removed": 0.1581,
    },
    "pruning": {
        "slice": {"repair": "local"},
        "repair": {
            "lost_before": 0.2211,
            "lost_after": 0.1322,
            "lost_held_out_before": 0.2233,
            "lost_held_out_after": 0.1644,
        },
        "proof": {"logit_difference": 2.5e-6, "logit_scale": 33.1},
    },
    "units": {"attention": 3, "mlp": 1536},
    "kept": [{"attention": 3, "mlp": 1200}, {"attention": 2, "mlp": 1111}],
    "perplexity_ratio": {"value": 1.2715, "se": 0.0086},
    "tasks": {
        "piqa": {
            "dense": {"n": 1838.0, "acc": 0.68, "acc_se": 0.011, "acc_norm": 0.6714, "acc_norm_se": 0.01099},
            "pruned": {"n": 1838.0, "acc": 0.6, "acc_se": 0.012, "acc_norm": 0.6102, "acc_norm_se": 0.0114},
        },
        "winogrande": {"dense": {"acc": 0.51, "acc_se": 0.014}, "pruned": {"acc": 0.52, "acc_se": 0.014}},
    },
    "speed": {
        "prefill_ratio": 1.204,
        "decode_ratio": 1.219,
        "prefill_spread": [1.11, 1.29],
        "decode_spread": [1.15, 1.26],
    },
    "protocol": {
        "text": "some text",
        "windows": 24,
        "length": 1024,
        "prompt_tokens": 256,
        "decode_tokens": 16,
        "rounds": 5,
        "dtype": "bfloat16",
        "device": "cpu",
    },
}


def test_the_headline_holds_the_measured_numbers():
    rows = {row[0]: row[1:] for row in headline(EVALUATION)}
    assert rows["perplexity"] == ("20.74 ± 0.31", "26.37 ± 0.41", "× 1.272 ± 0.009")
    assert rows["decoder parameters"] == ("106,168,320", "84,934,656", "-20.0 %")
    assert rows["all parameters"] == ("134,515,008", "113,281,344", "-15.8 %")
    assert rows["weights, MB"] == ("269", "227", "-15.8 %")
    assert rows["KV cache, bytes a token"] == ("23,040", "15,360", "-33.3 %")
    assert rows["prefill, tokens/s"][:2] == ("1,234", "1,481")
    assert "1.20" in rows["prefill, tokens/s"][2]
    assert rows["decode, tokens/s"][2] == "× 1.22 (1.15 to 1.26)"
    assert rows["piqa, acc_norm, %"] == ("67.1 ± 1.1", "61.0 ± 1.1", "-6.1")
    assert rows["winogrande, acc, %"] == ("51.0 ± 1.4", "52.0 ± 1.4", "+1.0")


cells = st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=6)


@given(st.lists(st.tuples(cells, cells, cells), max_size=4))
def test_tables_hold_every_cell_in_columns(rows):
    header = ("what", "one", "two")
    text = text_table(rows, header).split("\n")
    assert len(text) == len(rows) + 2
    assert len({len(line) for line in text}) == 1
    for line, row in zip([text[0], *text[2:]], [header, *rows], strict=True):
        assert line.split() == [cell for cell in row if cell]
    marks = markdown_table(rows, header).split("\n")
    assert re.fullmatch(r"\|(---:?\|)+", marks[1])
    for line, row in zip([marks[0], *marks[2:]], [header, *rows], strict=True):
        assert tuple(cell.strip() for cell in line.strip("|").split("|")) == row


@pytest.mark.parametrize("shape", ["uniform", "per_layer"])
def test_the_report_says_what_was_cut_what_it_cost_and_how_to_load_it(shape):
    plan = {
        "criterion": "taylor_2nd",
        "scaling": "none",
        "method": "global",
        "ratio": 0.2,
        "ratio_of": "decoder",
        "objective": "macs",
        "shape": shape,
        "kept_set_overlap": {"taylor": 0.98765},
    }
    text = markdown(EVALUATION | {"plan": plan}, "out/pruned")
    assert markdown_table(headline(EVALUATION), HEADER) in text
    for words in ("Asked for 20.0 %", "20.00 %", "15.78 %", "15.81 %", "`taylor_2nd`", "`global`", "`local`", "0.9877"):
        assert words in text
    assert "24 windows of 1024 tokens of some text" in text
    assert "2.5e-06 of 33.1" in text
    assert "20.0 % of the decoder macs" in text
    for share in ("22.1 %", "13.2 %", "22.3 %", "16.4 %"):
        assert share in text
    assert "| 0 | 3 of 3 | 1200 of 1536 |" in text
    assert "| 1 | 2 of 3 | 1111 of 1536 |" in text
    assert how_to_load("out/pruned", shape) in text
    assert ("trust_remote_code=True" in text) is (shape == "per_layer")
