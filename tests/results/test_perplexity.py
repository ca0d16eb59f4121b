"""Losses and perplexity against their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from libprune.models.sequences import Sequences
from libprune.results.perplexity import estimate_mean, estimate_perplexity, estimate_ratio, window_losses
from tests.support.collected import MODELS
from tests.support.models import FAMILIES, tokens

losses = arrays(np.float64, st.integers(2, 12), elements=st.integers(0, 80).map(lambda k: k / 8))

WINDOWS, LENGTH = 5, 12


# Losses


@pytest.mark.parametrize("family", MODELS)
def test_the_loss_of_a_window_is_transformers_own_whatever_the_batch(family):
    model, ids = MODELS[family](0), tokens(WINDOWS, LENGTH)
    with torch.no_grad():
        expected = [model(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in ids]
    for batch_tokens in (1, LENGTH, 2 * LENGTH + 1, 100 * LENGTH):
        found = window_losses(model, Sequences(ids), batch_tokens, "windows")
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_loss_is_the_mean_negative_log_probability_of_each_next_token():
    model, ids = FAMILIES["llama"](0), tokens(2, LENGTH)
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=ids).logits.double(), -1)
    expected = [-np.mean([float(log_p[w, t, ids[w, t + 1]]) for t in range(LENGTH - 1)]) for w in range(2)]
    np.testing.assert_allclose(window_losses(model, Sequences(ids), 64, "windows"), expected, rtol=1e-5)


def test_measuring_leaves_no_gradient_graph_and_no_change():
    model = FAMILIES["llama"](0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    window_losses(model, Sequences(tokens(WINDOWS, LENGTH)), 64, "windows")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Perplexity


@given(losses)
def test_perplexity_and_its_error_are_those_of_the_delta_method(values):
    """exp(m) and exp(m) s / sqrt(n), with m and s the mean and the sample deviation of the windows' losses."""
    n = len(values)
    mean = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    found = estimate_perplexity(values)
    assert found.value == pytest.approx(math.exp(mean), rel=1e-12)
    assert found.error == pytest.approx(math.exp(mean) * deviation / math.sqrt(n), rel=1e-9, abs=1e-12)


def test_the_error_is_the_spread_of_perplexities_over_repeated_samples():
    """The delta method against what it stands for: 4000 samples of 50 windows, whose perplexities spread so."""
    samples = np.random.default_rng(0).normal(3.0, 0.4, (4000, 50))
    estimates = [estimate_perplexity(sample) for sample in samples]
    spread = np.std([estimate.value for estimate in estimates])
    assert np.mean([estimate.error for estimate in estimates]) == pytest.approx(spread, rel=0.05)


@given(losses)
def test_a_mean_has_the_standard_error_of_its_windows(values):
    found = estimate_mean(values)
    assert found.value == pytest.approx(math.fsum(values) / len(values))
    spread = math.sqrt(math.fsum((value - found.value) ** 2 for value in values) / (len(values) - 1))
    assert found.error == pytest.approx(spread / math.sqrt(len(values)), abs=1e-12)


@given(losses)
def test_a_model_compared_with_itself_has_ratio_1_without_error(values):
    own = estimate_ratio(values, values)
    assert own == estimate_perplexity(np.zeros(len(values)))
    assert (own.value, own.error) == (1.0, 0.0)


@given(st.data())
def test_the_ratio_is_that_of_the_perplexities_and_pairing_makes_its_error(data):
    dense = data.draw(losses)
    pruned = data.draw(arrays(np.float64, len(dense), elements=st.integers(0, 80).map(lambda k: k / 8)))
    found = estimate_ratio(dense, pruned)
    assert found.value == pytest.approx(estimate_perplexity(pruned).value / estimate_perplexity(dense).value, rel=1e-9)
    shifted = estimate_ratio(dense, dense + 0.25)
    assert shifted.value == pytest.approx(math.exp(0.25))
    assert shifted.error == pytest.approx(0, abs=1e-9)


def test_one_window_has_no_standard_error():
    assert math.isnan(estimate_perplexity(np.array([2.0])).error)


def test_a_ruined_models_perplexity_is_infinite_rather_than_an_error():
    assert estimate_perplexity(np.array([800.0, 900.0])).value == math.inf
