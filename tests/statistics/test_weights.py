"""Columns of the weights: spread, share of non-zeros, evenness and effective rank, against plain numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from libprune.engine.describe import describe
from libprune.statistics.weights import effective_rank, singular_values, unit_vectors, weight_columns
from tests.support.models import FAMILIES, KINDS
from tests.support.weights import SEPARATE, conv1d_stored, elements, one_part

EVEN = ("weight_nonzero", "weight_entropy", "weight_effective_rank")


@pytest.mark.parametrize("family", SEPARATE)
def test_columns_are_those_of_the_weights_that_carry_a_units_index(family):
    model = FAMILIES[family](0)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:5] = 0
    architecture, weights = describe(model), dict(model.named_parameters())
    for layer, part in architecture.blocks():
        found = weight_columns(architecture, weights, layer, part)
        for unit in range(architecture.units(part)):
            taken = elements(model, architecture, layer, part, unit)
            w = torch.cat(taken).detach().double().numpy()
            shares = w[w != 0] ** 2 / (w**2).sum()
            assert found["weight_variance"][unit] == pytest.approx(w.var())
            assert found["weight_nonzero"][unit] == (w != 0).mean()
            assert found["weight_entropy"][unit] == pytest.approx(-(shares * np.log(shares)).sum() / np.log(w.size))


@pytest.mark.parametrize("family", KINDS)
def test_the_vectors_of_all_units_are_the_matrices_of_the_block(family):
    """Whatever the storage order, also where projections are fused: as many elements, and the same sum of squares."""
    model = FAMILIES[family](0)
    architecture, weights = describe(model), dict(model.named_parameters())
    for layer, part in architecture.blocks():
        spaces = unit_vectors(architecture, weights, layer, part)
        assert {len(vectors) for vectors in spaces} == {architecture.units(part)}
        if architecture.parts[part].units != "experts":
            assert [vectors.shape[2] for vectors in spaces] == [architecture.sizes["model"]]
        of_block = {parameter.name for parameter, _, _ in architecture.carriers(layer, part) if len(parameter.dims) > 1}
        squares = sum(float(weights[name].detach().double().square().sum()) for name in of_block)
        assert sum(float(v.double().square().sum()) for v in spaces) == pytest.approx(squares)


def test_storage_order_changes_no_column():
    plain, stored = FAMILIES["llama"](0), conv1d_stored(FAMILIES["llama"](0))
    for layer, part in describe(plain).blocks():
        one, other = (weight_columns(describe(m), dict(m.named_parameters()), layer, part) for m in (plain, stored))
        for name, values in one.items():
            np.testing.assert_allclose(other[name], values, rtol=1e-9)


@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_singular_values_are_those_of_the_matrices(units, rows, columns, seed):
    matrices = torch.randn(units, rows, columns, generator=torch.Generator().manual_seed(seed))
    expected = torch.linalg.svdvals(matrices.double()).flip(1)
    torch.testing.assert_close(singular_values(matrices), expected, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 6), st.floats(1e-6, 1e6), st.integers(0, 5))
def test_equal_singular_values_count_each_and_zeros_not_at_all(number, size, zeros):
    values = torch.tensor([[0.0] * zeros + [size] * number], dtype=torch.float64)
    assert float(effective_rank(values)) == pytest.approx(number)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.floats(0.01, 100))
def test_the_effective_rank_has_no_scale_and_lies_between_one_and_the_number(values, factor):
    one = torch.tensor([values], dtype=torch.float64)
    rank = float(effective_rank(one))
    assert 1 - 1e-9 <= rank <= len(values) + 1e-9
    assert float(effective_rank(factor * one)) == pytest.approx(rank)


def columns_of(rows: list[Tensor]) -> dict[str, np.ndarray]:
    """Columns of units whose weights are the given matrices, ``[vectors, model]`` each."""
    stacked = torch.stack(rows, 1)
    dims = {f"w{i}": ("kv", "model") for i in range(len(stacked))}
    architecture = one_part({"kv": len(rows), "model": stacked.shape[2]}, dims)
    return weight_columns(architecture, dict(zip(dims, stacked, strict=True)), 0, "part")


def test_known_units_have_the_known_columns():
    dead, single, parallel, even = torch.zeros(3, 8), torch.zeros(3, 8), torch.ones(3, 8), torch.zeros(3, 8)
    single[1, 2] = 4
    even[range(3), range(3)] = torch.tensor([1.0, -1.0, 1.0])
    found = columns_of([dead, single, parallel, even])
    logs = np.log(24)
    np.testing.assert_allclose(found["weight_nonzero"], [0, 1 / 24, 1, 3 / 24])
    np.testing.assert_allclose(found["weight_entropy"], [0, 0, 1, np.log(3) / logs], atol=1e-12)
    np.testing.assert_allclose(found["weight_effective_rank"], [0, 1 / 3, 1 / 3, 1], rtol=1e-6)
    np.testing.assert_allclose(found["weight_variance"], [0, 16 / 24 - (4 / 24) ** 2, 0, 3 / 24 - (1 / 24) ** 2])


def test_a_factor_on_a_unit_changes_its_size_and_not_its_evenness():
    w = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    found = columns_of([w, 1e-4 * w])
    np.testing.assert_allclose(found["weight_variance"][1], 1e-8 * found["weight_variance"][0])
    for name in EVEN:
        assert found[name][1] == pytest.approx(found[name][0])


def test_units_of_a_single_weight_are_defined():
    found = columns_of([torch.ones(1, 1), torch.zeros(1, 1)])
    assert {name: found[name].tolist() for name in EVEN} == {
        "weight_nonzero": [1, 0],
        "weight_entropy": [0, 0],
        "weight_effective_rank": [1, 0],
    }
