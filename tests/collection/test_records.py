"""Every statistic: one pass, joined halves and any batch size give the same, and each is what it says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from libprune.collection.accumulator import finished
from libprune.collection.records import (
    HELD_OUT_SEQUENCES,
    HELD_OUT_TOKENS,
    BatchRows,
    Cosine,
    Gram,
    HeldOut,
    Histogram,
    InputMoments,
    MaskGradient,
    Pending,
    State,
    Statistic,
    Sum,
    WeightedMean,
    count,
    entropy,
    frequency,
)
from libprune.pipeline.shards import BINS

TOKENS, WIDTH = 24, 5


def inputs(seed: int, shape: tuple[int, ...] = (TOKENS, WIDTH)) -> Tensor:
    """Features of very different scales and means."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 3, shape[-1])
    return (torch.randn(shape, generator=generator) + torch.linspace(-2, 2, shape[-1])) * scale


Batches = list[tuple[Tensor, ...]]
"""What one statistic is updated with, batch by batch."""


def rows_of(x: Tensor, cuts: list[int]) -> list[Tensor]:
    return list(torch.tensor_split(x, sorted(cuts)))


def batches_of(kind: str, seed: int, cuts: list[int]) -> Batches:
    """The same data for the same seed, cut into batches at the given places."""
    if kind == "cosine":
        return list(zip(rows_of(inputs(seed), cuts), rows_of(inputs(seed + 1), cuts), strict=True))
    if kind == "mask":
        return [(part,) for part in rows_of(inputs(seed, (TOKENS, 3, WIDTH)), cuts)]
    if kind == "pending":
        return [(part.sum(0),) for part in rows_of(inputs(seed), cuts)]
    if kind == "sum":
        return [(part.sum(0), count(len(part))) for part in rows_of(inputs(seed), cuts)]
    if kind == "held_out":  # sequences with a place of their own, the last of them beyond the places
        numbers = torch.arange(TOKENS) + HELD_OUT_SEQUENCES - TOKENS + 3
        return list(zip(rows_of(inputs(seed, (TOKENS, 3, WIDTH)), cuts), rows_of(numbers, cuts), strict=True))
    if kind in {"rows", "weighted"}:  # batches have a number or a weight of their own: only the joining is free
        ones = [inputs(seed + i) for i in range(4)]
        if kind == "rows":
            return [(x, count(3), torch.tensor(i)) for i, x in enumerate(ones)]
        return [(x[0], torch.tensor(float(i + 1))) for i, x in enumerate(ones)]
    return [(part,) for part in rows_of(inputs(seed), cuts)]


STATISTICS: dict[str, Statistic] = {
    "moments": InputMoments(WIDTH),
    "gram": Gram(WIDTH, tile=2),
    "histogram": Histogram(WIDTH),
    "held_out": HeldOut(WIDTH),
    "cosine": Cosine(),
    "mask": MaskGradient(WIDTH, n_tok=7),
    "sum": Sum((WIDTH,), factor=2.0),
    "pending": Pending((WIDTH,)),
    "rows": BatchRows(4),
    "weighted": WeightedMean(WIDTH),
}


def one_pass(statistic: Statistic, batches: Batches) -> State:
    state = statistic.init()
    for batch in batches:
        if len(batch[0]):
            statistic.update(state, *batch)
    return state


def assert_same(statistic: Statistic, one: State, two: State) -> None:
    first, second = (finished({"s": statistic}, {"s": state}) for state in (one, two))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        scale = tensor.abs().nan_to_num().double()
        close = (tensor.double() - second[name].double()).abs() <= 1e-5 * scale + 1e-6 * scale.max()
        assert (close | tensor.isnan() & second[name].isnan()).all(), name


cuts = st.lists(st.integers(0, TOKENS), max_size=6)


@pytest.mark.parametrize("kind", STATISTICS)
@given(st.integers(0, 99), cuts, cuts)
def test_any_batches_give_the_same(kind, seed, one, two):
    statistic = STATISTICS[kind]
    assert_same(statistic, *(one_pass(statistic, batches_of(kind, seed, where)) for where in (one, two)))


@pytest.mark.parametrize("kind", STATISTICS)
@given(st.integers(0, 99), cuts, st.integers(0, 7))
def test_joined_parts_give_the_same_as_one_pass(kind, seed, where, middle):
    statistic, batches = STATISTICS[kind], batches_of(kind, seed, where)
    joined, later = one_pass(statistic, batches[:middle]), one_pass(statistic, batches[middle:])
    statistic.merge(joined, later)
    assert_same(statistic, joined, one_pass(statistic, batches))


@pytest.mark.parametrize("kind", STATISTICS)
def test_joining_with_nothing_changes_no_bit(kind):
    statistic = STATISTICS[kind]
    for empty_first in (True, False):
        state, empty = one_pass(statistic, batches_of(kind, 0, [5, 9])), statistic.init()
        before = {name: tensor.clone() for name, tensor in state.items()}
        one, two = (empty, state) if empty_first else (state, empty)
        statistic.merge(one, two)
        for name, tensor in before.items():
            assert one[name].dtype == statistic.fields[name].dtype
            assert torch.equal(one[name], tensor.to(one[name].dtype))


@pytest.mark.parametrize("kind", STATISTICS)
def test_what_is_stored_is_known_without_data(kind):
    """Sizes are announced from meta tensors: the same names, shapes and types as with data."""
    statistic = STATISTICS[kind]
    real = statistic.finish(one_pass(statistic, batches_of(kind, 0, [])))
    meta = statistic.finish(statistic.init("meta"))
    assert {n: (t.shape, t.dtype) for n, t in real.items()} == {n: (t.shape, t.dtype) for n, t in meta.items()}


def test_the_variance_survives_a_mean_far_above_it():
    """A mean 10,000 times the deviation, in float32 batches: E[x^2] - mean^2 in float32 would keep no digit."""
    x = (torch.randn(4096, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4).float()
    statistic = InputMoments(1)
    found = statistic.finish(one_pass(statistic, [(part,) for part in x.split(64)]))["input_variance"]
    assert float(found) == pytest.approx(float(x.double().var(correction=0)), rel=1e-3)


def test_the_gram_matrix_is_that_of_float64_truth_to_float32_rounding():
    """Many batches: the sum's error stays a few roundings of float32, not one a batch."""
    x = inputs(0, (20_000, 40))
    statistic = Gram(40, tile=16)
    found = statistic.finish(one_pass(statistic, [(part,) for part in x.split(100)]))[""].double()
    truth = x.double().T @ x.double() / len(x)
    scale = truth.diagonal().sqrt()
    assert float(((found - truth) / (scale[:, None] * scale)).abs().max()) < 2e-6


# Held-out inputs


@pytest.mark.parametrize("length", [3, HELD_OUT_TOKENS, 100])
def test_held_out_inputs_are_kept_at_positions_spread_evenly_over_their_sequence(length):
    x, numbers = inputs(0, (3, length, WIDTH)), torch.tensor([4, 0, HELD_OUT_SEQUENCES])
    statistic, kept = HeldOut(WIDTH), min(length, HELD_OUT_TOKENS)
    found = statistic.finish(one_pass(statistic, [(x, numbers)]))
    rows = found.pop("")
    assert [int(tokens) for tokens in found.values()] == [2 * kept]
    positions = [place * length // kept for place in range(kept)]
    assert torch.equal(rows[rows.any(1)], torch.cat([x[1, positions], x[0, positions]]))  # numbers 0 and 4


# Histograms


@given(st.floats(2**-19, 2**11), st.booleans())
def test_a_value_lies_in_its_half_octave(value, negative):
    x = torch.tensor([[-value if negative else value]], dtype=torch.float32)
    counts = Histogram(1).measure(x)["counts"]
    assert counts.sum() == 1
    (place,) = counts.flatten().nonzero().flatten().tolist()
    assert (place >= BINS // 2) is negative
    octave, second = divmod(place % (BINS // 2), 2)
    low = 2.0 ** (octave - 20) * (1.5 if second else 1.0)
    high = 2.0 ** (octave - 20) * (2.0 if second else 1.5)
    assert low <= abs(float(x)) < high


def test_values_beyond_the_edges_fall_into_the_last_bins():
    x = torch.tensor([[0.0], [2.0**-30], [2.0**20], [-(2.0**20)]])
    counts = Histogram(1).measure(x)["counts"][0]
    assert counts[0] == 2
    assert counts[BINS // 2 - 1] == counts[BINS - 1] == 1


def test_entropy_of_one_value_is_zero_and_of_equal_shares_is_the_logarithm_of_their_number():
    counts = torch.zeros(2, BINS, dtype=torch.int32)
    counts[0, 7] = 12
    counts[1, :8] = 3
    torch.testing.assert_close(entropy(counts), torch.tensor([0.0, math.log(8)], dtype=torch.float64))


@given(st.floats(2**-19, 2**11))
def test_frequency_counts_from_the_edge_below_the_threshold(threshold):
    x = torch.cat([torch.logspace(-6, 3, 300), -torch.logspace(-6, 3, 300)])[:, None]
    found = float(frequency(Histogram(1).measure(x)["counts"], threshold))
    assert found >= float((x.abs() >= threshold).double().mean())
    assert found <= float((x.abs() >= threshold / 1.51).double().mean())


# Weighted means


def test_weighted_samples_give_the_textbook_mean_and_error_for_equal_weights():
    statistic, values = WeightedMean(2), torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    found = statistic.finish(one_pass(statistic, [(row, torch.tensor(4.0)) for row in values]))
    torch.testing.assert_close(found["mean"], torch.tensor([3.0, 5.0], dtype=torch.float64))
    expected = torch.stack([values[:, 0].double().std() / 3**0.5, torch.tensor(0.0, dtype=torch.float64)])
    torch.testing.assert_close(found["standard_error"], expected)


def test_one_sample_has_no_error():
    statistic = WeightedMean(1)
    found = statistic.finish(one_pass(statistic, [(torch.ones(1), torch.tensor(2.0))]))
    assert found["standard_error"].isnan().all()
