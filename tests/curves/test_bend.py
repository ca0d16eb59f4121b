"""The bend of a curve: a corner is found where it is, a straight or noisy curve has none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.curves.bend import find_bend

SHARES = [number / 10 for number in range(10)]


@st.composite
def corners(draw):
    """Places along a curve, the number of the corner, and two slopes, the second at least 2.1 times the first."""
    count = draw(st.integers(3, 10))
    steps = draw(st.lists(st.floats(0.02, 0.3), min_size=count - 1, max_size=count - 1))
    before = draw(st.floats(0, 1))
    return [0.0, *np.cumsum(steps)], draw(st.integers(1, count - 2)), before, before * draw(st.floats(2.1, 50)) + 0.1


def broken(removed, place, before, after):
    corner = removed[place]
    return [before * min(x, corner) + after * max(0.0, x - corner) for x in removed]


@given(corners())
def test_a_corner_is_found_with_the_slopes_on_both_sides(drawn):
    removed, place, before, after = drawn
    bend = find_bend(removed, broken(removed, place, before, after))
    assert bend is not None
    assert bend.place == place
    assert (bend.before, bend.after) == (pytest.approx(before, abs=1e-9), pytest.approx(after))
    assert bend.error == 0


@given(corners())
def test_a_corner_within_the_noise_is_none(drawn):
    removed, place, before, after = drawn
    losses = broken(removed, place, before, after)
    bend = find_bend(removed, losses)
    errors = [0.0] * len(removed)
    errors[place] = bend.distance / 1.99
    assert find_bend(removed, losses, errors) is None
    errors[place] = bend.distance / 2.01
    assert find_bend(removed, losses, errors).place == place


@given(corners(), st.floats(0.1, 10), st.floats(0.1, 10))
def test_units_do_not_matter(drawn, wide, tall):
    """As after bringing both axes to 0 to 1, the corner stays where it is."""
    removed, place, before, after = drawn
    losses = broken(removed, place, before, after)
    assert find_bend([wide * x for x in removed], [tall * y for y in losses]).place == place


@pytest.mark.parametrize(
    "losses",
    [
        [0.0] * 10,
        SHARES,
        [x**1.1 for x in SHARES],
        [x**0.5 for x in SHARES],
        [-x for x in SHARES],
    ],
    ids=["flat", "straight", "nearly straight", "slower and slower", "falling"],
)
def test_a_curve_without_a_corner_has_no_bend(losses):
    assert find_bend(SHARES, losses) is None


@pytest.mark.parametrize("count", [1, 2])
def test_two_points_have_no_bend(count):
    assert find_bend(SHARES[:count], SHARES[:count]) is None


def test_the_error_is_that_of_the_three_points():
    """Half way between the ends each end counts half."""
    bend = find_bend([0.0, 1.0, 2.0], [0.0, 0.0, 4.0], [0.0, 0.3, 0.8])
    assert bend.distance == 2
    assert bend.error == pytest.approx(0.5)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]), max_size=6), st.integers(0, 99))
def test_points_of_equal_size_break_nothing_and_those_at_the_ends_are_no_bend(removed, seed):
    """Coarse units, such as the groups of all layers, give several ratios the same plan."""
    sizes = sorted([0.0, *removed])
    bend = find_bend(sizes, np.sort(np.random.default_rng(seed).random(len(sizes))).tolist())
    assert bend is None or sizes[0] < sizes[bend.place] < sizes[-1]
