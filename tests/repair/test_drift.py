"""The drift that is taken back: how it is cut, and what a layer multiplies its consumers' outputs by."""

from types import MethodType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from libprune.engine.describe import describe
from libprune.repair.drift import capped, factors_of
from tests.support.models import ENCODERS, FAMILIES, MIXTURES, tokens
from tests.support.passes import forward, in_order

POST_NORM = {"gemma2", "gemma3", "gemma4_text", "olmo2", "olmo3", "glm4", "exaone4"}
"""Families with a norm between what a consumer gives and the residual stream."""


@given(st.integers(0, 99), st.floats(0.1, 5))
def test_a_cut_drift_keeps_its_direction_and_is_no_longer_than_so_many_medians_of_its_sequence(seed, cap):
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(3, 7, 4, generator=generator) * torch.randn(3, 7, 1, generator=generator).exp()
    for sequence, found in zip(drift, capped(drift, cap), strict=True):
        lengths = sequence.norm(dim=-1)
        limit = cap * float(lengths.sort().values[3])
        for token, length, cut in zip(sequence, lengths.tolist(), found, strict=True):
            torch.testing.assert_close(cut, token * min(1.0, limit / length))
    assert capped(drift, None) is drift


def halving(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, with every MLP's output halved behind its consumer."""
    for block in model.model.layers:
        own = type(block.mlp).forward
        block.mlp.forward = MethodType(lambda mlp, x, own=own: 0.5 * own(mlp, x), block.mlp)
    return model


def factors_in(model: PreTrainedModel) -> tuple[float, ...] | None:
    """What the first layer multiplies the outputs of its consumers by."""
    architecture = describe(model)
    seen = forward(model, architecture, tokens())
    first, second = (seen.states[f"{architecture.layers_path}.{layer}"] for layer in (0, 1))
    return factors_of(first, second, [seen.outputs[entry.module] for entry in in_order(architecture, 0)])


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {*ENCODERS, *MIXTURES}))
def test_what_a_layer_multiplies_its_consumers_by_is_measured(name):
    model = FAMILIES[name](0)
    factor = getattr(model.config, "residual_multiplier", 1.0)
    assert factors_in(model) == (None if name in POST_NORM else pytest.approx((factor, factor), rel=1e-5))


def test_every_consumer_has_its_own_factor():
    assert factors_in(halving(FAMILIES["llama"](0))) == pytest.approx((1.0, 0.5), rel=1e-5)


@given(
    st.lists(st.floats(0.01, 20), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 99),
)
def test_factors_are_found_in_what_was_rounded(factors, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    before, *outputs = (torch.randn(4, 16, 32, generator=generator).to(dtype) for _ in range(1 + len(factors)))
    after = before
    for factor, output in zip(factors, outputs, strict=True):
        after = after + factor * output
    nearly = pytest.approx(tuple(factors), abs=8 * torch.finfo(dtype).eps * max(1, *factors))
    assert factors_of(before, after, outputs) == nearly
    other = after * (1 + (torch.arange(32) == 0) * 64 * torch.finfo(dtype).eps).to(dtype)
    assert factors_of(before, other, outputs) is None
