"""The statistics of comparisons: against definitions and published tables."""

import math
from statistics import mean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.plan import jaccard
from libprune.experiments.agreement import chance_overlap, mean_interval, paired_factor, ratio_interval

T_975 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646}
"""The 0.975 quantiles of Student's t, as any table of it prints them (Abramowitz and Stegun 1964, table 26.10)."""
few = st.lists(st.floats(-5, 5), min_size=2, max_size=8)


@given(few)
def test_the_interval_is_the_mean_and_t_standard_errors_to_each_side(values):
    found = mean_interval(values)
    half = T_975[len(values) - 1] * stdev(values) / math.sqrt(len(values))
    assert found.mean == pytest.approx(mean(values), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((mean(values) - half, mean(values) + half), abs=2e-4 * half + 1e-9)
    assert found.count == len(values)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    missed = sum(mean_interval(row).leaves_out(0.0) for row in rng.standard_normal((4000, 3)).tolist())
    assert missed / 4000 == pytest.approx(0.05, abs=0.01)


def test_one_value_has_no_interval_and_leaves_nothing_out():
    one = mean_interval([2.0])
    assert not one.known
    assert math.isnan(one.low)
    assert not one.leaves_out(100.0)


ratios = st.dictionaries(st.integers(0, 5), st.floats(0.5, 1e5), min_size=2)


@given(ratios, st.floats(1.01, 100))
def test_a_constant_factor_is_found_exactly_whatever_the_seeds_do(found, factor):
    """The spread over seeds, however large, is common to both and leaves no width."""
    paired = paired_factor({seed: ratio * factor for seed, ratio in found.items()}, found)
    assert (paired.low, paired.mean, paired.high) == pytest.approx((factor,) * 3, rel=1e-6)


@given(ratios, ratios)
def test_the_factor_to_a_reference_is_one_over_the_reversed_factor(one, two):
    there, back = paired_factor(one, two), paired_factor(two, one)
    assert (there is None) == (not one.keys() & two.keys())
    if there is not None:
        assert there.mean * back.mean == pytest.approx(1)
        assert not there.known or there.low * back.high == pytest.approx(1)


def test_a_ratio_interval_is_geometric_and_never_reaches_zero():
    found = ratio_interval([10.0, 1000.0])
    assert found.mean == pytest.approx(100)
    assert 0 < found.low < found.mean < found.high
    assert found.mean / found.low == pytest.approx(found.high / found.mean)


sets = st.integers(1, 40).flatmap(lambda n: st.tuples(*[st.lists(st.booleans(), min_size=n, max_size=n)] * 2))


@given(sets)
def test_jaccard_is_that_of_sets(pair):
    one, two = ({i for i, kept in enumerate(side) if kept} for side in pair)
    expected = len(one & two) / len(one | two) if one | two else 1.0
    assert jaccard(np.array(pair[0]), np.array(pair[1])) == expected


@pytest.mark.parametrize(("share", "other"), [(0.8, 0.8), (0.5, 0.9)])
def test_chance_overlap_is_what_independent_draws_come_to(share, other):
    rng = np.random.default_rng(0)
    draws = rng.random((2, 400_000)) < np.array([[share], [other]])
    assert jaccard(*draws) == pytest.approx(chance_overlap(share, other), abs=0.003)
