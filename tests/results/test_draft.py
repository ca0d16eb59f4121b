"""Drafts: acceptance against its definition, and the expected speed-up against speculative sampling itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libprune.models.sequences import Sequences
from libprune.results import draft
from libprune.results.draft import (
    LONGEST,
    Beside,
    Overlap,
    draft_figures,
    expected_speedup,
    predictions_overlap,
)
from libprune.results.perplexity import window_losses
from tests.support.models import FAMILIES, VOCAB, tokens

WINDOWS, LENGTH = 5, 12
chances = st.floats(0, 1)
steps = st.floats(0.01, 2)


def random_logits(seed: int, rows: int = 6, vocab: int = 9, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    one, other = (scale * torch.randn(rows, vocab, generator=generator) for _ in range(2))
    return one, other


# Acceptance


@given(st.integers(0, 1000), st.floats(0.1, 20))
def test_the_chance_of_acceptance_is_one_minus_the_total_variation_distance(seed, scale):
    dense, other = random_logits(seed, scale=scale)
    chance, same = predictions_overlap(dense, other)
    p, q = (np.exp(one.double().numpy()) for one in (dense, other))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    np.testing.assert_allclose(chance, 1 - np.abs(p - q).sum(1) / 2, rtol=1e-5, atol=1e-6)
    assert same.tolist() == (p.argmax(1) == q.argmax(1)).tolist()


@given(st.integers(0, 1000))
def test_acceptance_is_whole_of_a_model_with_itself_and_the_same_either_way(seed):
    dense, other = random_logits(seed)
    chance, same = predictions_overlap(dense, dense.clone())
    np.testing.assert_allclose(chance, 1, rtol=1e-6)
    assert same.all()
    there, back = predictions_overlap(dense, other), predictions_overlap(other, dense)
    assert all(torch.equal(one, two) for one, two in zip(there, back, strict=True))


@pytest.mark.parametrize("batch_tokens", [1, 2 * LENGTH, 100 * LENGTH])
@pytest.mark.parametrize(("rows", "most"), [(1, 0), (37, 1 << 30), (1000, 2 * LENGTH * VOCAB * 4)])
def test_overlaps_of_windows_are_those_of_their_positions_whatever_is_done_at_once_and_kept(
    monkeypatch, rows, most, batch_tokens
):
    monkeypatch.setattr(draft, "rows_at_once", lambda _: rows)
    dense, other, ids = FAMILIES["llama"](0), FAMILIES["mistral"](1), tokens(WINDOWS, LENGTH)
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits.double().softmax(-1).numpy() for model in (dense, other))
    windows = Sequences(ids)
    beside = Beside(dense, windows, batch_tokens, most)
    assert beside.read(dense, "windows")[1] is None
    accepted = [np.mean([np.minimum(p[w, t], q[w, t]).sum() for t in range(LENGTH)]) for w in range(WINDOWS)]
    for _ in range(2):
        losses, found = beside.read(other, "windows")
        np.testing.assert_allclose(losses, window_losses(other, windows, batch_tokens, "windows"), rtol=1e-6)
        assert found is not None
        np.testing.assert_allclose(found.accepted, accepted, rtol=1e-5)
        np.testing.assert_array_equal(found.agreed, (p.argmax(-1) == q.argmax(-1)).mean(1))


def test_the_dense_model_runs_once_over_the_windows():
    dense, other, calls = FAMILIES["llama"](0), FAMILIES["mistral"](1), []
    handle = dense.register_forward_hook(lambda *_: calls.append(1))
    beside = Beside(dense, Sequences(tokens(WINDOWS, LENGTH)), 2 * LENGTH)
    for model in (dense, other, other):
        beside.read(model, "windows")
    handle.remove()
    assert len(calls) == 3


# Speed-up


@given(chances.filter(lambda chance: chance < 0.999), steps, st.integers(1, LONGEST))
def test_the_speedup_is_that_of_the_paper(chance, step, length):
    expected = (1 - chance ** (length + 1)) / ((1 - chance) * (length * step + 1))
    assert expected_speedup(chance, step, length) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("length", [1, 3, 6])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_speculative_sampling_writes_as_many_tokens_as_expected_from_the_dense_distribution(scale, length):
    """Tokens of one pass of the dense model over its time, in a simulation of the algorithm of the paper.

    Each position has one pair of distributions, so that the chances of acceptance are independent, as is assumed.
    """
    logits = random_logits(7, rows=1, scale=scale)
    p, q = (one[0].double().softmax(-1).numpy() for one in logits)
    (chance,), _ = predictions_overlap(*logits)
    random, rounds, step = np.random.default_rng(0), 10_000, 0.3
    written, first = np.zeros(rounds), np.zeros(len(p))
    for number in range(rounds):
        drafted = random.choice(len(q), length, p=q)
        refused = random.random(length) >= np.minimum(1, p[drafted] / q[drafted])
        kept = int(refused.argmax()) if refused.any() else length
        left = np.maximum(p - q, 0) if kept < length else p
        last = random.choice(len(p), p=left / left.sum())
        written[number] = kept + 1
        first[drafted[0] if kept else last] += 1
    expected = expected_speedup(float(chance), step, length) * (length * step + 1)
    assert abs(written.mean() - expected) < 4 * written.std() / math.sqrt(rounds)
    np.testing.assert_allclose(first / rounds, p, atol=4 * 0.5 / math.sqrt(rounds))


@given(st.lists(chances, min_size=1, max_size=6), steps)
def test_the_best_length_is_best_and_a_draft_pays_where_more_is_accepted_than_a_step_takes(accepted, step):
    found = draft_figures(Overlap(np.array(accepted), np.array(accepted)), step)
    gains = [expected_speedup(float(np.mean(accepted)), step, length) for length in range(1, LONGEST + 1)]
    assert found["speedup"] == max(gains) == gains[found["tokens"] - 1]
    margin = np.mean(accepted) - step
    assert (found["speedup"] > 1) is bool(margin > 0) or abs(margin) < 1e-9


def test_figures_are_means_over_windows_with_their_standard_errors():
    found = draft_figures(Overlap(np.array([0.5, 0.7, 0.9]), np.array([0.2, 0.2, 0.2])), 0.25)
    assert found["acceptance"] == pytest.approx(0.7)
    assert found["acceptance_se"] == pytest.approx(0.2 / math.sqrt(3))
    assert (found["agreement"], found["agreement_se"]) == pytest.approx((0.2, 0))
    assert found["step_ratio"] == 0.25
