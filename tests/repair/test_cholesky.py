"""Cholesky factors, and the matrices that have none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libprune.repair.cholesky import cholesky


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 99), st.integers(1, 12), st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_factor_of_a_positive_definite_matrix_gives_it_back(seed, n, scale):
    rows = scale * random(2 * n + 1, n, seed=seed)
    gram = rows.T @ rows
    factor = cholesky(gram)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor @ factor.T, gram, atol=1e-9 * scale**2, rtol=1e-9)


@given(st.integers(0, 99), st.integers(1, 12), st.sampled_from([1e-6, 1.0, 1e6]))
def test_two_inputs_that_are_always_equal_have_none_on_any_machine(seed, n, scale):
    """The pivot of the second one is what rounding left, above zero or not."""
    rows = scale * random(2 * n + 1, n, seed=seed)
    rows = torch.cat([rows, rows[:, :1]], -1)
    assert cholesky(rows.T @ rows) is None


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_zeros_negative_and_infinite_numbers_have_none(value):
    assert cholesky(torch.full((1, 1), value)) is None


def test_inputs_of_very_different_sizes_have_one():
    sizes = torch.tensor([1e-12, 1.0, 1e12], dtype=torch.float64)
    assert cholesky(sizes.diag()) is not None
