"""Artifacts are written whole or not at all, never through a hard link, and say where they come from."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe
from libprune.engine.errors import ArtifactError
from libprune.engine.tables import check_rows, column, split_blocks, unit_index
from libprune.pipeline.artifacts import (
    read_architecture,
    read_json,
    read_plan,
    read_table,
    require,
    same_origin,
    write_table,
    write_units,
)
from libprune.pipeline.layout import Layout
from libprune.pipeline.shards import read_meta, read_tensor, shard_path, write_shard
from libprune.pipeline.writing import write_json, writing, writing_folder
from tests.support.models import FAMILIES

reuses_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    return describe(FAMILIES["llama"](0), fingerprint="here")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_old_and_new(target: Path, folder: bool) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Writes an old and a new version through the library; what lies beside the target before and after."""
    versions = []
    for text in ("old", "new"):
        if folder:
            with writing_folder(target) as partial_folder:
                (partial_folder / text).write_text(text)
                (partial_folder / "inner").mkdir()
                (partial_folder / "inner" / "file").write_text(text)
        else:
            with writing(target) as partial_file:
                partial_file.write_text(text)
        versions.append(tree(target.parent))
    return versions[0], versions[1]


# Whole or not at all


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    old, new = write_old_and_new(tmp_path / "deep" / "file", folder=False)
    assert (old, new) == ({"file": b"old"}, {"file": b"new"})


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    old, new = write_old_and_new(tmp_path / "deep" / "folder", folder=True)
    assert old == {"folder/old": b"old", "folder/inner/file": b"old"}
    assert new == {"folder/new": b"new", "folder/inner/file": b"new"}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_nothing_half_written_is_left_when_writing_fails(tmp_path, existing, folder, error):
    target = tmp_path / "target"
    if existing:
        write_old_and_new(target, folder)
    before = tree(tmp_path)
    with pytest.raises(error), writing_folder(target) if folder else writing(target) as unfinished:
        (unfinished / "part" if folder else unfinished).write_text("half")
        assert {path: content for path, content in tree(tmp_path).items() if path in before} == before
        raise error
    assert tree(tmp_path) == before
    assert target.exists() is existing


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "table.parquet"
    write_table(path, {"a": np.arange(3)}, {})
    before = tree(tmp_path)
    with pytest.raises(TypeError):
        write_table(path, {"a": np.arange(4)}, {"not": {1, 2}})
    with pytest.raises(ValueError, match="length"):
        write_table(path, {"a": np.arange(4), "b": np.arange(5)}, {})
    assert tree(tmp_path) == before


def test_json_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert read_json(tmp_path / "a.json", "stage") == {"a": 1}
    assert list(tree(tmp_path)) == ["a.json"]


# Links into a cache


def test_a_file_that_is_a_hard_link_is_replaced_and_the_cache_keeps_its_content(tmp_path):
    writers = {
        "a.json": lambda path, value: write_json(path, {"a": value}),
        "a.parquet": lambda path, value: write_table(path, {"a": np.array([value])}, {}),
        "a.txt": lambda path, value: write_old_and_new(path, folder=False),
    }
    for name, write in writers.items():
        target, cached = tmp_path / name, tmp_path / f"cached-{name}"
        write(target, 1)
        os.link(target, cached)
        content = cached.read_bytes()
        write(target, 2)
        assert cached.read_bytes() == content
        assert not target.samefile(cached)


def test_a_folder_of_hard_links_is_replaced_and_the_cache_keeps_its_content(tmp_path):
    target, cached = tmp_path / "folder", tmp_path / "cached"
    with writing_folder(target) as folder:
        (folder / "file").write_text("old")
    os.link(target / "file", cached)
    with writing_folder(target) as folder:
        (folder / "file").write_text("new")
    assert (cached.read_text(), (target / "file").read_text()) == ("old", "new")


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_symbolic_link_is_replaced_and_what_it_points_to_stays(tmp_path, folder):
    kept = tmp_path / "cache" / "kept"
    write_old_and_new(kept, folder)
    before = tree(kept.parent)
    link = tmp_path / "out" / "link"
    link.parent.mkdir()
    link.symlink_to(kept)
    write_old_and_new(link, folder)
    assert not link.is_symlink()
    assert tree(kept.parent) == before


# What is written is what is read

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
    found, _ = read_table(tmp_path / "t.parquet", "stage")
    assert list(found) == list(columns)
    for name, values in columns.items():
        np.testing.assert_array_equal(np.stack(list(found[name])), values)
        assert name == "rows" or found[name].dtype == values.dtype


def test_equal_content_gives_equal_bytes(tmp_path, architecture):
    columns = {"a": np.linspace(0, 1, 50), "b": np.array(["x", "y"] * 25, dtype=object)}
    write_table(tmp_path / "one.parquet", columns, {"model": "m", "tokens": [1, 2]})
    write_table(tmp_path / "two.parquet", columns, {"tokens": [1, 2], "model": "m"})
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    tensors = {f"tensor{i}": torch.full((i + 1,), float(i)) for i in range(9)}
    backwards = dict(reversed(tensors.items()))
    metas = [{f"key{i}": i for i in order} for order in (range(9), reversed(range(9)))]
    for name, content, meta in zip(("one", "two"), (tensors, backwards), metas, strict=True):
        with writing_folder(tmp_path / name) as folder:
            write_shard(folder, 0, content, meta)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert len(tree(tmp_path / "one")) == 1


def test_a_layers_tensors_and_origin_come_back(tmp_path, architecture):
    turned = torch.arange(6.0).reshape(2, 3).T
    for layer in range(architecture.layers):
        write_shard(tmp_path, layer, {"w": turned + layer}, {"model": "here"})
    assert torch.equal(read_tensor(tmp_path, 2, "w", "gradients"), turned + 2)
    assert read_meta(tmp_path, "gradients") == {"model": "here"}


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


# What cannot be used


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
        partial(read_meta, stage="somestage"),
        partial(read_tensor, layer=0, name="w", stage="somestage"),
    ],
    ids=lambda read: read.func.__name__,
)
def test_a_missing_file_names_the_stage_that_makes_it(tmp_path, read):
    with pytest.raises(ArtifactError, match=r"nowhere.* does not exist; run `dvc repro somestage` first"):
        read(tmp_path / "nowhere")


def test_a_missing_tensor_or_column_is_named_with_the_nearest(tmp_path, architecture):
    write_shard(tmp_path, 0, {"q_proj.weight": torch.ones(1)}, {})
    with pytest.raises(ArtifactError, match=r"no entry 'q_prj\.weight'; it holds 1 .*did you mean 'q_proj\.weight'"):
        read_tensor(tmp_path, 0, "q_prj.weight", "gradients")
    with pytest.raises(ArtifactError, match=r"the table has no entry 'tayler'.*did you mean 'taylor'"):
        column({"taylor": np.ones(1), "cost": np.ones(1)}, "tayler", "the table")


def test_files_that_libprune_did_not_write_are_refused(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t.parquet")
    with pytest.raises(ArtifactError, match=r"t\.parquet carries no libprune metadata.*dvc repro stage"):
        read_table(tmp_path / "t.parquet", "stage")
    save_file({"w": torch.ones(1)}, shard_path(tmp_path, 0))
    with pytest.raises(ArtifactError, match=r"layer-000\.safetensors carries no libprune metadata"):
        read_meta(tmp_path, "stage")


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
    damaged = bytearray(table_bytes)
    damaged[int(share * len(damaged))] ^= 1 << bit
    (tmp_path / "whole.parquet").write_bytes(table_bytes)
    (tmp_path / "t.parquet").write_bytes(damaged)
    try:
        found, _ = read_table(tmp_path / "t.parquet", "score")
    except ArtifactError:
        return
    expected, _ = read_table(tmp_path / "whole.parquet", "score")
    assert {name: values.tolist() for name, values in found.items()} == {
        name: values.tolist() for name, values in expected.items()
    }


@pytest.mark.parametrize("read", [partial(read_meta, stage="s"), partial(read_tensor, layer=0, name="w", stage="s")])
def test_a_shard_that_was_cut_off_is_damaged(tmp_path, architecture, read):
    write_shard(tmp_path, 0, {"w": torch.ones(9)}, {})
    shard_path(tmp_path, 0).write_bytes(shard_path(tmp_path, 0).read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=r"layer-000\.safetensors is damaged"):
        read(tmp_path)


@pytest.mark.parametrize("text", ["", "{"])
def test_json_that_was_cut_off_is_damaged(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"a\.json is damaged"):
        read_json(tmp_path / "a.json", "evaluate")


def test_what_an_ended_process_left_is_removed_though_nobody_took_note_of_its_end(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    left = tmp_path / f".target.{ended.pid}.partial"
    running = tmp_path / f".target.{os.getppid()}.partial"
    left.mkdir()
    running.touch()
    with writing(tmp_path / "target") as partial_file:
        partial_file.touch()
    assert not left.exists()
    assert running.exists()
    ended.wait()


@pytest.mark.parametrize("text", ["", "[]", '{"family": "llama"}', '{"family": "llama", "parts": 3}'])
def test_a_description_that_cannot_be_read_is_named_with_the_stage_to_run(tmp_path, text):
    (tmp_path / "architecture.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"architecture\.json is no description .*; run the prepare stage again"):
        read_architecture(Layout(tmp_path))
