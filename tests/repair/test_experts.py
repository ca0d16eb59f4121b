"""Fits of experts: the joint least-squares problem, solved; and what they do to a mixture that loses experts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from libprune.engine.architecture import Architecture, Map
from libprune.engine.axes import parse_expr
from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.stacks import exposed
from libprune.engine.surgery import masked, oriented
from libprune.models.sequences import Sequences
from libprune.repair.experts import Rows, fit_channels, fit_experts
from libprune.repair.least_squares import Inputs, Moments, fisher_weighting, new_parameters, solve
from libprune.repair.sequential import SequentialRepair
from libprune.repair.streams import split_batches
from tests.support.models import FAMILIES, VOCAB

COPIES, WIDTH, OUT = 3, 2, 4
CPU = torch.device("cpu")


def stack(transposed: bool = False) -> Map:
    wide = parse_expr("experts (inner)")
    return Map("m.stacked_w", 0, "experts", wide, parse_expr("model"), transposed, stack="experts", active=2)


def rows(seed: int, tokens: int, held_out: bool = False) -> Rows:
    """Each token goes through two of the experts."""
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(COPIES)[:2] for _ in range(tokens)])
    order = np.argsort(chosen.flatten(), kind="stable")
    counts = tuple(np.bincount(chosen.flatten(), minlength=COPIES).tolist())
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2 * tokens, WIDTH, generator=generator), torch.randn(tokens, OUT, generator=generator)
    return Rows(x, torch.from_numpy(order // 2), counts, y, held_out)


def wide(batch: Rows) -> Tensor:
    """The inputs of all experts side by side, ``[tokens, copies * width]``, zero for those not chosen."""
    x = torch.zeros(len(batch.y), COPIES, WIDTH)
    x[batch.tokens, torch.repeat_interleave(torch.arange(COPIES), torch.tensor(batch.counts))] = batch.x
    return x.flatten(1)


def stored_like(transposed: bool) -> Tensor:
    return torch.zeros(COPIES, WIDTH, OUT) if transposed else torch.zeros(COPIES, OUT, WIDTH)


@settings(max_examples=20)
@given(st.integers(0, 999), st.sampled_from([1e-3, 0.1, 1.0]), st.booleans())
def test_a_joint_fit_is_the_solution_of_the_wide_problem(seed, damping, transposed):
    batches = [rows(seed, 30), rows(seed + 1, 20)]
    old = torch.randn(OUT, COPIES * WIDTH, generator=torch.Generator().manual_seed(seed))
    keep = torch.ones(COPIES * WIDTH, dtype=torch.bool)
    fit = fit_experts(stack(transposed), old, keep, batches, damping, CPU, stored_like(transposed))
    x, y = torch.cat([wide(b) for b in batches]).double(), torch.cat([b.y for b in batches]).double()
    moments = Moments(x.T @ x / len(x), y.T @ x / len(x), float(y.square().sum()) / len(x), len(x))
    expected, _ = solve(moments, old.double(), damping)
    torch.testing.assert_close(oriented(stack(transposed), fit.weight).double(), expected, rtol=2e-2, atol=2e-3)
    assert fit.before == pytest.approx(moments.error(old), rel=1e-4)
    assert fit.after == pytest.approx(moments.error(expected), rel=1e-3)
    assert fit.after <= fit.before + 1e-6


def test_removed_inputs_get_no_weight_and_the_ridge_is_chosen_on_held_out_tokens():
    batches = [rows(1, 40), rows(2, 30, held_out=True)]
    batches = [Rows(b.x.clone(), b.tokens, b.counts, b.y, b.held_out) for b in batches]
    for batch in batches:
        batch.x[: batch.counts[0]] = 0
    old = torch.randn(OUT, COPIES * WIDTH, generator=torch.Generator().manual_seed(3))
    keep = torch.arange(COPIES * WIDTH) >= WIDTH
    fit = fit_experts(stack(), old, keep, batches, None, CPU, stored_like(False))
    assert not fit.weight[0].any()
    assert fit.held_out_after <= fit.held_out_before
    alone = {
        value: fit_experts(stack(), old, keep, batches, value, CPU, stored_like(False)).held_out_after
        for value in (1e-3, 1e-2, 1e-1, 1.0, 10.0)
    }
    assert fit.damping == min(alone, key=alone.__getitem__)


def test_nothing_held_out_is_refused_where_the_ridge_is_to_be_chosen():
    old, keep = torch.zeros(OUT, COPIES * WIDTH), torch.ones(COPIES * WIDTH, dtype=torch.bool)
    with pytest.raises(LibpruneError, match=r"set slice\.damping to a number"):
        fit_experts(stack(), old, keep, [rows(0, 9)], None, CPU, stored_like(False))
    with pytest.raises(LibpruneError, match=r"set slice\.damping to a number"):
        fit_channels(stack(), old, ~keep, Inputs(torch.zeros(COPIES, WIDTH, WIDTH)), None, 0.0, stored_like(False))


@pytest.mark.parametrize("damping", [None, 1e-3])
def test_experts_whose_inputs_are_all_zero_stay_as_they_are(damping):
    silent = [replace(b, x=torch.zeros_like(b.x)) for b in (rows(1, 30), rows(2, 20, held_out=True))]
    old = torch.randn(OUT, COPIES * WIDTH, generator=torch.Generator().manual_seed(3))
    keep = torch.ones(COPIES * WIDTH, dtype=torch.bool)
    fit = fit_experts(stack(), old, keep, silent, damping, CPU, stored_like(False))
    assert torch.equal(oriented(stack(), fit.weight), old)
    assert np.isnan(fit.damping)
    assert fit.before == fit.after == fit.held_out_before == fit.held_out_after == pytest.approx(1.0)


@pytest.mark.parametrize("transposed", [False, True])
def test_channels_are_fitted_in_each_expert_by_itself(transposed):
    """An expert without rows, and one that loses nothing, stay as they are."""
    x = [
        torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(i)) @ torch.ones(WIDTH, WIDTH) for i in range(2)
    ]
    x = [one + 0.1 * torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(9)) for one in x]
    grams = torch.stack([*(one.T @ one / 30 for one in x), torch.zeros(WIDTH, WIDTH)])
    old = torch.randn(OUT, COPIES * WIDTH, generator=torch.Generator().manual_seed(3))
    keep = torch.tensor([True, False, True, True, True, False])
    fit = fit_channels(stack(transposed), old, keep, Inputs(grams), 1e-3, 0.0, stored_like(transposed))
    found = oriented(stack(transposed), fit.weight)
    expected, _ = solve(Moments.of_dense(old[:, :2], grams[0], keep[:2]), old[:, :2][:, keep[:2]].double(), 1e-3)
    torch.testing.assert_close(found[:, :1].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[:, 2:5], old[:, 2:5])
    assert not found[:, [1, 5]].any()
    assert fit.after < fit.before


def test_the_fisher_weighting_holds_in_each_expert():
    x = torch.randn(COPIES, 30, WIDTH, generator=torch.Generator().manual_seed(0))
    grams, curvature = x.mT @ x / 30, torch.tensor([[1.0, 9.0], [4.0, 1.0], [1.0, 1.0]])
    old = torch.randn(OUT, COPIES * WIDTH, generator=torch.Generator().manual_seed(3))
    keep = torch.tensor([True, False] * COPIES)
    fit = fit_channels(stack(), old, keep, Inputs(grams, None, curvature), 1e-3, 0.5, stored_like(False))
    for copy in range(COPIES):
        own = old[:, 2 * copy : 2 * copy + 2]
        weighted = grams[copy] * fisher_weighting(grams[copy], curvature[copy], 0.5)
        expected, _ = solve(Moments.of_dense(own, weighted, keep[:2]), own[:, :1].double(), 1e-3)
        torch.testing.assert_close(fit.weight[copy][:, :1].double(), expected, rtol=1e-5, atol=1e-6)


# On a model


@pytest.fixture
def mixture():
    model = FAMILIES["qwen3_moe"](0)
    architecture = describe(model)
    return exposed(model, architecture), architecture


@pytest.fixture(scope="module")
def text() -> Sequences:
    return Sequences(torch.randint(VOCAB, (48, 12), generator=torch.Generator().manual_seed(5)))


def without_experts(architecture: Architecture) -> Plan:
    plan = Plan.dense(architecture)
    for layer, part in architecture.blocks():
        if part == "experts":
            plan = plan.without((layer, part), [1, 4, 5])
    return plan


def states(model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.model(ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("own_inputs", [True, False], ids=["local", "sequential"])
def test_experts_that_are_left_take_over_what_the_others_gave(mixture, text, own_inputs):
    """Where the text is known and, less, where it is not."""
    model, architecture = mixture
    plan, unseen = without_experts(architecture), text.ids.flip(1)
    dense = {"seen": states(model, text.ids), "unseen": states(model, unseen)}
    with masked(model, architecture, plan):
        before = {"seen": states(model, text.ids), "unseen": states(model, unseen)}
    repair = SequentialRepair(model, architecture, plan, split_batches(text, 8), None, own_inputs=own_inputs)
    fits = [fit for layer in range(architecture.layers) for fit in repair.step(layer)]
    of_experts = [fit for fit in fits if fit.consumer.stack]
    assert [fit.consumer.layer for fit in of_experts] == [0, 2, 3]
    assert all(fit.after < fit.before and fit.held_out_after <= fit.held_out_before for fit in of_experts)
    with masked(model, architecture, plan):
        after = {"seen": states(model, text.ids), "unseen": states(model, unseen)}
    for which, expected in dense.items():
        lost = [float((values[which] - expected).square().sum()) for values in (before, after)]
        assert lost[1] < 0.9 * lost[0], which
    assert all(not fit.weight[[1, 4, 5]].any() for fit in of_experts), "weights of removed experts are not needed"


def test_known_weights_are_taken_as_they_are(mixture, text):
    """An interrupted repair goes on to the same weights."""
    model, architecture = mixture
    plan, batches = without_experts(architecture), split_batches(text, 8)
    first = SequentialRepair(model, architecture, plan, batches, 0.01)
    fits = [first.step(layer) for layer in range(architecture.layers)]
    again = FAMILIES["qwen3_moe"](0)
    second = SequentialRepair(exposed(again, architecture), architecture, plan, batches, 0.01)
    second.step(0, known=new_parameters(fits[0]))
    for layer in range(1, architecture.layers):
        for one, other in zip(second.step(layer), fits[layer], strict=True):
            assert torch.equal(one.weight, other.weight)
