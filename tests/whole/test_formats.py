"""docs/formats.md is enough to read what a run writes, and nothing is written that it does not speak of."""

import hashlib
import importlib
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors import safe_open

from libprune.pipeline.params import load_params
from libprune.pipeline.story import STEPS, working
from libprune.statistics import latency
from tests.support import documented, tiny
from tests.support.closure import ROOT

SECTIONS = documented.sections()
CHANGES = {
    "gradients": {"sequences": 6, "second_moments": "full"},
    "ablation": {"units": 4, "sequences": 2},
    "allocate": {"method": "search", "objective": "latency", "depth": "joint"},
    "latency": {"tokens": 4, "widths": 2, "rounds": 1},
    "recover": {"method": "full", "top_k": 3},
    "export": {"formats": ["transformers"], "pad_channels": 8},
}
"""Settings with which as many tables as possible have rows."""


@pytest.fixture(scope="module")
def run(tmp_path_factory, by_forks) -> Path:
    """A folder in which all stages have run."""
    folder = tmp_path_factory.mktemp("formats")
    model, text = tiny.write_model(folder / "source"), tiny.write_text(folder / "text.txt")
    places = {
        "params": tiny.write_params(folder / "params.yaml", str(model), str(text), **CHANGES),
        "artifacts": folder / "artifacts",
        "metrics": folder / "metrics",
        "report": folder / "report",
    }
    with pytest.MonkeyPatch.context() as patch, by_forks():
        patch.chdir(folder)
        patch.setattr(latency, "_seconds", tiny.by_parameters)  # the time of so small a layer is noise
        for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]:
            main = importlib.import_module(f"stages.{stage}").main
            main(**{name: places[name] for name in inspect.signature(main).parameters})
        asked = places["params"].read_text()
        tiny.change_params(folder, "allocate", objective="parameters", width=36)  # times are of the whole width
        importlib.import_module("stages.width").main(places["params"], places["artifacts"])
        places["params"].write_text(asked)
    return folder


@pytest.fixture(scope="module")
def idle(run, tmp_path_factory) -> Path:
    """A folder in which all stages have run that have nothing to do with the defaults."""
    folder = tmp_path_factory.mktemp("idle")
    params = tiny.write_params(folder / "params.yaml", "a model", "a text", hessian={"estimator": "none"})
    (folder / "artifacts").mkdir()
    (folder / "artifacts/architecture.json").write_bytes((run / "artifacts/architecture.json").read_bytes())
    places = {"params": params, "artifacts": folder / "artifacts", "metrics": folder / "metrics"}
    stages = sorted({*STEPS} - {*working(load_params(params))})
    assert len(stages) == 10, stages
    for stage in stages:
        main = importlib.import_module(f"stages.{stage}").main
        main(**{name: places[name] for name in inspect.signature(main).parameters})
    return folder


@pytest.fixture(scope="module")
def architecture(run) -> dict:
    return json.loads((run / "artifacts/architecture.json").read_text())


def files(run: Path, section: documented.Section) -> list[Path]:
    found = sorted(run.glob(section.pattern))
    assert found, f"{section.path} is documented and not written"
    return found


def with_table(name: str) -> list:
    return [pytest.param(one, id=one.path) for one in SECTIONS if name in one.tables]


def test_every_file_that_is_written_is_documented_and_every_documented_one_is_written(run):
    written = {
        str(path.relative_to(run))
        for folder in ("artifacts", "metrics", "report")
        for path in (run / folder).rglob("*")
        if path.is_file()
    }
    assert {path for path in written if documented.matching(path, SECTIONS) is None} == set()
    for section in SECTIONS:
        for row in section.tables.get("file", []):
            assert row["when"] or files(run, documented.Section(section.path + row["file"]))


def test_stages_that_have_nothing_to_do_leave_no_empty_folder_and_no_file_that_is_not_documented(idle):
    found = [path for folder in ("artifacts", "metrics") for path in (idle / folder).rglob("*")]
    assert [path for path in found if path.is_dir() and not any(path.iterdir())] == []
    written = {str(path.relative_to(idle)) for path in found if path.is_file()}
    assert len(written) > 12
    assert {path for path in written if documented.matching(path, SECTIONS) is None} == set()


@pytest.mark.parametrize("section", with_table("column"))
def test_tables_have_exactly_the_documented_columns(run, section):
    rows = {row["column"]: row for row in section.tables["column"]}
    component = rows.pop("<component>", None)
    for path in files(run, section):
        types, values, _ = documented.parquet(path)
        further = types.keys() - rows.keys()
        assert bool(further) is (component is not None), further
        assert documented.required(list(rows.values()), "column") <= types.keys()
        for name, kind in types.items():
            assert kind == (component if name in further else rows[name])["type"], name
        assert all(len(column) == len(next(iter(values.values()))) for column in values.values())


@pytest.mark.parametrize("section", with_table("metadata"))
def test_metadata_have_exactly_the_documented_keys(run, section):
    rows = documented.metadata_rows(section.tables["metadata"], run / "params.yaml")
    for path in files(run, section):
        meta = (documented.shard if path.suffix == ".safetensors" else documented.parquet)(path)[-1]
        assert documented.required(rows, "metadata") <= meta.keys() <= {row["metadata"] for row in rows}
        for row in rows:
            assert row["metadata"] not in meta or documented.is_of(meta[row["metadata"]], row["type"]), row


def test_tables_without_metadata_of_their_own_have_those_of_their_shards(run):
    for section in SECTIONS:
        if "column" in section.tables and "metadata" not in section.tables:
            (path,) = files(run, section)
            assert documented.parquet(path)[-1] == documented.shard(path.with_name("layer-000.safetensors"))[-1]


@pytest.mark.parametrize("section", with_table("tensor"))
def test_shards_have_exactly_the_documented_tensors(run, section, architecture):
    found = files(run, section)
    assert len(found) == architecture["layers"]
    for layer, path in enumerate(found):
        tensors, _ = documented.shard(path)
        expected = {name: row for row, name, _ in documented.tensors(section.tables["tensor"], architecture, layer)}
        always = {name for name, row in expected.items() if not row["when"]}
        assert always <= tensors.keys() <= expected.keys()
        for row, name, shape in documented.tensors(section.tables["tensor"], architecture, layer):
            if name in tensors:
                assert tensors[name][0] in row["type"].split(" or "), name
                assert tensors[name][1] == shape, name


def test_axes_have_exactly_the_documented_tensors(run):
    (section,) = (one for one in SECTIONS if "axes tensor" in one.tables)
    rows = {row["axes tensor"]: row for row in section.tables["axes tensor"]}
    tensors, meta = documented.shard(*files(run, section))
    norms = [norm["module"] for norm in meta["stream"]["norms"]]
    expected = {name.replace("<norm>", norm): row for name, row in rows.items() for norm in norms}
    assert tensors.keys() == {name for name, row in expected.items() if "principal" not in row["when"]}
    for name, (kind, shape) in tensors.items():
        assert (kind, shape) == (expected[name]["type"], [48] * len(expected[name]["shape"].split(","))), name


@pytest.mark.parametrize("section", with_table("key"))
def test_json_files_have_exactly_the_documented_keys(run, section):
    rows = {row["key"]: row for row in section.tables["key"]}
    for path in files(run, section):
        found = list(documented.leaves(section.tables["key"], documented.content(path.read_text())))
        assert documented.required(list(rows.values()), "key") <= {key for key, _ in found} <= rows.keys()
        for key, value in found:
            assert documented.is_of(value, rows[key]["type"]), key


@pytest.mark.parametrize("section", with_table("field"))
def test_csv_files_have_exactly_the_documented_fields(run, section):
    for path in files(run, section):
        header, *rows = path.read_text().splitlines()
        assert header.split(",") == [row["field"] for row in section.tables["field"]]
        assert rows


# What the document says in words


def test_artifacts_hold_the_digest_of_their_content(run):
    for path in (run / "artifacts").glob("*.json"):
        content = json.loads(path.read_text())
        digest = content.pop("sha256")
        assert digest == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(), path
    for path in (run / "artifacts").rglob("*.parquet"):
        meta = json.loads(pq.read_schema(path).metadata[b"libprune"])
        assert re.fullmatch("[0-9a-f]{64}", meta["sha256"]), path
    for path in (run / "artifacts/activations").glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            meta, names = json.loads(file.metadata()["libprune"]), set(file.keys())
        digests = meta.pop("sha256")
        assert digests.keys() == names | {""}
        assert digests[""] == hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def test_the_stored_predictions_are_as_documented(run):
    about = documented.content((run / "artifacts/teacher/teacher.json").read_text())
    _, _, text = documented.parquet(run / "artifacts/tokens/recovery.parquet")
    paths = sorted((run / "artifacts/teacher").glob("predictions-*.safetensors"))
    assert [path.name for path in paths] == [f"predictions-{number:05d}.safetensors" for number in range(len(paths))]
    rows = 0
    for path in paths:
        tensors, meta = documented.shard(path)
        assert meta == {key: value for key, value in about.items() if key != "at_once"}
        (here, *shape) = tensors["ids"][1]
        assert shape == [text["length"], about["top_k"]]
        assert tensors == {"log_probabilities": ("F16", [here, *shape]), "ids": ("I32", [here, *shape])}
        assert here == min(about["at_once"], text["sequences"] - rows)
        rows += here
    assert rows == text["sequences"]


def test_what_a_training_leaves_behind_says_the_same_everywhere(run):
    made = json.loads((run / "artifacts/recovered/libprune.json").read_text())
    evaluation, recovery = json.loads((run / "artifacts/evaluation.json").read_text()), made["recovery"]
    assert evaluation["recovery"] == recovery
    figures = json.loads((run / "metrics/recovery.json").read_text())
    assert figures.items() <= recovery.items()
    trained = json.loads((run / "metrics/evaluation.json").read_text())["recovered"]
    assert trained.items() <= (recovery | evaluation["recovered"]).items()
    lines = (run / "metrics/learning_curve.csv").read_text().splitlines()[1:]
    cells = [[None if cell == "" else float(cell) for cell in line.split(",")] for line in lines]
    assert cells == [list(row.values()) for row in recovery["curve"]]


def test_per_unit_tables_list_the_units_in_the_documented_order(run, architecture):
    parts = {name: architecture["sizes"][part["axis"]] for name, part in architecture["parts"].items()}
    layers = range(architecture["layers"])
    expected = [(layer, part, unit) for layer in layers for part, units in parts.items() for unit in range(units)]
    sentence = re.compile(r"### `(\S+)`\n\nA per-unit table")
    names = sentence.findall(documented.DOCUMENT.read_text())
    assert len(names) == 6
    for name in names:
        _, table, _ = documented.parquet(run / name)
        assert list(zip(table["layer_idx"], table["group_type"], table["group_idx"], strict=True)) == expected, name


def test_scores_follow_from_their_columns_as_documented(run):
    types, table, meta = documented.parquet(run / "artifacts/scores.parquet")
    listed = {"layer_idx", "group_type", "group_idx", "importance", "cost", "score"}
    assert meta["scaling"] == "none"
    np.testing.assert_allclose(table["importance"], np.sum([table[name] for name in types.keys() - listed], axis=0))
    np.testing.assert_allclose(table["score"], np.divide(table["importance"], table["cost"]))


def test_the_pruned_weights_are_the_dense_ones_under_the_plan_by_the_documented_rule(run, architecture):
    """The shapes: no layer is gone in this run, so that the names stay."""
    _, plan, _ = documented.parquet(run / "artifacts/plan.parquet")
    kept: dict[tuple[int, str], int] = {}
    for layer, part, keep in zip(plan["layer_idx"], plan["group_type"], plan["keep"], strict=True):
        kept[layer, part] = kept.get((layer, part), 0) + keep
    assert min(kept.values()) > 0
    with documented.safe_open(run / "artifacts/pruned/model.safetensors", framework="np") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    expected = {}
    for one in architecture["parameters"]:
        sizes = dict(architecture["sizes"])
        if one["part"] is not None:
            sizes[architecture["parts"][one["part"]]["axis"]] = kept[one["layer"], one["part"]]
        expected[one["name"]] = [documented.size(dim, sizes) for dim in one["dims"]]
    assert found == expected
    assert json.loads((run / "artifacts/evaluation.json").read_text())["kept"] == [
        {part: kept[layer, part] for part in architecture["parts"]} for layer in range(architecture["layers"])
    ]
