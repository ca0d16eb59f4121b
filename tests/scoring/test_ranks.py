"""Spearman's rank correlation, against Pearson's of the ranks."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from libprune.scoring.ranks import spearman

PAIRS = st.integers(2, 12).flatmap(lambda n: arrays(float, (2, n), elements=st.integers(0, 6).map(float)))


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, the mean rank of those that are equal."""
    return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])


@given(PAIRS)
def test_it_is_pearsons_correlation_of_the_ranks_with_ties_shared(pair):
    assume(np.ptp(pair, axis=1).all())
    expected = np.corrcoef(ranks(pair[0]), ranks(pair[1]))[0, 1]
    assert spearman(*pair) == pytest.approx(expected)
    assert spearman(np.exp(pair[0]), -pair[1]) == pytest.approx(-expected), "only the order counts"


@pytest.mark.parametrize("values", [[], [3.0], [2.0, 2.0, 2.0]])
def test_without_two_different_values_there_is_none(values):
    others = np.arange(float(len(values)))
    assert np.isnan(spearman(np.array(values), others))
    assert np.isnan(spearman(others, np.array(values)))


@given(PAIRS)
def test_rank_correlation_is_unchanged_by_increasing_functions(pair):
    one, two = pair
    found = spearman(one, two)
    if np.ptp(one) == 0 or np.ptp(two) == 0:
        assert math.isnan(found)
        return
    assert found == pytest.approx(spearman(np.exp(one), -1 / (1 + two)))
    assert spearman(one, -two) == pytest.approx(-found)


def test_rank_correlation_of_a_hand_computed_example():
    """Differences of the ranks 0, 1, 1, 0: 1 - 6·2 / (4·15)."""
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 30, 20, 40])) == pytest.approx(0.8)
