"""Sums over units, against loops over single elements whose units are written down by hand."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from libprune.engine import cost
from libprune.engine.describe import describe
from libprune.engine.errors import StatisticsError
from libprune.statistics.unit_sums import sum_positions, unit_sums
from libprune.statistics.weights import weight_columns
from tests.support.models import FAMILIES
from tests.support.weights import SEPARATE, conv1d_stored, elements, one_part

sizes = st.integers(1, 4)

# Which unit of axis kv each position belongs to, as a person would count them.
LAYOUTS = {
    "kv": lambda kv, q, d: list(range(kv)),
    "kv q d": lambda kv, q, d: [u for u in range(kv) for _ in range(q * d)],
    "q kv d": lambda kv, q, d: [u for _ in range(q) for u in range(kv) for _ in range(d)],
    "kv q d + kv d + kv d": lambda kv, q, d: (
        [u for u in range(kv) for _ in range(q * d)] + 2 * [u for u in range(kv) for _ in range(d)]
    ),
    "kv (d + d + d)": lambda kv, q, d: [u for u in range(kv) for _ in range(3 * d)],
    "kv (q d + d)": lambda kv, q, d: [u for u in range(kv) for _ in range(q * d + d)],
    "q + kv d": lambda kv, q, d: [-1] * q + [u for u in range(kv) for _ in range(d)],
}


def integers(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random whole numbers, whose sums are exact in any order."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


# sum_positions


@given(st.data(), st.integers(1, 5), st.lists(st.integers(1, 3), max_size=2))
def test_positions_are_added_to_the_unit_that_owns_them(data, count, leading):
    units = np.array(data.draw(st.lists(st.integers(-1, count - 1), min_size=1, max_size=8)))
    values = integers((*leading, len(units)))
    expected = torch.zeros(*leading, count)
    for position, unit in enumerate(units):
        if unit >= 0:
            expected[..., unit] += values[..., position]
    assert torch.equal(sum_positions(values, units, count), expected)


@given(st.integers(1, 6))
def test_where_positions_are_units_the_values_come_back(count):
    values = integers((2, count))
    assert torch.equal(sum_positions(values, np.arange(count), count), values)


def test_the_input_is_not_changed():
    values = integers((3, 4))
    before = values.clone()
    sum_positions(values, np.array([0, 1, 1, -1]), 2)
    assert torch.equal(values, before)


# unit_sums


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True], ids=["[out, in]", "[in, out]"])
@given(sizes, sizes, sizes, sizes)
def test_every_element_counts_once_for_the_unit_whose_index_it_carries(layout, transposed, kv, q, d, model):
    owners = LAYOUTS[layout](kv, q, d)
    dims = ("model", layout) if transposed else (layout, "model")
    architecture = one_part({"kv": kv, "q": q, "d": d, "model": model}, {"w": dims})
    values = integers((model, len(owners)) if transposed else (len(owners), model))
    expected = np.zeros(kv)
    for place in np.ndindex(*values.shape):
        owner = owners[place[1] if transposed else place[0]]
        if owner >= 0:
            expected[owner] += float(values[place])
    np.testing.assert_array_equal(unit_sums(architecture, 0, "part", {"w": values}), expected)


@pytest.mark.parametrize("at_once", [1, 5, 1 << 19])
@pytest.mark.parametrize("dims", [("kv d", "model"), ("model", "kv d"), ("kv d", "kv d"), ("kv d",)])
def test_rows_are_worked_through_in_pieces_to_the_sum_of_all(monkeypatch, dims, at_once):
    architecture = one_part({"kv": 3, "d": 2, "model": 4}, {"w": dims})
    size = {"kv d": 6, "model": 4}
    values, factors = (integers(tuple(size[dim] for dim in dims)) for _ in range(2))
    expected = unit_sums(architecture, 0, "part", {"w": values.double() * factors})
    asked = []

    def of(name, tensor, rows):
        asked.append((name, rows))
        assert torch.equal(tensor, values[rows])
        return tensor * factors[rows]

    monkeypatch.setattr("libprune.statistics.unit_sums._AT_ONCE", at_once)
    np.testing.assert_array_equal(unit_sums(architecture, 0, "part", {"w": values}, of=of), expected)
    assert all(name == "w" for name, _ in asked)
    assert max(len(values[rows]) * values[0].numel() for _, rows in asked) <= max(at_once, values[0].numel())


def test_a_labelled_fused_matrix_gives_each_unit_its_own_labels():
    """Rows are labelled unit * 100 + position inside the unit; GPT-NeoX order, query, key, value of a head together."""
    architecture = one_part({"kv": 3, "d": 2, "model": 1}, {"qkv": ("kv (d + d + d)", "model")})
    labels = torch.tensor([[0, 1, 2, 3, 4, 5, 100, 101, 102, 103, 104, 105, 200, 201, 202, 203, 204, 205]]).T.float()
    found = unit_sums(architecture, 0, "part", {"qkv": labels})
    np.testing.assert_array_equal(found, [15, 615, 1215])


def test_matrices_biases_and_vectors_of_a_part_add_up():
    parameters = {"q.weight": ("kv d", "model"), "q.bias": ("kv d",), "o.weight": ("model", "kv d")}
    architecture = one_part({"kv": 2, "d": 2, "model": 3}, {**parameters, "o.bias": ("model",), "norm": ("model",)})
    shapes = {"q.weight": (4, 3), "q.bias": (4,), "o.weight": (3, 4)}
    ones = {name: torch.ones(shape) for name, shape in shapes.items()}
    np.testing.assert_array_equal(unit_sums(architecture, 0, "part", ones), [6 + 2 + 6] * 2)
    weights = {name: tensor for name, tensor in ones.items() if "bias" not in name}
    np.testing.assert_array_equal(unit_sums(architecture, 0, "part", weights, only=weights), [12, 12])


def test_low_precision_values_are_summed_in_float64():
    architecture = one_part({"kv": 1, "d": 3000, "model": 1}, {"w": ("kv d", "model")})
    found = unit_sums(architecture, 0, "part", {"w": torch.ones(3000, 1, dtype=torch.bfloat16)})
    assert found.dtype == np.float64
    assert found.tolist() == [3000]


def test_a_missing_parameter_is_named_with_the_count_the_first_and_the_nearest():
    architecture = one_part({"kv": 1, "model": 1}, {"layers.0.q_proj.weight": ("kv", "model")})
    there = {name: torch.ones(1, 1) for name in ("a", "b", "c", "layers.0.q_prj.weight", "e")}
    message = (
        "the collected statistics has no entry 'layers.0.q_proj.weight'; it holds 5 entries (first: a, b, c); "
        "did you mean 'layers.0.q_prj.weight'?"
    )
    with pytest.raises(StatisticsError, match=re.escape(message)):
        unit_sums(architecture, 0, "part", there)


def test_a_missing_parameter_is_named_when_nothing_is_there():
    architecture = one_part({"kv": 1}, {"w": ("kv",)})
    with pytest.raises(StatisticsError, match=r"no entry 'w'; it holds 0 entries \(first: none\)$"):
        unit_sums(architecture, 0, "part", {})


# On models


@pytest.fixture(scope="module", params=SEPARATE)
def model(request) -> PreTrainedModel:
    return FAMILIES[request.param](0)


def test_cost_and_norms_of_a_unit_are_those_of_the_elements_that_go_with_it(model):
    architecture = describe(model)
    weights = dict(model.named_parameters())
    for layer, part in architecture.blocks():
        columns = weight_columns(architecture, weights, layer, part)
        for unit in range(architecture.units(part)):
            taken = torch.cat(elements(model, architecture, layer, part, unit)).detach().double()
            assert columns["cost"][unit] == taken.numel()
            np.testing.assert_allclose(columns["magnitude_l1"][unit], taken.abs().sum(), rtol=1e-6)
            np.testing.assert_allclose(columns["magnitude_l2"][unit], taken.square().sum(), rtol=1e-6)


@pytest.mark.parametrize("family", SEPARATE)
def test_storage_order_changes_no_sum(family):
    plain, stored = FAMILIES[family](0), conv1d_stored(FAMILIES[family](0))
    one, other = describe(plain), describe(stored)
    assert all(entry.transposed for entry in other.maps)
    for layer, part in one.blocks():
        expected = unit_sums(one, layer, part, plain.state_dict())
        found = unit_sums(other, layer, part, stored.state_dict())
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_sums_over_all_units_are_the_sum_over_the_part_without_its_overhead(model):
    architecture = describe(model)
    ones = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    for layer, part in architecture.blocks():
        total = sum(architecture.numel(p) for p in architecture.parameters_of(layer, part))
        assert unit_sums(architecture, layer, part, ones).sum() == total - cost.part_overhead(architecture, layer, part)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_small_low_precision_weights_are_not_lost(dtype):
    architecture = one_part({"kv": 1, "model": 8}, {"w": ("kv", "model")})
    weights = {"w": torch.linspace(1e-5, 2e-4, 8).to(dtype)[None]}
    found = weight_columns(architecture, weights, 0, "part")["magnitude_l2"]
    np.testing.assert_allclose(found, weights["w"].double().square().sum(), rtol=1e-6)
