"""The graph of correlations between units, against plain numpy, at its limits, and without a second table of n x n."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from libprune.scoring import correlation
from libprune.scoring.correlation import UnitGraph, unit_graph

NAMES = ("connection", "uniqueness", "centrality", "cooperation")


def graph_of(x: Tensor, weight: Tensor | None = None, size: int = 1, threshold: float = 0.1) -> UnitGraph:
    """The graph of inputs ``[tokens, input]``, of which each `size` consecutive ones are a unit."""
    x = x.double()
    weight = torch.eye(x.shape[1]) if weight is None else weight
    units = np.repeat(np.arange(x.shape[1] // size), size)
    return unit_graph((x.T @ x / len(x)).float(), x.mean(0).float(), weight, units, threshold)


def mixed(units: int, seed: int, tokens: int = 200) -> Tensor:
    """Inputs that have something to do with each other, on different scales and with means."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, units, generator=generator) @ torch.randn(units, units, generator=generator)
    return (x + torch.linspace(-1, 1, units)) * torch.logspace(-2, 1, units)


@given(st.integers(2, 12), st.integers(0, 99), st.sampled_from([0.0, 0.1, 0.5]))
def test_of_single_inputs_it_is_the_graph_of_absolute_correlations(units, seed, threshold):
    x = mixed(units, seed)
    weight = torch.randn(3, units, generator=torch.Generator().manual_seed(seed))
    r = np.abs(np.corrcoef(x.double().numpy().T))
    np.fill_diagonal(r, 0)
    size = x.double().std(0, correction=0).numpy() * weight.norm(dim=0).numpy()
    found = graph_of(x, weight, threshold=threshold)
    np.testing.assert_allclose(found.connection, r.sum(1) / (units - 1), atol=1e-4)
    np.testing.assert_allclose(found.uniqueness, 1 - r.max(1), atol=1e-4)
    np.testing.assert_allclose(found.cooperation, r @ size / (size.sum() - size), atol=1e-4)
    if np.abs(r - threshold)[~np.eye(units, dtype=bool)].min() > 1e-3:
        np.testing.assert_allclose(found.centrality, (r > threshold).sum(1) / (units - 1))


@pytest.mark.parametrize("rows", [1, 5, 99])
def test_of_several_inputs_it_is_the_root_of_the_rv_coefficient_whatever_the_block(monkeypatch, rows):
    monkeypatch.setattr(correlation, "_ROWS", rows)
    units, size = 5, 3
    x = mixed(units * size, 0)
    centred = (x.double() - x.double().mean(0)).view(len(x), units, size).numpy()
    weight = torch.randn(4, units * size, generator=torch.Generator().manual_seed(1))
    r, output = np.zeros((units, units)), np.zeros(units)
    for u in range(units):
        output[u] = np.sqrt(
            ((centred[:, u] @ weight.double().numpy()[:, u * size : (u + 1) * size].T) ** 2).sum(1).mean()
        )
        for v in range(units):
            one, two = centred[:, u] @ centred[:, u].T, centred[:, v] @ centred[:, v].T
            r[u, v] = np.sqrt((one * two).sum() / np.sqrt((one**2).sum() * (two**2).sum()))
    np.testing.assert_allclose(r.diagonal(), 1)
    np.fill_diagonal(r, 0)
    found = graph_of(x, weight, size)
    np.testing.assert_allclose(found.connection, r.sum(1) / (units - 1), atol=1e-5)
    np.testing.assert_allclose(found.uniqueness, 1 - r.max(1), atol=1e-5)
    np.testing.assert_allclose(found.cooperation, r @ output / (output.sum() - output), atol=1e-5)


@given(st.integers(0, 99), st.permutations(range(6)))
def test_units_that_change_places_take_their_place_in_the_graph_along(seed, order):
    size, x = 2, mixed(12, seed)
    moved = [size * unit + i for unit in order for i in range(size)]
    one, other = graph_of(x, size=size), graph_of(x[:, moved], size=size)
    for name in NAMES:
        np.testing.assert_allclose(getattr(other, name), getattr(one, name)[list(order)], atol=1e-6)


def test_positions_that_lie_apart_belong_to_their_unit():
    x, weight = mixed(6, 3), torch.eye(6)
    gram, mean = (x.T @ x / len(x)).float(), x.mean(0)
    interleaved = np.array([0, 1, 2, 0, 1, 2])
    order = np.argsort(interleaved, kind="stable")
    one = unit_graph(gram, mean, weight, interleaved, 0.1)
    other = unit_graph(gram[order][:, order], mean[order], weight, np.sort(interleaved), 0.1)
    for name in NAMES:
        np.testing.assert_allclose(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dead_and_constant_inputs_have_no_place_in_the_graph(dtype):
    x = mixed(6, 0)
    x[:, 1], x[:, 4] = 0, 7.3
    gram, mean = (x.T @ x / len(x)).to(dtype), x.mean(0)
    found = unit_graph(gram, mean, torch.eye(6), np.arange(6), 0.1)
    for name in NAMES:
        values = getattr(found, name)
        assert values[[1, 4]].tolist() == [0, 0]
        assert ((values >= 0) & (values <= 1)).all()
    alone = graph_of(x[:, [0, 2, 3, 5]])
    if dtype == torch.float32:
        np.testing.assert_allclose(found.connection[[0, 2, 3, 5]] * 5 / 3, alone.connection, atol=1e-5)


def test_equal_units_are_wholly_connected_and_not_unique():
    column = mixed(3, 0)[:, :1]
    found = graph_of(torch.cat([column, -2 * column, column], 1))
    for name, expected in zip(NAMES, (1, 0, 1, 1), strict=True):
        np.testing.assert_allclose(getattr(found, name), expected, atol=1e-6)


def test_a_unit_without_others_is_unique_and_unconnected():
    found = graph_of(mixed(3, 0), size=3)
    assert [getattr(found, name).tolist() for name in NAMES] == [[0], [1], [0], [0]]


def test_a_consumer_of_zeros_leaves_no_cooperation():
    assert graph_of(mixed(4, 0), torch.zeros(2, 4)).cooperation.tolist() == [0] * 4


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that is made while it is on."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not getattr(func, "is_view", False):
            self.elements = max(self.elements, made.numel())
        return made


def test_no_second_table_of_units_by_units_is_made():
    count = 3000
    gram = torch.eye(count) + 0.5
    with Largest() as largest:
        found = unit_graph(gram, torch.zeros(count), torch.ones(2, count), np.arange(count), 0.1)
    np.testing.assert_allclose(found.connection, 1 / 3, rtol=1e-6)
    assert 0 < largest.elements <= correlation._ROWS * count
    assert math.isclose(found.cooperation[0], 1 / 3, rel_tol=1e-6)
