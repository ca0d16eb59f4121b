"""The repair of a consumer, against the ridge problem that it claims to solve."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from libprune.architecture import Map
from libprune.describe import describe
from libprune.errors import StatisticsError
from libprune.plan import Plan
from libprune.repair import least_squares, repair_local
from libprune.surgery import masked
from tests.collected import activations, of_layers
from tests.models import FAMILIES, plan_of, tokens
from tests.test_units import conv1d_stored

dampings = st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 30.0])


@st.composite
def problems(draw):
    """Inputs ``[samples, inputs]``, a weight, and a choice of kept inputs; sometimes fewer samples than inputs."""
    inputs, outputs, samples = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x, w = (torch.randn(n, inputs, generator=generator, dtype=torch.float64) for n in (samples, outputs))
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=inputs, max_size=inputs)))
    return x, w, kept


def gram(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def error(x: Tensor, w: Tensor, other: Tensor) -> float:
    """Mean squared output error over the samples."""
    return float((x @ (w - other).T).square().sum(1).mean())


@given(problems(), dampings)
def test_it_is_the_solution_of_the_ridge_problem_pulled_towards_the_old_weights(problem, damping):
    """Against least squares with rows added for the ridge: sqrt(lambda) (W' - W_K) = 0."""
    x, w, kept = problem
    ridge = damping * float(gram(x).diagonal().mean())
    rows = torch.cat([x[:, kept] / len(x) ** 0.5, ridge**0.5 * torch.eye(int(kept.sum()), dtype=x.dtype)])
    targets = torch.cat([x @ w.T / len(x) ** 0.5, ridge**0.5 * w[:, kept].T])
    expected = torch.linalg.lstsq(rows, targets, driver="gelsd").solution.T
    found = least_squares(w, gram(x), kept, damping)
    torch.testing.assert_close(found[:, kept], expected, rtol=1e-5, atol=1e-6)
    assert not found[:, ~kept].any()


@given(problems(), dampings)
def test_the_calibration_error_never_grows(problem, damping):
    x, w, kept = problem
    before = error(x, w, w * kept)
    assert error(x, w, least_squares(w, gram(x), kept, damping)) <= before * (1 + 1e-9) + 1e-12


@given(problems())
def test_less_damping_never_fits_worse(problem):
    x, w, kept = problem
    errors = [error(x, w, least_squares(w, gram(x), kept, damping)) for damping in (1e-6, 1e-3, 0.1, 10.0)]
    assert all(one <= two * (1 + 1e-6) + 1e-12 for one, two in pairwise(errors))


@given(problems(), dampings)
def test_keeping_everything_gives_the_weight_back(problem, damping):
    x, w, kept = problem
    torch.testing.assert_close(least_squares(w, gram(x), torch.ones_like(kept), damping), w)


@given(problems())
def test_much_damping_gives_the_old_weights_back(problem):
    x, w, kept = problem
    torch.testing.assert_close(least_squares(w, gram(x), kept, 1e12), w * kept, rtol=1e-6, atol=1e-9)


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4))
def test_what_the_kept_inputs_can_say_of_the_pruned_ones_is_recovered(seed, kept_count, pruned_count):
    generator = torch.Generator().manual_seed(seed)
    basis, mixing, w = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(200, kept_count), (kept_count, pruned_count), (3, kept_count + pruned_count)]
    )
    x = torch.cat([basis, basis @ mixing], 1)
    kept = torch.arange(x.shape[1]) < kept_count
    found = least_squares(w, gram(x), kept, 1e-12)
    torch.testing.assert_close(found[:, kept], w[:, kept] + w[:, ~kept] @ mixing.T, rtol=1e-6, atol=1e-6)
    assert error(x, w, found) <= 1e-12 * error(x, w, 0 * w)


def test_the_damping_is_relative_to_the_mean_diagonal():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w, kept = torch.randn(2, 4, dtype=torch.float64), torch.tensor([True, False, True, True])
    one, scaled = (least_squares(w, factor * gram(x), kept, 0.3) for factor in (1, 1e6))
    torch.testing.assert_close(scaled, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_keep_their_dtype_and_lose_only_its_rounding(dtype):
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    w, kept = torch.ones(2, 4, dtype=dtype), torch.tensor([True, False, True, True])
    found = least_squares(w, gram(x), kept, 1e-3)
    assert found.dtype == dtype
    assert torch.equal(found, least_squares(w.double(), gram(x), kept, 1e-3).to(dtype))


def test_a_singular_gram_matrix_is_solved_with_damping_and_refused_without_any_input():
    x, w = torch.ones(5, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    kept = torch.tensor([True, True, False])
    found = least_squares(w, gram(x), kept, 1e-6)
    torch.testing.assert_close(found.sum(1), w.sum(1), rtol=1e-4, atol=1e-6)
    with pytest.raises(StatisticsError, match=r"not positive definite; raise slice\.damping"):
        least_squares(w, 0 * gram(x), kept, 1e-3)
    with pytest.raises(StatisticsError, match="not positive definite"):
        least_squares(w, torch.nan * gram(x), kept, 1e-3)


# On models


def repaired_weights(model, plan: Plan, damping: float = 1e-3) -> dict[str, Tensor]:
    architecture = describe(model)
    found = of_layers(activations(model, 8, tokens(8, 12)))

    def gram_of(consumer: Map) -> Tensor:
        return found[f"{consumer.module}.input_gram"]

    return repair_local(architecture, plan, model.state_dict().__getitem__, gram_of, damping)


def some_pruned(layer: int, part: str) -> int:
    """One attention gone, one MLP whole, everything else thinner."""
    return {(0, "attention"): 0, (1, "mlp"): 13}.get((layer, part), {"attention": 2, "mlp": 7}[part])


@pytest.mark.parametrize("stored", [lambda model: model, conv1d_stored], ids=["linear", "conv1d"])
def test_every_pruned_consumer_is_refitted_in_its_own_storage_order(stored):
    model = stored(FAMILIES["llama"](0))
    architecture = describe(model)
    plan = plan_of(architecture, some_pruned)
    new = repaired_weights(model, plan)
    pruned = {block for block, keep in plan.keep.items() if keep.any() and not keep.all()}
    assert set(new) == {
        f"model.layers.{layer}.{'self_attn.o_proj' if part == 'attention' else 'mlp.down_proj'}.weight"
        for layer, part in pruned
    }
    linear = FAMILIES["llama"](0)
    plain = repaired_weights(linear, plan)
    for name, weight in new.items():
        assert weight.is_contiguous()
        assert weight.shape == model.get_parameter(name).shape
        oriented = weight if stored is not conv1d_stored else weight.T
        torch.testing.assert_close(oriented, plain[name], rtol=1e-3, atol=1e-4)


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
            model(input_ids=tokens(8, 12), use_cache=False)
        handle.remove()
        return outputs[0]

    active = Plan.dense(architecture)
    dense = output()
    new = repaired_weights(model, plan)
    active = plan
    before = (output() - dense).square().mean()
    with torch.no_grad():
        consumer.weight.copy_(new["model.layers.0.self_attn.o_proj.weight"])
    after = (output() - dense).square().mean()
    assert float(after) < 0.95 * float(before)
