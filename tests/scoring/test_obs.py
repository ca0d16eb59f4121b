"""The order of removal, against refitting by least squares for every unit that is left."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from libprune.engine.errors import StatisticsError
from libprune.scoring.obs import RemovalCost, obs_removal
from tests.support.tensors import gram, random_tensors


@st.composite
def problems(draw):
    """Inputs ``[samples, inputs]`` that depend on one another, a weight, and the unit of each input."""
    count, width, outputs = draw(st.integers(1, 5)), draw(st.sampled_from([1, 3])), draw(st.integers(1, 4))
    inputs = count * width
    x, mixing, w = random_tensors(draw(st.integers(0, 2**31)), (40, inputs), (inputs, inputs), (outputs, inputs))
    units = np.array(draw(st.permutations(np.repeat(np.arange(count), width).tolist())))
    return x @ mixing, w, units


dampings = st.sampled_from([1e-4, 1e-2, 1.0])


def lost(x: Tensor, w: Tensor, gone: np.ndarray, damping: float) -> float:
    """Squared error per token, with the ridge's, of the best weights without the inputs that are gone."""
    ridge = damping * float(gram(x).diagonal().mean())
    rows = torch.cat([x / len(x) ** 0.5, ridge**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    left = rows[:, torch.from_numpy(~gone)]
    targets = rows @ w.T
    new = torch.linalg.lstsq(left, targets, driver="gelsd").solution
    return float((left @ new - targets).square().sum())


def brute_force(x: Tensor, w: Tensor, units: np.ndarray, rounds: int, damping: float) -> np.ndarray:
    """Greedy: every unit left is tried in the round, refitted, and the error that it adds is measured."""
    count = int(units.max()) + 1
    errors, gone, level = np.zeros(count), np.zeros(len(units), dtype=bool), 0.0
    left, step = list(range(count)), -(-count // rounds)
    while left:
        base = lost(x, w, gone, damping)
        added = {unit: lost(x, w, gone | (units == unit), damping) - base for unit in left}
        for unit in sorted(left, key=added.__getitem__)[:step]:
            level = errors[unit] = max(level, added[unit])
            gone = gone | (units == unit)
            left.remove(unit)
    return errors


def removal(x: Tensor, w: Tensor, units: np.ndarray, rounds: int, damping: float, **options) -> RemovalCost:
    return obs_removal(w, gram(x), units, rounds, damping, **options)


@given(problems(), dampings)
def test_one_unit_a_round_is_greedy_removal_with_a_refit_after_each(problem, damping):
    x, w, units = problem
    count = int(units.max()) + 1
    found = removal(x, w, units, count, damping).error
    expected = brute_force(x, w, units, count, damping)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7 * expected.max())


@given(problems(), dampings, st.integers(1, 5))
def test_units_of_the_same_round_are_judged_together(problem, damping, rounds):
    x, w, units = problem
    rounds = min(rounds, int(units.max()) + 1)
    found = removal(x, w, units, rounds, damping).error
    expected = brute_force(x, w, units, rounds, damping)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7 * expected.max())


def one_shot(x: Tensor, w: Tensor, units: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """tr(W_u ((C + lambda I)^-1_uu)^-1 W_u^T) of every unit in the dense model, and tr(W_u C_uu W_u^T)."""
    c = gram(x).numpy()
    inverse = np.linalg.inv(c + damping * np.trace(c) / len(c) * np.eye(len(c)))
    errors, alone = [], []
    for unit in range(int(units.max()) + 1):
        own = np.flatnonzero(units == unit)
        weight = w.numpy()[:, own]
        errors.append(np.trace(weight @ np.linalg.inv(inverse[np.ix_(own, own)]) @ weight.T))
        alone.append(np.trace(weight @ c[np.ix_(own, own)] @ weight.T))
    return np.array(errors), np.array(alone)


@given(problems(), dampings)
def test_a_single_round_is_the_formula_in_the_dense_model(problem, damping):
    x, w, units = problem
    errors, alone = one_shot(x, w, units, damping)
    found = removal(x, w, units, 1, damping)
    np.testing.assert_allclose(found.error, errors, rtol=1e-6)
    np.testing.assert_allclose(found.share, (errors / alone).clip(0, 1), rtol=1e-6)


@given(problems(), dampings, st.integers(1, 5))
def test_the_share_is_of_the_dense_model_and_between_0_and_1_whatever_the_rounds(problem, damping, rounds):
    x, w, units = problem
    found = removal(x, w, units, min(rounds, int(units.max()) + 1), damping)
    assert ((found.share >= 0) & (found.share <= 1)).all()
    np.testing.assert_array_equal(found.share, removal(x, w, units, 1, damping).share)


@given(st.integers(0, 2**31), st.sampled_from([1, 3]))
def test_errors_do_not_fall_in_the_order_of_removal(seed, width):
    """Each is at least the true increase of the error in that order, and at least the one before."""
    count = 6
    x, mixing, w = random_tensors(seed, (60, count * width), (count * width,) * 2, (4, count * width))
    x, units = x @ mixing, np.repeat(np.arange(count), width)
    errors = removal(x, w, units, count, 1e-2).error
    order = np.argsort(errors, kind="stable")
    if len(set(errors)) < count:  # raised to that of the unit before: their order does not show
        return
    gone, totals = np.zeros(len(units), dtype=bool), [0.0]
    for unit in order:
        gone = gone | (units == unit)
        totals.append(lost(x, w, gone, 1e-2))
    np.testing.assert_allclose(errors[order], [two - one for one, two in pairwise(totals)], rtol=1e-5)


@pytest.mark.parametrize("width", [1, 3])
def test_a_duplicate_costs_nothing_until_its_twin_is_gone(width):
    own, w = random_tensors(0, (200, 2 * width), (4, 4 * width))
    x = torch.cat([own, own[:, :width], random_tensors(1, (200, width))[0]], 1)  # units 0 and 2 are the same
    found = removal(x, w, np.repeat(np.arange(4), width), 4, 1e-9)
    assert (found.share[[0, 2]] < 1e-6).all()
    assert (found.share[[1, 3]] > 0.5).all()
    cheap, dear = sorted(found.error[[0, 2]])
    assert cheap < 1e-6 * dear


@pytest.mark.parametrize("width", [1, 3])
def test_nothing_stands_in_for_independent_inputs(width):
    (noise, w) = random_tensors(0, (60, 4 * width), (3, 4 * width))
    x = torch.linalg.qr(noise)[0] * 60**0.5  # C = 1
    found = removal(x, w, np.repeat(np.arange(4), width), 4, 1e-9)
    np.testing.assert_allclose(found.share, 1, rtol=1e-6)
    np.testing.assert_allclose(found.error, w.square().sum(0).view(4, width).sum(1), rtol=1e-6)


def test_a_unit_without_weights_costs_nothing():
    x, w = random_tensors(0, (60, 4), (3, 4))
    w[:, 1] = 0
    found = removal(x, w, np.arange(4), 4, 1e-2)
    assert found.error[1] == found.share[1] == 0


@given(problems(), dampings, st.integers(1, 5), st.integers(0, 2**31))
def test_output_weights_are_scaled_rows(problem, damping, rounds, seed):
    x, w, units = problem
    rounds = min(rounds, int(units.max()) + 1)
    factors = random_tensors(seed, (len(w),))[0].square()
    one = removal(x, w, units, rounds, damping, output_weights=factors)
    two = removal(x, w * factors.sqrt()[:, None], units, rounds, damping)
    np.testing.assert_allclose(one.error, two.error, rtol=1e-9)
    np.testing.assert_allclose(one.share, two.share, rtol=1e-9)


@given(problems(), dampings, st.integers(1, 5), st.randoms(use_true_random=False))
def test_units_and_positions_that_change_places_take_their_costs_along(problem, damping, rounds, random):
    x, w, units = problem
    count = int(units.max()) + 1
    renamed, places = np.arange(count), np.arange(len(units))
    random.shuffle(renamed)
    random.shuffle(places)
    one = removal(x, w, units, min(rounds, count), damping)
    two = removal(x[:, places], w[:, places], renamed[units][places], min(rounds, count), damping)
    for before, after in ((one.error, two.error), (one.share, two.share)):
        np.testing.assert_allclose(after[renamed], before, rtol=1e-6, atol=1e-9 * before.max())


def test_nothing_that_is_given_is_changed():
    x, w = random_tensors(0, (60, 6), (3, 6))
    c, factors = gram(x), torch.ones(3, dtype=torch.float64)
    before = [tensor.clone() for tensor in (w, c, factors)]
    obs_removal(w, c, np.arange(6), 3, 1e-2, factors)
    assert all(torch.equal(one, two) for one, two in zip(before, (w, c, factors), strict=True))


def test_a_gram_matrix_of_nan_is_refused():
    x, w = random_tensors(0, (60, 6), (3, 6))
    with pytest.raises(StatisticsError, match=r"not positive definite; raise score\.obs_damping"):
        removal(torch.nan * x, w, np.arange(6), 3, 1e-2)


def test_where_all_inputs_are_zero_no_removal_costs_anything():
    x, w = random_tensors(0, (60, 6), (3, 6))
    found = removal(0 * x, w, np.arange(6), 3, 1e-2)
    assert found.error.tolist() == found.share.tolist() == [0.0] * 6
