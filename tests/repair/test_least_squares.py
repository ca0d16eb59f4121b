"""The repair of a consumer, against the ridge problem that it claims to solve."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from libprune.engine.architecture import Map
from libprune.engine.axes import parse_expr
from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError, StatisticsError
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked, oriented
from libprune.repair.least_squares import (
    DAMPINGS,
    DenseTarget,
    Fit,
    Inputs,
    Moments,
    Unseen,
    dense_problem,
    fisher_weighting,
    fit_consumer,
    fit_table,
    mean_errors,
    new_parameters,
    pruned_consumers,
    repair_bias,
    repair_local,
    solve,
)
from tests.support.collected import activations, of_layers
from tests.support.models import FAMILIES, plan_of, tokens
from tests.support.tensors import gram, random_tensors
from tests.support.weights import conv1d_stored

dampings = st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 30.0])


@st.composite
def problems(draw):
    """Inputs ``[samples, inputs]``, a weight, and a choice of kept inputs; sometimes fewer samples than inputs."""
    inputs, outputs, samples = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 20))
    x, w = random_tensors(draw(st.integers(0, 2**31)), (samples, inputs), (outputs, inputs))
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=inputs, max_size=inputs).filter(any)))
    return x, w, kept


def moments_of(x: Tensor, w: Tensor, kept: Tensor) -> Moments:
    return Moments.of_dense(w, gram(x), kept, len(x))


def ridge_weights(w: Tensor, c: Tensor, kept: Tensor, damping: float) -> Tensor:
    """The whole new weight, zero at what is removed."""
    whole = torch.zeros_like(w, dtype=torch.float64)
    whole[:, kept] = solve(Moments.of_dense(w, c, kept), w[:, kept], damping)[0]
    return whole


def error(x: Tensor, w: Tensor, other: Tensor) -> float:
    """Mean squared output error over the samples."""
    return float((x @ (w - other).T).square().sum(1).mean())


def share_lost(x: Tensor, y: Tensor, given: Tensor) -> float:
    """Mean squared error of an output over the mean square of what it should be."""
    return float((y - given).square().sum() / y.square().sum())


# The ridge problem


@given(problems(), dampings)
def test_it_is_the_solution_of_the_ridge_problem_pulled_towards_the_old_weights(problem, damping):
    """Against least squares with rows added for the ridge: sqrt(lambda E[x_j^2]) (W' - W_K) = 0."""
    x, w, kept = problem
    ridge = (damping * x[:, kept].square().mean(0)).sqrt()
    rows = torch.cat([x[:, kept] / len(x) ** 0.5, ridge.diag()])
    targets = torch.cat([x @ w.T / len(x) ** 0.5, ridge[:, None] * w[:, kept].T])
    expected = torch.linalg.lstsq(rows, targets, driver="gelsd").solution.T
    found, used = solve(moments_of(x, w, kept), w[:, kept], damping)
    assert used == damping
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@given(problems(), dampings, st.integers(0, 2**31))
def test_a_target_that_the_weights_never_gave_is_fitted_as_well(problem, damping, seed):
    x, w, kept = problem
    (y,) = random_tensors(seed, (len(x), len(w)))
    x = x[:, kept]
    moments = Moments(gram(x), y.T @ x / len(x), float(y.square().sum(1).mean()), len(x))
    ridge = (damping * x.square().mean(0)).sqrt()
    rows = torch.cat([x / len(x) ** 0.5, ridge.diag()])
    targets = torch.cat([y / len(x) ** 0.5, ridge[:, None] * w[:, kept].T])
    expected = torch.linalg.lstsq(rows, targets, driver="gelsd").solution.T
    torch.testing.assert_close(solve(moments, w[:, kept], damping)[0], expected, rtol=1e-5, atol=1e-6)


@given(problems(), dampings)
def test_the_calibration_error_never_grows(problem, damping):
    x, w, kept = problem
    before = error(x, w, w * kept)
    assert error(x, w, ridge_weights(w, gram(x), kept, damping)) <= before * (1 + 1e-9) + 1e-12


@given(problems())
def test_less_damping_never_fits_worse(problem):
    x, w, kept = problem
    errors = [error(x, w, ridge_weights(w, gram(x), kept, damping)) for damping in (1e-6, 1e-3, 0.1, 10.0)]
    assert all(one <= two * (1 + 1e-6) + 1e-12 for one, two in pairwise(errors))


@given(problems(), dampings)
def test_keeping_everything_gives_the_weight_back(problem, damping):
    x, w, kept = problem
    torch.testing.assert_close(ridge_weights(w, gram(x), torch.ones_like(kept), damping), w)


@given(problems())
def test_much_damping_gives_the_old_weights_back(problem):
    x, w, kept = problem
    torch.testing.assert_close(ridge_weights(w, gram(x), kept, 1e12), w * kept, rtol=1e-6, atol=1e-9)


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4))
def test_what_the_kept_inputs_can_say_of_the_pruned_ones_is_recovered(seed, kept_count, pruned_count):
    basis, mixing, w = random_tensors(
        seed, (200, kept_count), (kept_count, pruned_count), (3, kept_count + pruned_count)
    )
    x = torch.cat([basis, basis @ mixing], 1)
    kept = torch.arange(x.shape[1]) < kept_count
    found = ridge_weights(w, gram(x), kept, 1e-12)
    torch.testing.assert_close(found[:, kept], w[:, kept] + w[:, ~kept] @ mixing.T, rtol=1e-6, atol=1e-6)
    assert error(x, w, found) <= 1e-12 * error(x, w, 0 * w)


@given(problems(), dampings, st.integers(0, 2**31))
def test_the_scale_of_each_input_changes_nothing(problem, damping, seed):
    """What an input gains in size its weight loses; the outputs of the repaired map are the same."""
    x, w, kept = problem
    scale = 10.0 ** (torch.rand(x.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4 - 2)
    one, other = ridge_weights(w, gram(x), kept, damping), ridge_weights(w / scale, gram(x * scale), kept, damping)
    torch.testing.assert_close(other * scale, one, rtol=1e-4, atol=1e-6)


def test_an_input_that_is_always_zero_keeps_its_weight_and_disturbs_no_other():
    x, w = random_tensors(0, (50, 4), (2, 4))
    kept = torch.tensor([True, False, True, True])
    x[:, 2] = 0
    found = ridge_weights(w, gram(x), kept, 1e-2)
    torch.testing.assert_close(found[:, 2], w[:, 2])
    without = torch.tensor([True, False, False, True])
    torch.testing.assert_close(found[:, [0, 3]], ridge_weights(w, gram(x), without, 1e-2)[:, [0, 3]])


@pytest.mark.parametrize("problem", [DenseTarget, Moments])
@pytest.mark.parametrize("damping", [None, 1e-3])
def test_where_all_kept_inputs_are_zero_the_old_weights_stay(problem, damping):
    """What the removed inputs gave cannot be given back; on other text the kept weights may still be of use."""
    x, w, unseen = random_tensors(0, (50, 4), (2, 4), (20, 4))
    kept = torch.tensor([True, False, True, False])
    x[:, kept] = 0
    given = DenseTarget.of(w, gram(x), kept) if problem is DenseTarget else moments_of(x, w, kept)
    refit = {"held_out": moments_of(unseen, w, kept), "refit": problem is Moments}
    fit = fit_consumer(CONSUMER, w, kept, given, damping=damping, **refit)
    assert torch.equal(fit.weight, w * kept)
    assert np.isnan(fit.damping)
    assert fit.before == fit.after == pytest.approx(1.0)
    assert 0 < fit.held_out_before == fit.held_out_after


def indefinite(lowest: float) -> Tensor:
    """A symmetric matrix with a mean diagonal of 1 whose lowest eigenvalue is given, as rounded sums may have."""
    return torch.tensor([[1.0, 1.0 - lowest], [1.0 - lowest, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("lowest", "damping", "used"),
    [
        (-0.005, 0.02, 0.02),
        (-0.005, 1e-5, 1e-2),
        (-0.05, 1e-4, 0.1),
        (-0.05, 0.03, 0.3),
        (-0.4, 0.3, 3.0),
        (-4.0, 2.0, 20.0),
        (-20.0, 20.0, 100.0),
    ],
)
def test_the_damping_grows_by_tens_until_the_matrix_is_positive_definite(lowest, damping, used):
    c, w = indefinite(lowest), torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    moments = Moments(c, torch.tensor([[1.0, -1.0]], dtype=torch.float64), 1.0, 1)
    found, took = solve(moments, w, damping)
    assert took == pytest.approx(used)
    ridge = took * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(found @ (c + ridge), moments.cross + took * w)


def test_a_singular_gram_matrix_is_solved_with_damping():
    x, w = torch.ones(5, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    found = ridge_weights(w, gram(x), torch.tensor([True, True, False]), 1e-6)
    torch.testing.assert_close(found.sum(1), w.sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", [0.0, torch.nan])
def test_a_gram_matrix_without_any_input_or_of_nan_is_refused(factor):
    x, w = random_tensors(0, (50, 3), (2, 3))
    kept = torch.tensor([True, True, False])
    with pytest.raises(StatisticsError, match=r"not positive definite with slice\.damping = .*more calibration text"):
        solve(moments_of(factor * x, w, kept), w[:, kept], 1e-3)


def test_a_matrix_that_no_damping_up_to_100_helps_is_refused():
    moments = Moments(indefinite(-150.0), torch.zeros(1, 2, dtype=torch.float64), 1.0, 1)
    with pytest.raises(StatisticsError, match=r"slice\.damping = 100;"):
        solve(moments, torch.ones(1, 2, dtype=torch.float64), 1e-3)


# Moments


@given(problems(), st.integers(0, 2**31))
def test_the_error_of_moments_is_that_of_the_data(problem, seed):
    x, w, kept = problem
    (other,) = random_tensors(seed, (len(w), int(kept.sum())))
    y = x @ w.T
    found = moments_of(x, w, kept).error(other)
    assert found == pytest.approx(share_lost(x, y, x[:, kept] @ other.T), rel=1e-9, abs=1e-12)


def test_where_there_is_no_output_nothing_is_lost():
    x, w = random_tensors(0, (9, 3), (2, 3))
    assert moments_of(x, 0 * w, torch.tensor([True, True, False])).error(w[:, :2]) == 0


@given(problems(), st.data())
def test_joined_moments_are_those_of_the_joined_data(problem, data):
    x, w, kept = problem
    assume(len(x) > 1)
    cut = data.draw(st.integers(1, len(x) - 1))
    joined, whole = (
        moments_of(x[:cut], w, kept).join(moments_of(x[cut:], w, kept)),
        moments_of(x, w, kept),
    )
    assert joined.tokens == whole.tokens == len(x)
    assert joined.square == pytest.approx(whole.square)
    torch.testing.assert_close(joined.gram, whole.gram)
    torch.testing.assert_close(joined.cross, whole.cross)


@given(problems(), dampings, st.integers(0, 2**31))
def test_a_dense_target_has_the_solution_and_the_errors_of_its_moments(problem, damping, seed):
    x, w, kept = problem
    moments, target, unseen = moments_of(x, w, kept), DenseTarget.of(w, gram(x), kept), Unseen.of(w, x, kept)
    (expected, used), (found, took) = (solve(one, w[:, kept], damping) for one in (moments, target))
    assert took == used
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    for weight in (w[:, kept], found, *random_tensors(seed, found.shape)):
        lost = share_lost(x, x @ w.T, x[:, kept] @ weight.T)
        assert target.error(weight) == pytest.approx(lost, rel=1e-9, abs=1e-12)
        assert unseen.error(weight) == pytest.approx(lost, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dense_target_of_coarse_numbers_is_computed_in_finer_ones(dtype):
    x, w = random_tensors(0, (300, 8), (3, 8))
    kept, w = torch.arange(8) < 6, w.to(dtype)
    inputs = Inputs(gram(x).to(dtype), x.to(dtype))
    target, unseen = dense_problem(w, inputs, kept, 0.0)
    moments = moments_of(inputs.held_out.double(), w, kept)
    rows = Moments.of_dense(w, inputs.gram, kept)
    (found, _), (expected, _) = solve(target, w[:, kept], 0.1), solve(rows, w[:, kept], 0.1)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected)
    assert target.error(found) == pytest.approx(rows.error(found), rel=1e-4)
    assert unseen.error(found) == pytest.approx(moments.error(found), rel=1e-4)


def test_a_dense_target_without_output_loses_nothing():
    x, w = random_tensors(0, (9, 3), (2, 3))
    kept = torch.tensor([True, True, False])
    for problem in (DenseTarget.of(0 * w, gram(x), kept), Unseen.of(0 * w, x, kept)):
        assert problem.error(w[:, :2]) == 0


# The fit of a consumer

CONSUMER = Map("layers.3.out", 3, "part", parse_expr("d"), parse_expr("u"), transposed=False)


def split_problem(fit_tokens: int, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of the fit and held-out ones, a weight, and what is kept.

    The removed inputs are sums of kept ones and noise, and the kept ones are alike to one part in 30.
    """
    common, own, mixing, w, extra = random_tensors(0, (4000, 1), (4000, 12), (12, 4), (3, 16), (4000, 4))
    kept_inputs = common + own / 30
    x = torch.cat([kept_inputs, kept_inputs @ mixing / 4 + noise * extra], 1)
    return x[:fit_tokens], x[-2000:], w, torch.arange(16) < 12


def fitted(fit_tokens: int, noise: float, damping: float | None, refit: bool = False) -> Fit:
    x, held, w, kept = split_problem(fit_tokens, noise)
    return fit_consumer(CONSUMER, w, kept, moments_of(x, w, kept), moments_of(held, w, kept), damping, refit)


@pytest.mark.parametrize(
    ("fit_tokens", "noise", "best"), [(16, 1.0, 1e-1), (2000, 0.0, min(DAMPINGS))], ids=["few", "many"]
)
def test_auto_takes_the_damping_that_does_best_on_what_the_fit_has_not_seen(fit_tokens, noise, best):
    fits = {damping: fitted(fit_tokens, noise, damping) for damping in DAMPINGS}
    auto = fitted(fit_tokens, noise, None)
    assert auto.damping == best == min(fits, key=lambda damping: fits[damping].held_out_after)
    assert auto.held_out_after == fits[best].held_out_after
    assert torch.equal(auto.weight, fits[best].weight)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("damping", [None, 1e-2])
def test_the_errors_of_a_fit_are_those_of_the_data_and_a_refit_learns_from_all_of_it(damping, refit):
    x, held, w, kept = split_problem(40, 0.3)
    fit = fit_consumer(CONSUMER, w, kept, moments_of(x, w, kept), moments_of(held, w, kept), damping, refit)
    alone = ridge_weights(w, gram(x), kept, fit.damping)
    for data, before, after in ((x, fit.before, fit.after), (held, fit.held_out_before, fit.held_out_after)):
        y = data @ w.T
        assert before == pytest.approx(share_lost(data, y, data @ (w * kept).T))
        assert after == pytest.approx(share_lost(data, y, data @ alone.T))
    everything = torch.cat([x, held])
    expected = ridge_weights(w, gram(everything), kept, fit.damping) if refit else alone
    torch.testing.assert_close(fit.weight, expected)


def test_auto_is_refused_without_held_out_sequences():
    x, _, w, kept = split_problem(40, 0.3)
    with pytest.raises(LibpruneError, match=r"slice\.damping: auto chooses by every eighth calibration sequence"):
        fit_consumer(CONSUMER, w, kept, moments_of(x, w, kept), None, None)


def test_without_held_out_sequences_their_errors_are_unknown():
    x, _, w, kept = split_problem(40, 0.3)
    fit = fit_consumer(CONSUMER, w, kept, moments_of(x, w, kept), None, 1e-3, refit=True)
    assert np.isnan([fit.held_out_before, fit.held_out_after]).all()
    assert 0 < fit.after < fit.before
    assert not fit.weight[:, ~kept].any()


def test_the_damping_that_was_used_is_reported():
    w, kept = torch.ones(1, 2, dtype=torch.float64), torch.tensor([True, True])
    moments = Moments(indefinite(-0.005), torch.ones(1, 2, dtype=torch.float64), 1.0, 1)
    assert fit_consumer(CONSUMER, w, kept, moments, None, 1e-4).damping == pytest.approx(1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_keep_their_dtype_and_lose_only_its_rounding(dtype):
    x, _ = random_tensors(0, (50, 4), (1,))
    w, kept = torch.ones(2, 4, dtype=dtype), torch.tensor([True, False, True, True])
    found = fit_consumer(CONSUMER, w, kept, moments_of(x, w, kept), None, 1e-3).weight
    assert found.dtype == dtype
    assert torch.equal(found, ridge_weights(w, gram(x), kept, 1e-3).to(dtype))


def test_fits_become_parameters_a_table_and_mean_errors():
    other = Map("layers.4.out", 4, "part", parse_expr("d"), parse_expr("u"), transposed=False)
    weight, bias = torch.ones(2, 3), torch.zeros(2)
    fits = [Fit(CONSUMER, weight, None, 0.1, 0.5, 0.2, 0.6, 0.3), Fit(other, None, bias, 0.0, 0.3, 0.1, 0.2, 0.1)]
    assert new_parameters(fits) == {"layers.3.out.weight": weight, "layers.4.out.bias": bias}
    table = fit_table(fits)
    assert np.isnan([table.pop(name) for name in ("layer_before", "layer_after")]).all()
    assert {name: values.tolist() for name, values in table.items()} == {
        "layer_idx": [3, 4],
        "group_type": ["part", "part"],
        "module": ["layers.3.out", "layers.4.out"],
        "damping": [0.1, 0.0],
        "before": [0.5, 0.3],
        "after": [0.2, 0.1],
        "held_out_before": [0.6, 0.2],
        "held_out_after": [0.3, 0.1],
        "others": [False, False],
    }
    means = {"before": 0.4, "after": 0.15, "held_out_before": 0.4, "held_out_after": 0.2}
    assert mean_errors(fits) == pytest.approx({f"lost_{name}": value for name, value in means.items()})


def test_of_a_trained_layer_all_fits_have_its_errors_and_the_mean_counts_it_once():
    fit = Fit(CONSUMER, torch.ones(2, 3), None, 0.1, 0.5, 0.2, 0.6, 0.3)
    other = Map("layers.4.out", 4, "part", parse_expr("d"), parse_expr("u"), transposed=False)
    trained = replace(fit, layer_before=0.4, layer_after=0.2)
    once = replace(fit, consumer=other, layer_before=0.1, layer_after=0.1)
    found = mean_errors([trained, trained, once])
    assert (found["layer_before"], found["layer_after"]) == pytest.approx((0.25, 0.15))
    assert "layer_before" not in mean_errors([fit])


def test_a_figure_that_no_fit_has_is_left_out_and_the_mean_is_of_those_that_have_it():
    fit = Fit(CONSUMER, torch.ones(2, 3), None, 0.1, 0.5, 0.2, 0.6, 0.3)
    unseen = replace(fit, held_out_before=np.nan, held_out_after=np.nan)
    assert mean_errors([unseen]) == {"lost_before": 0.5, "lost_after": 0.2}
    assert mean_errors([unseen, fit])["lost_held_out_after"] == 0.3


def test_no_fits_make_no_parameters_no_errors_and_an_empty_table():
    assert new_parameters([]) == mean_errors([]) == {}
    assert {len(values) for values in fit_table([]).values()} == {0}


# Fisher weighting

shares = st.floats(0.0, 1.0)


@given(problems(), st.integers(0, 2**31), shares)
def test_the_fisher_weighting_mixes_in_the_scaled_matrix_and_keeps_the_trace(problem, seed, share):
    x, _, _ = problem
    c, curvature = gram(x), random_tensors(seed, (x.shape[1],))[0].square()
    root = curvature.sqrt().diag()
    scaled = root @ c @ root
    expected = (1 - share) * c + share * scaled * (c.trace() / scaled.trace())
    found = c * fisher_weighting(c, curvature, share)
    torch.testing.assert_close(found, expected)
    assert float(found.trace()) == pytest.approx(float(c.trace()))


@given(problems(), shares)
def test_a_share_of_0_no_curvature_and_equal_curvature_leave_the_gram_matrix(problem, share):
    x, _, _ = problem
    c = gram(x)
    equal = torch.full((len(c),), 0.37)
    for factors in (
        fisher_weighting(c, equal, 0.0),
        fisher_weighting(c, torch.arange(len(c)) + 1.0, 0.0),
        fisher_weighting(c, None, share),
        fisher_weighting(c, equal, share),
    ):
        torch.testing.assert_close(c * factors, c, rtol=1e-6, atol=0)


# On models

LLAMA_CONSUMERS = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}


def reading(model, sequences: int = 8, curvature: Tensor | None = None):
    """What the activations stage knows of a model's consumers."""
    found = of_layers(activations(model, 8, tokens(sequences, 12)))

    def inputs_of(consumer: Map) -> Inputs:
        return Inputs(found[f"{consumer.module}.input_gram"], None, curvature)

    return inputs_of


def repaired(model, plan: Plan, damping: float = 1e-3, **options) -> list[Fit]:
    return repair_local(describe(model), plan, model.state_dict().__getitem__, reading(model), damping, **options)


def some_pruned(layer: int, part: str) -> int:
    """One attention gone, one MLP whole, everything else thinner."""
    return {(0, "attention"): 0, (1, "mlp"): 13}.get((layer, part), {"attention": 2, "mlp": 7}[part])


@pytest.mark.parametrize("stored", [lambda model: model, conv1d_stored], ids=["linear", "conv1d"])
def test_every_pruned_consumer_is_refitted_in_its_own_storage_order(stored):
    model = stored(FAMILIES["llama"](0))
    architecture = describe(model)
    plan = plan_of(architecture, some_pruned)
    new = new_parameters(repaired(model, plan))
    pruned = {block for block, keep in plan.keep.items() if keep.any() and not keep.all()}
    assert set(new) == {f"model.layers.{layer}.{LLAMA_CONSUMERS[part]}.weight" for layer, part in pruned}
    plain = new_parameters(repaired(FAMILIES["llama"](0), plan))
    for name, weight in new.items():
        assert weight.is_contiguous()
        assert weight.shape == model.get_parameter(name).shape
        whole = weight if stored is not conv1d_stored else weight.T
        torch.testing.assert_close(whole, plain[name], rtol=1e-3, atol=1e-4)


def test_a_local_repair_fits_to_the_weighted_matrix_and_is_judged_by_it():
    """Its held-out rows weigh as much as the matrix of the fit."""
    model = FAMILIES["llama"](0)
    architecture = describe(model)
    plan = plan_of(architecture, some_pruned)
    rows, grams, curvatures = {}, {}, {}
    for number, (consumer, kept) in enumerate(pruned_consumers(architecture, plan)):
        text, held, gradient = random_tensors(number, (200, len(kept)), (60, len(kept)), (len(kept),))
        rows[consumer], grams[consumer], curvatures[consumer] = held.float(), gram(text).float(), gradient.square()

    def inputs_of(consumer: Map) -> Inputs:
        return Inputs(grams[consumer], rows[consumer], curvatures[consumer])

    fits = repair_local(architecture, plan, model.state_dict().__getitem__, inputs_of, 0.01, 0.4)
    assert [fit.consumer for fit in fits] == list(rows)
    for fit, (consumer, kept) in zip(fits, pruned_consumers(architecture, plan), strict=True):
        w, c, root = (
            model.get_parameter(consumer.weight).detach().double(),
            grams[consumer].double(),
            curvatures[consumer].sqrt(),
        )
        factors = 0.6 + 0.4 * torch.outer(root, root) * (c.trace() / (c.diagonal() * root.square()).sum())
        expected = ridge_weights(w, c * factors, kept, 0.01)
        torch.testing.assert_close(fit.weight.double(), expected, rtol=1e-4, atol=1e-5)
        lost = (w - expected) @ (gram(rows[consumer].double()) * factors) @ (w - expected).T
        total = w @ (gram(rows[consumer].double()) * factors) @ w.T
        assert fit.held_out_after == pytest.approx(float(lost.trace() / total.trace()), rel=1e-4)


def test_the_first_repaired_consumers_own_output_comes_nearer_to_the_dense_one():
    """For the first layer's attention the inputs are the dense ones, so its output error is what is minimised."""
    model = FAMILIES["llama"](0)
    architecture = describe(model)
    plan = plan_of(
        architecture, lambda layer, part: 2 if (layer, part) == (0, "attention") else architecture.units(part)
    )
    consumer = model.model.layers[0].self_attn.o_proj

    def output() -> Tensor:
        outputs = []
        handle = consumer.register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
        with torch.no_grad(), masked(model, architecture, active):
            model(input_ids=tokens(7, 12), use_cache=False)
        handle.remove()
        return outputs[0]

    active = Plan.dense(architecture)
    dense = output()
    new = new_parameters(repaired(model, plan))
    active = plan
    before = (output() - dense).square().mean()
    with torch.no_grad():
        consumer.weight.copy_(new["model.layers.0.self_attn.o_proj.weight"])
    after = (output() - dense).square().mean()
    assert float(after) < 0.95 * float(before)


# The bias


def bias_repair(model, plan: Plan, fitted: dict[str, Tensor], held: dict[str, Tensor] | None = None) -> list[Fit]:
    """The repair of the biases from inputs by module, ``[tokens, input]``."""
    state = model.state_dict()

    def inputs_of(consumer: Map) -> Inputs:
        return Inputs(gram(fitted[consumer.module]), held and held[consumer.module])

    return repair_bias(
        describe(model),
        plan,
        state.__getitem__,
        lambda consumer: state.get(consumer.bias),
        lambda consumer: fitted[consumer.module].mean(0),
        inputs_of,
    )


def random_inputs(model, plan: Plan, rows: int, seed: int, constant: bool = False) -> dict[str, Tensor]:
    """Inputs of every pruned consumer, with means that are not 0; the removed ones may be constant."""
    found = {}
    for number, (consumer, kept) in enumerate(pruned_consumers(describe(model), plan)):
        (level,) = random_tensors(number, (len(kept),))
        (x,) = random_tensors(seed + number, (rows, len(kept)))
        found[consumer.module] = level + (x * kept if constant else x)
    return found


@pytest.mark.parametrize("stored", [lambda model: model, conv1d_stored], ids=["linear", "conv1d"])
def test_a_bias_makes_up_for_constant_inputs_wholly(stored):
    model = stored(FAMILIES["llama"](0))
    plan = plan_of(describe(model), some_pruned)
    x = random_inputs(model, plan, 30, 100, constant=True)
    fits = bias_repair(model, plan, x, x)
    assert len(fits) == 6
    for fit, (consumer, kept) in zip(fits, pruned_consumers(describe(model), plan), strict=True):
        assert fit.weight is None
        assert fit.before > 0.01
        assert (fit.after, fit.held_out_after) == pytest.approx((0, 0), abs=1e-9)
        w = oriented(consumer, model.get_parameter(consumer.weight).detach()).double()
        inputs, bias = x[consumer.module], model.get_parameter(consumer.bias).detach()
        torch.testing.assert_close(inputs * kept @ w.T + fit.bias, inputs @ w.T + bias, rtol=1e-5, atol=1e-5)
        assert fit.bias.dtype == bias.dtype
    assert set(new_parameters(fits)) == {fit.consumer.bias for fit in fits}


def test_the_errors_of_a_bias_are_those_of_the_data():
    model = FAMILIES["llama"](0)
    plan = plan_of(describe(model), some_pruned)
    fitted, held = random_inputs(model, plan, 30, 100), random_inputs(model, plan, 20, 200)
    for fit, (consumer, kept) in zip(
        bias_repair(model, plan, fitted, held), pruned_consumers(describe(model), plan), strict=True
    ):
        w = model.get_parameter(consumer.weight).detach().double()
        shift = fit.bias.double() - model.get_parameter(consumer.bias).detach().double()
        for data, before, after in ((fitted, fit.before, fit.after), (held, fit.held_out_before, fit.held_out_after)):
            x = data[consumer.module]
            assert before == pytest.approx(share_lost(x, x @ w.T, x * kept @ w.T), rel=1e-6)
            assert after == pytest.approx(share_lost(x, x @ w.T, x * kept @ w.T + shift), rel=1e-5)
        assert fit.after < fit.before
    unknown = bias_repair(model, plan, fitted)[0]
    assert np.isnan([unknown.held_out_before, unknown.held_out_after]).all()


def test_a_consumer_without_a_bias_is_named():
    model = FAMILIES["llama_mha"](0)
    plan = plan_of(describe(model), lambda layer, part: 2)
    message = r"needs a bias on model\.layers\.0\.self_attn\.o_proj, .*cannot say one; choose slice\.repair: local"
    with pytest.raises(LibpruneError, match=message):
        bias_repair(model, plan, random_inputs(model, plan, 30, 0))
