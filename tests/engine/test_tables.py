"""Per-unit tables: their rows are the units of a model in order, and cut back into blocks."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from libprune.engine.errors import ArtifactError
from libprune.engine.tables import (
    check_rows,
    column,
    join_blocks,
    layers_and_parts,
    mean_columns,
    numbers,
    split_blocks,
    unit_index,
)
from tests.support.shapes import shapes


@given(shapes())
def test_a_column_is_cut_into_the_blocks_that_it_was_made_of(shape):
    architecture = shape.architecture()
    index = unit_index(architecture)
    rows_of = dict(split_blocks(architecture, np.arange(len(index["layer_idx"]))))
    assert join_blocks(architecture, dict(reversed(rows_of.items()))).tolist() == list(range(len(index["layer_idx"])))
    for (layer, part), rows in rows_of.items():
        assert set(index["layer_idx"][rows]) == {layer}
        assert set(index["group_type"][rows]) == {part}
        assert index["group_idx"][rows].tolist() == list(range(architecture.units(part)))


@given(shapes())
def test_the_rows_of_all_blocks_are_all_rows_once(shape):
    index = unit_index(shape.architecture())
    blocks = layers_and_parts(index)
    assert sorted(np.concatenate(blocks).tolist()) == list(range(len(index["layer_idx"])))
    for rows in blocks:
        assert len({(index["layer_idx"][row], index["group_type"][row]) for row in rows}) == 1
        assert (np.diff(rows) > 0).all()


@given(shapes())
def test_rows_in_another_order_are_refused(shape):
    architecture = shape.architecture()
    index = unit_index(architecture)
    check_rows(architecture, index, Path("table.parquet"))
    with pytest.raises(ArtifactError, match="do not list the units of this model in order"):
        check_rows(architecture, {name: values[::-1] for name, values in index.items()}, Path("table.parquet"))


def test_a_missing_column_is_named_with_the_nearest():
    with pytest.raises(ArtifactError, match=r"the table has no entry 'scores'.*did you mean 'score'"):
        column({"score": np.zeros(2)}, "scores", "the table")
    assert numbers({"score": np.array([1, 2])}, "score").dtype == np.float64


def test_means_have_the_standard_error_of_a_mean_and_none_of_a_single_sequence():
    values = np.array([[1.0, 2.0, 3.0, 4.0]])
    found = mean_columns("loss", values)
    assert found["loss"] == 2.5
    np.testing.assert_allclose(found["standard_error"], [np.sqrt(5 / 3) / 2])
    assert np.isnan(mean_columns("loss", values[:, :1])["standard_error"]).all()
