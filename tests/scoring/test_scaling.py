"""Scalings: the scale that each block gets, and the order that it keeps."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from libprune.scoring.scaling import SCALINGS, scale
from tests.support.tables import block_rows


@st.composite
def scaled_tables(draw):
    """Importances of up to four blocks, some of a single unit, whose rows are interleaved."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    labels = [(i // 2, ("attention", "mlp")[i % 2]) for i, size in enumerate(sizes) for _ in range(size)]
    labels = draw(st.permutations(labels))
    layers, parts = zip(*labels, strict=True)
    values = draw(arrays(np.float64, len(labels), elements=st.integers(0, 50).map(lambda k: k / 8)))
    return {"layer_idx": np.array(layers), "group_type": np.array(parts, dtype=object)}, values


@given(scaled_tables())
def test_every_block_gets_the_scale_it_is_promised(case):
    table, values = case
    scaled = {how: scale(values, table, how) for how in SCALINGS}
    for rows in block_rows(table):
        own, count = values[rows], len(rows)
        z, unit, rank = (scaled[how][rows] for how in ("zscore", "minmax", "rank"))
        if np.ptp(own) == 0:
            assert (z.tolist(), unit.tolist(), rank.tolist()) == ([0] * count, [0] * count, [0.5] * count)
            continue
        assert (z.mean(), z.std()) == pytest.approx((0, 1), abs=1e-9)
        assert (unit.min(), unit.max()) == (0, 1)
        np.testing.assert_allclose(rank, [((own < one).sum() + (own <= one).sum()) / (2 * count) for one in own])


@pytest.mark.parametrize("how", SCALINGS)
@given(scaled_tables(), st.sampled_from([0.25, 8.0]), st.sampled_from([0.0, 16.0]))
def test_the_order_is_kept_and_a_blocks_own_scale_is_taken_out(how, case, factor, offset):
    table, values = case
    scaled = scale(values, table, how)
    levelled = values.copy()
    levelled[block_rows(table)[0]] = levelled[block_rows(table)[0]] * factor + offset
    np.testing.assert_allclose(scale(levelled, table, how), scaled, atol=1e-9)
    for rows in block_rows(table):
        order = np.argsort(values[rows], kind="stable")
        assert (np.diff(scaled[rows][order]) >= 0).all()


def test_units_that_a_criterion_does_not_tell_apart_share_a_rank():
    """Of several criteria, one that calls many units worthless would else order them by their place in the layer."""
    assert SCALINGS["rank"](np.array([0.0, 5.0, 0.0, 1.0])).tolist() == [0.25, 0.875, 0.25, 0.625]
    assert SCALINGS["rank"](np.array([3.0, 1.0, 2.0])).tolist() == pytest.approx([5 / 6, 1 / 6, 0.5])


@given(st.floats(1e-6, 1e6), st.integers(2, 9))
def test_equal_values_have_zscore_0_whatever_they_are(value, count):
    table = {"layer_idx": np.zeros(count), "group_type": np.array(["mlp"] * count, dtype=object)}
    assert scale(np.full(count, value), table, "zscore").tolist() == [0] * count
