"""Cosines to the dense embedding, and the rank correlation of the similarities of pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, rankdata, spearmanr

from libprune.models.sequences import Sequences
from libprune.results.similarity import mean_cosine, rank_correlation, similarity, window_embeddings
from tests.support.models import FAMILIES, tokens


def made(seed: int, windows: int = 12, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings, and others near them."""
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(windows, 6))
    both = dense, dense + noise * rng.normal(size=dense.shape)
    return tuple(one / np.linalg.norm(one, axis=1, keepdims=True) for one in both)


@given(st.integers(0, 99))
def test_the_correlation_is_spearmans_over_all_pairs(seed):
    dense, other = made(seed)
    pairs = np.triu_indices(len(dense), 1)
    expected = spearmanr((dense @ dense.T)[pairs], (other @ other.T)[pairs]).statistic
    assert rank_correlation(dense, other).value == pytest.approx(expected)


def test_its_error_is_near_the_spread_over_other_texts():
    """Over two hundred draws of the windows; the jackknife is a bit too wide for so few of them."""
    found = [rank_correlation(*made(seed)) for seed in range(200)]
    spread = float(np.std([one.value for one in found]))
    assert 0.8 * spread < np.mean([one.error for one in found]) < 1.6 * spread


@given(st.integers(0, 99), st.integers(3, 9))
def test_its_error_is_that_of_leaving_out_one_window_after_the_other(seed, windows):
    """With the ranks of all pairs; against scipy's correlation of what is left."""
    dense, other = made(seed, windows)
    pairs = np.triu_indices(windows, 1)
    ranks = [rankdata((one @ one.T)[pairs]) for one in (dense, other)]
    left_out = []
    for window in range(windows):
        stays = (pairs[0] != window) & (pairs[1] != window)
        one, two = (rank[stays] for rank in ranks)
        left_out.append(pearsonr(one, two).statistic if stays.sum() > 1 and np.ptp(one) and np.ptp(two) else 0.0)
    assert rank_correlation(dense, other).error == pytest.approx(np.sqrt((windows - 1) * np.var(left_out)))


def test_an_unchanged_model_is_at_1_and_a_constant_one_at_0():
    dense, _ = made(1)
    figures = similarity(dense, dense)
    assert figures == pytest.approx({"cosine": 1, "cosine_se": 0, "rank_correlation": 1, "rank_correlation_se": 0})
    assert rank_correlation(dense, np.ones_like(dense)).value == 0


def test_the_cosine_is_the_mean_over_windows_with_its_error():
    dense, other = made(2)
    cosines = (dense * other).sum(1)
    found = mean_cosine(dense, other)
    assert found.value == pytest.approx(cosines.mean())
    assert found.error == pytest.approx(cosines.std(ddof=1) / np.sqrt(len(cosines)))


def test_windows_keep_their_order_in_passes():
    model, windows = FAMILIES["distilbert"](0), Sequences(tokens(5, 8), pooling="cls")
    found = window_embeddings(model, windows, 16, "test")
    assert found.shape == (5, 24)
    np.testing.assert_allclose(found, window_embeddings(model, windows, 999, "test"), atol=1e-6)
