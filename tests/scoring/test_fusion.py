"""Adaptive weights: how much each criterion counts in a block, by how much its values differ between units."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from libprune.scoring.fusion import adaptive_weights

LEVELS = st.integers(0, 50).map(float)
"""Whole numbers, so that no difference is lost in rounding."""


def importances(units: int = 6):
    return arrays(float, (3, units), elements=LEVELS)


@given(importances(), st.permutations(range(3)), st.integers(1, 9), st.integers(0, 9))
def test_adaptive_weights_sum_to_one_go_with_their_criteria_and_know_no_unit(values, order, factor, shift):
    weights = adaptive_weights(list(values))
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert adaptive_weights(list(values[list(order)])) == pytest.approx(weights[list(order)])
    assert adaptive_weights([factor * row + shift for row in values]) == pytest.approx(weights)


@given(importances())
def test_a_constant_criterion_counts_nothing_beside_one_that_tells_units_apart(values):
    assume(np.ptp(values[0]) > 0)
    assert adaptive_weights([values[0], np.full(6, 3.0)]) == pytest.approx([1, 0])


@pytest.mark.parametrize("units", [1, 5])
def test_criteria_that_are_all_constant_count_alike(units):
    assert adaptive_weights([np.zeros(units), np.ones(units), np.full(units, 7.0)]) == pytest.approx([1 / 3] * 3)


def test_a_criterion_counts_more_the_fewer_units_hold_its_importance():
    one, half, even = np.eye(1, 8)[0], np.array([1.0] * 4 + [0.0] * 4), np.linspace(0, 1, 8)
    weights = adaptive_weights([one, half, even])
    assert weights[0] > weights[1] > weights[2] > 0
    assert weights[1] / weights[0] == pytest.approx(1 - np.log(4) / np.log(8))
