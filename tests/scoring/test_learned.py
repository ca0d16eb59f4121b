"""Fits of criteria to measured losses: what they find, how sure they are, and what they refuse."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from libprune.engine.errors import LibpruneError
from libprune.scoring.learned import CLEAR, best_criterion, fit_losses, held_out_r2


@given(arrays(float, 3, elements=st.integers(0, 5).map(float)), st.integers(0, 99))
def test_the_fit_gives_back_the_mixture_that_losses_were_made_from(weights, seed):
    assume(weights.any())
    rng = np.random.default_rng(seed)
    criteria = dict(zip("abc", rng.exponential(size=(3, 40)) * [[1e-6], [1.0], [1e4]], strict=True))
    losses = np.sum([w * criteria[name] for w, name in zip(weights, "abc", strict=True)], axis=0)
    fit = fit_losses(criteria, losses, "mlp")
    assert fit.r2 == pytest.approx(1)
    assert fit.units == 40
    predicted = np.sum([fit.coefficients[name] * criteria[name] for name in "abc"], axis=0)
    np.testing.assert_allclose(predicted, losses, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("strength", "least", "most"), [(0.0, 0, 8), (1.5, 95, 100)])
def test_of_a_hundred_fits_few_are_taken_for_noise_and_nearly_all_for_what_is_there(strength, least, most):
    taken = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        criteria = dict(zip("ab", rng.exponential(size=(2, 60)), strict=True))
        r2, error = held_out_r2(
            np.column_stack(list(criteria.values())), strength * criteria["a"] + rng.normal(size=60)
        )
        taken += r2 > CLEAR * error
    assert least <= taken <= most


@given(st.integers(0, 99))
def test_the_standard_error_of_r2_shrinks_with_the_root_of_the_number_of_units(seed):
    rng = np.random.default_rng(seed)
    features = rng.exponential(size=(4000, 1))
    target = features[:, 0] + rng.normal(size=4000)
    ratio = held_out_r2(features[:250], target[:250])[1] / held_out_r2(features, target)[1]
    assert 2 < ratio < 8


def test_losses_that_fall_as_all_criteria_rise_are_refused_with_figures_and_a_remedy():
    criteria = {"taylor": np.arange(20.0), "wanda": np.arange(20.0) ** 2}
    with pytest.raises(LibpruneError, match=r"R² -\d+\.\d+ ± \d\.\d+ on held-out units, of 20 .* raise ablation.units"):
        fit_losses(criteria, 30 - np.arange(20.0), "attention")
    with pytest.raises(LibpruneError, match=r"no criterion that predicts attention: .* taylor -1.00, wanda -1.00"):
        best_criterion(criteria, 30 - np.arange(20.0), "attention")


def test_losses_that_are_all_alike_explain_nothing():
    with pytest.raises(LibpruneError, match="explains nothing"):
        fit_losses({"taylor": np.arange(20.0)}, np.ones(20), "mlp")


@pytest.mark.parametrize(("criteria", "units", "least"), [(1, 9, 10), (2, 9, 10), (3, 14, 15)])
def test_too_few_measured_units_are_refused_with_their_number(criteria, units, least):
    values = {name: np.arange(float(units)) for name in "abc"[:criteria]}
    with pytest.raises(LibpruneError, match=f"measured {units} mlp units of at least {least}"):
        fit_losses(values, np.arange(float(units)), "mlp")


@given(arrays(float, 12, elements=st.integers(0, 50).map(float)), st.integers(0, 99))
def test_the_best_criterion_is_the_one_whose_order_is_that_of_the_losses(losses, seed):
    assume(np.ptp(losses) > 0)
    noise = np.random.default_rng(seed).permutation(12).astype(float)
    criteria = {"noise": noise, "cube": losses**3, "constant": np.ones(12)}
    best, found = best_criterion(criteria, losses, "mlp")
    assert found["cube"] == pytest.approx(1)
    assert found["constant"] == 0
    assert found[best] == max(found.values())
