"""Fusion as arithmetic: expressions, weights by how far a criterion tells units apart, and fits to measured losses."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from libprune.engine.errors import LibpruneError
from libprune.pipeline.sections import Score
from libprune.scoring.expression import format_criteria, named_criteria, parse_criteria
from libprune.scoring.fusion import adaptive_weights
from libprune.scoring.learned import (
    CLEAR,
    best_criterion,
    fit_losses,
    held_out_r2,
)

NAMES = st.lists(st.sampled_from(["taylor", "taylor_2nd", "wanda", "obs"]), min_size=1, max_size=4, unique=True)
LEVELS = st.integers(0, 50).map(float)
"""Whole numbers, so that no difference is lost in rounding."""


def importances(units: int = 6):
    return arrays(float, (3, units), elements=LEVELS)


# Expressions


@given(NAMES, st.data())
def test_an_expression_reads_back_as_the_weights_that_it_was_written_from(names, data):
    counts = data.draw(st.lists(st.integers(1, 8), min_size=len(names), max_size=len(names)))
    written = "+".join(f" {count}*{name} " for name, count in zip(names, counts, strict=True))
    weights = parse_criteria(written, "weighted")
    assert list(weights) == names
    assert weights == pytest.approx({name: c / sum(counts) for name, c in zip(names, counts, strict=True)})
    assert parse_criteria(format_criteria(weights), "weighted") == pytest.approx(weights, rel=1e-4)


@pytest.mark.parametrize("fusion", ["simple", "adaptive", "learned", "best", "weighted"])
def test_names_without_weights_count_alike_under_every_fusion(fusion):
    assert parse_criteria("taylor+wanda", fusion) == {"taylor": 0.5, "wanda": 0.5}
    assert parse_criteria("taylor", fusion) == {"taylor": 1}


@pytest.mark.parametrize(
    ("text", "fusion", "message"),
    [
        ("taylor+", "weighted", "'' in score.criterion"),
        ("taylor-wanda", "weighted", "'taylor-wanda' in score.criterion = 'taylor-wanda' is no criterion"),
        ("-1*taylor+wanda", "weighted", "'-1\\*taylor' in"),
        ("taylor+2*taylor", "weighted", "names taylor twice"),
        ("0*taylor+0*wanda", "weighted", "all weights .* are 0"),
        ("2*taylor+wanda", "learned", "learned does not read"),
    ],
)
def test_what_is_no_expression_is_refused_by_name(text, fusion, message):
    with pytest.raises(LibpruneError, match=message):
        parse_criteria(text, fusion)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("taylor + ?", r"^'\?' in score\.mlp = 'taylor \+ \?' is no criterion"),
        ("taylor + wonda", r"^score\.mlp = 'wonda' is unknown; did you mean 'wanda'"),
    ],
)
def test_an_error_names_the_key_that_the_expression_stands_in(text, message):
    with pytest.raises(LibpruneError, match=message):
        named_criteria(Score(criterion="taylor", mlp=text))


# Adaptive weights


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


# Fits to measured losses


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


@given(arrays(float, 12, elements=LEVELS), st.integers(0, 99))
def test_the_best_criterion_is_the_one_whose_order_is_that_of_the_losses(losses, seed):
    assume(np.ptp(losses) > 0)
    noise = np.random.default_rng(seed).permutation(12).astype(float)
    criteria = {"noise": noise, "cube": losses**3, "constant": np.ones(12)}
    best, found = best_criterion(criteria, losses, "mlp")
    assert found["cube"] == pytest.approx(1)
    assert found["constant"] == 0
    assert found[best] == max(found.values())
