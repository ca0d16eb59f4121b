"""Artifacts are read as they were written, say where they come from, and are refused where they are damaged."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe
from libprune.engine.errors import ArtifactError
from libprune.engine.tables import check_rows, column, split_blocks, unit_index
from libprune.pipeline.artifacts import (
    Scores,
    read_architecture,
    read_json,
    read_plan,
    read_scores,
    read_table,
    require,
    same_origin,
    write_architecture,
    write_table,
    write_units,
)
from libprune.pipeline.layout import Layout
from tests.support.files import tree
from tests.support.models import FAMILIES
from tests.support.shapes import EQUAL_COSTS

reuses_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    return describe(FAMILIES["llama"](0), fingerprint="here")


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "table.parquet"
    write_table(path, {"a": np.arange(3)}, {})
    before = tree(tmp_path)
    with pytest.raises(TypeError):
        write_table(path, {"a": np.arange(4)}, {"not": {1, 2}})
    with pytest.raises(ValueError, match="length"):
        write_table(path, {"a": np.arange(4), "b": np.arange(5)}, {})
    assert tree(tmp_path) == before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@reuses_a_folder
@given(st.dictionaries(st.text(max_size=6), json_values, max_size=4))
def test_metadata_comes_back(tmp_path, meta):
    path = tmp_path / "table.parquet"
    write_table(path, {"a": np.arange(2)}, meta)
    assert read_table(path, "stage")[1] == meta


def test_columns_come_back_with_their_types(tmp_path):
    columns = {
        "whole": np.array([1, -2, 3]),
        "real": np.array([0.1, np.pi, -0.0]),
        "flag": np.array([True, False, True]),
        "text": np.array(["a", "ü", ""], dtype=object),
        "rows": np.arange(6).reshape(3, 2),
    }
    write_table(tmp_path / "t.parquet", columns, {})
    table, _ = read_table(tmp_path / "t.parquet", "stage")
    assert list(table) == list(columns)
    for name, values in columns.items():
        np.testing.assert_array_equal(np.stack(list(table[name])), values)
        assert name == "rows" or table[name].dtype == values.dtype


def test_equal_content_gives_equal_bytes(tmp_path):
    columns = {"a": np.linspace(0, 1, 50), "b": np.array(["x", "y"] * 25, dtype=object)}
    write_table(tmp_path / "one.parquet", columns, {"model": "m", "tokens": [1, 2]})
    write_table(tmp_path / "two.parquet", columns, {"tokens": [1, 2], "model": "m"})
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_units_are_listed_layer_by_layer_and_cut_back_into_blocks(tmp_path, architecture):
    def named(layer: int, part: str) -> dict[str, np.ndarray]:
        return {"value": 1000.0 * layer + 100 * (part == "mlp") + np.arange(architecture.units(part))}

    write_units(tmp_path / "units.parquet", architecture, named, {})
    table, _ = read_table(tmp_path / "units.parquet", "stage")
    check_rows(architecture, table, tmp_path / "units.parquet")
    expected = 1000 * table["layer_idx"] + 100 * (table["group_type"] == "mlp") + table["group_idx"]
    np.testing.assert_array_equal(table["value"], expected)
    for (layer, part), values in split_blocks(architecture, table["value"]):
        np.testing.assert_array_equal(values, named(layer, part)["value"])


def test_a_plan_and_an_architecture_come_back(tmp_path, architecture):
    layout = Layout(tmp_path)
    layout.architecture.write_text(architecture.to_json())
    assert read_architecture(layout) == architecture
    index = unit_index(architecture)
    keep = index["group_idx"] % 3 != 0
    write_table(layout.plan, index | {"keep": keep}, {"model": "here", "shape": "uniform"})
    plan, meta = read_plan(layout, architecture)
    assert meta["shape"] == "uniform"
    for block in architecture.blocks():
        np.testing.assert_array_equal(plan.keep[block], np.arange(architecture.units(block[1])) % 3 != 0)


def test_a_plan_of_other_rows_is_refused(tmp_path, architecture):
    layout, index = Layout(tmp_path), unit_index(architecture)
    fewer = {name: values[:-1] for name, values in index.items()}
    for rows in (fewer, {name: values[::-1] for name, values in index.items()}):
        write_table(layout.plan, rows | {"keep": np.ones(len(rows["group_idx"]), dtype=bool)}, {"model": "here"})
        with pytest.raises(ArtifactError, match=r"do not list the units of this model in order; run `dvc repro`"):
            read_plan(layout, architecture)


def test_a_plan_of_another_model_is_refused(tmp_path, architecture):
    layout = Layout(tmp_path)
    write_table(layout.plan, unit_index(architecture), {"model": "elsewhere"})
    with pytest.raises(
        ArtifactError, match=r"plan\.parquet belongs to model 'elsewhere', but the current model is 'her"
    ):
        read_plan(layout, architecture)


def test_an_origin_must_be_there_and_the_same():
    same_origin(Path("p"), {"model": "a", "more": 1}, {"model": "a"})
    with pytest.raises(ArtifactError, match="p belongs to tokens None, but the current tokens is 'b'"):
        same_origin(Path("p"), {"model": "a"}, {"model": "a", "tokens": "b"})


@pytest.mark.parametrize(
    "read",
    [
        partial(read_table, stage="somestage"),
        partial(read_json, stage="somestage"),
        partial(require, stage="somestage"),
    ],
    ids=lambda read: read.func.__name__,
)
def test_a_missing_file_names_the_stage_that_makes_it(tmp_path, read):
    with pytest.raises(ArtifactError, match=r"nowhere.* does not exist; run `dvc repro somestage` first"):
        read(tmp_path / "nowhere")


def test_a_missing_column_is_named_with_the_nearest():
    with pytest.raises(ArtifactError, match=r"the table has no entry 'tayler'.*did you mean 'taylor'"):
        column({"taylor": np.ones(1), "cost": np.ones(1)}, "tayler", "the table")


def test_a_table_that_libprune_did_not_write_is_refused(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    with pytest.raises(ArtifactError, match=r"t\.parquet carries no libprune metadata.*dvc repro stage"):
        read_table(tmp_path / "t.parquet", "stage")


@pytest.fixture(scope="module")
def table_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("table") / "t.parquet"
    columns = {"a": np.arange(50), "b": np.linspace(0, 1, 50), "c": np.array(["x", "y"] * 25, dtype=object)}
    write_table(path, columns, {"model": "here"})
    return path.read_bytes()


@reuses_a_folder
@given(st.floats(0, 0.999))
def test_a_table_that_was_cut_off_is_damaged(tmp_path, table_bytes, share):
    path = tmp_path / "t.parquet"
    path.write_bytes(table_bytes[: int(share * len(table_bytes))])
    with pytest.raises(ArtifactError, match=r"t\.parquet is damaged .*; delete it and run `dvc repro score`"):
        read_table(path, "score")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 0.999), st.integers(0, 7))
def test_a_flipped_bit_is_harmless_or_damage(tmp_path, table_bytes, share, bit):
    require_harmless_or_damage(tmp_path, table_bytes, int(share * len(table_bytes)), bit)


def test_a_flipped_bit_of_a_name_or_type_in_the_footer_is_harmless_or_damage(tmp_path, table_bytes):
    start = table_bytes.index(b"schema")
    for at in range(start, start + 40):
        for bit in range(8):
            require_harmless_or_damage(tmp_path, table_bytes, at, bit)


def require_harmless_or_damage(folder: Path, table_bytes: bytes, at: int, bit: int) -> None:
    damaged = bytearray(table_bytes)
    damaged[at] ^= 1 << bit
    (folder / "whole.parquet").write_bytes(table_bytes)
    (folder / "t.parquet").write_bytes(damaged)
    try:
        table, _ = read_table(folder / "t.parquet", "score")
    except ArtifactError:
        return
    expected, _ = read_table(folder / "whole.parquet", "score")
    assert {name: values.tolist() for name, values in table.items()} == {
        name: values.tolist() for name, values in expected.items()
    }


@pytest.mark.parametrize("text", ["", "{"])
def test_json_that_was_cut_off_is_damaged(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"a\.json is damaged"):
        read_json(tmp_path / "a.json", "evaluate")


@pytest.mark.parametrize("text", ["", "[]", '{"family": "llama"}', '{"family": "llama", "parts": 3}'])
def test_a_description_that_cannot_be_read_is_named_with_the_stage_to_run(tmp_path, text):
    (tmp_path / "architecture.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"architecture\.json is no description .*; run `dvc repro prepare`"):
        read_architecture(Layout(tmp_path))


@pytest.fixture
def scored(tmp_path) -> Layout:
    scored = Layout(tmp_path)
    write_architecture(scored, replace(EQUAL_COSTS.architecture(), fingerprint="here"))
    write_table(scored.calibration_tokens, {}, {"model": "here", "tokens": "text"})
    write_table(scored.scores, table(), {"model": "here", "tokens": "text", "comparable": True, "scaling": "none"})
    return scored


def table() -> dict:
    return EQUAL_COSTS.table(1.0 + np.arange(len(EQUAL_COSTS.unit_costs())))


def test_what_was_written_is_read_with_its_model(scored):
    scores = read_scores(scored)
    assert scores.architecture.fingerprint == "here"
    assert scores.origin == {"model": "here", "tokens": "text"}
    for name, values in table().items():
        assert (scores.table[name] == values).all()


def test_scores_of_another_model_are_refused(scored):
    write_table(scored.scores, table(), {"model": "elsewhere"})
    with pytest.raises(ArtifactError, match=r"belongs to model 'elsewhere', .*run `dvc repro`"):
        read_scores(scored)


def test_scores_of_another_text_are_refused_and_those_of_none_belong_to_the_text_beside_them(scored):
    write_table(scored.calibration_tokens, {}, {"model": "here", "tokens": "another"})
    with pytest.raises(ArtifactError, match=r"belongs to tokens 'text', .*run `dvc repro`"):
        read_scores(scored)
    write_table(scored.scores, table(), {"model": "here"})
    assert read_scores(scored).origin == {"model": "here", "tokens": "another"}


def test_missing_scores_name_the_stage(scored):
    scored.scores.unlink()
    with pytest.raises(ArtifactError, match="run `dvc repro score` first"):
        read_scores(scored)


@pytest.mark.parametrize(("comparable", "scaling"), [(True, "none"), (True, "rank"), (False, "none"), (False, "rank")])
def test_scores_compare_as_they_are_only_unscaled(comparable, scaling):
    scores = Scores(EQUAL_COSTS.architecture(), table(), {"comparable": comparable, "scaling": scaling})
    assert scores.compares("none") is (comparable and scaling == "none")
    assert scores.compares("sensitivity")


def test_without_a_text_the_origin_is_the_model_alone():
    assert Scores(EQUAL_COSTS.architecture(), table(), {"model": "here"}).origin == {"model": "here"}


def test_columns_are_added_or_take_the_place_of_others_and_the_scores_stay(scored):
    scores = read_scores(scored)
    before = scores.table["score"].copy()
    changed = scores.with_columns({"score": 2 * before, "more": before})
    assert (changed.table["score"] == 2 * before).all()
    assert (changed.table["more"] == before).all()
    assert (scores.table["score"] == before).all()
    assert "more" not in scores.table
    assert changed.meta is scores.meta
