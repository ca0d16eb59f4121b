"""libprune inspect: what it says of a model, against the model, the real stages' files and the real allocation."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from libprune.cli.footprint import Table, footprints, header_bytes
from libprune.cli.inspection import RATIOS, as_data, inspect_model, params_for, uniform_shapes
from libprune.cli.inspection_text import as_text
from libprune.cli.main import app
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe
from libprune.engine.errors import ParamsError, SourceError
from libprune.pipeline.artifacts import read_plan, write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import Params, load_params
from libprune.pipeline.sections import Allocate
from tests.support import tiny
from tests.support.models import FAMILIES
from tests.support.published import CONFIGS
from tests.support.shapes import Shape

PER_FILE = 4096
"""Bytes of headers and texts that a prediction may miss in each file, beside a tenth of the file."""

STAGES = ["prepare", "tokenize", "gradients", "hessian", "activations", "ablation"]
STAGES += ["score", "sensitivity", "levels", "latency", "allocate"]


def config_folder(folder: Path, config: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A tiny project whose collecting stages, score and allocate have run, with every kind of statistic."""
    folder = tmp_path_factory.mktemp("project")
    text = tiny.write_text(folder / "text.txt", documents=120)
    changes = {
        "gradients": {"sequences": 6, "second_moments": "full"},
        "hessian": {"sequences": 6, "estimator": "hutchinson"},
        "ablation": {"units": 9, "sequences": 2},
        "score": {"criterion": "taylor_2nd"},
        "allocate": {"method": "hgsp", "ratio": 0.3},
        "evaluate": {},
    }
    params = tiny.write_params(folder / "params.yaml", str(tiny.write_model(folder / "model")), str(text), **changes)
    for stage in STAGES:
        metrics = [folder / "metrics"] if stage == "allocate" else []
        import_module(f"stages.{stage}").main(params, folder / "artifacts", *metrics)
    return folder


def predicted(project: Path) -> dict[str, int]:
    params = load_params(project / "params.yaml")
    architecture = Architecture.from_json((project / "artifacts/architecture.json").read_text())
    return {
        name: size for stage in footprints(architecture, params, torch.float32) for name, size in stage.files.items()
    }


def test_every_file_of_the_stages_has_the_predicted_bytes(project):
    real = {
        str(path.relative_to(project / "artifacts")): path.stat().st_size
        for path in (project / "artifacts").rglob("*")
        if path.is_file() and path.suffix in {".safetensors", ".parquet"}
    }
    expected = {name: size for name, size in predicted(project).items() if not name.startswith(("pruned", "../"))}
    assert real.keys() == expected.keys() & real.keys()
    assert {name for name in expected if name.endswith((".safetensors", ".parquet"))} == real.keys()
    for name, size in real.items():
        assert abs(expected[name] - size) <= 0.1 * size + PER_FILE, name


def test_the_tensors_of_the_shards_are_predicted_to_the_byte(project):
    expected = predicted(project)
    for path in sorted((project / "artifacts").glob("*/layer-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tensors = sum(file.get_tensor(name).nbytes for name in names)
        assert expected[f"{path.parent.name}/{path.name}"] == tensors + header_bytes(names)


def test_the_tables_of_the_stages_have_the_predicted_columns(project, monkeypatch):
    made: list[Table] = []
    monkeypatch.setattr(Table, "nbytes", property(lambda self: made.append(self) or 0))
    predicted(project)
    real = [
        pq.read_metadata(path) for path in (project / "artifacts").rglob("*.parquet") if path.parent.name != "tokens"
    ]
    assert {(file.num_rows, file.num_columns) for file in real} <= {(table.rows, table.columns) for table in made}


@pytest.mark.parametrize("rows", [1000, 150_000])
def test_a_table_of_noise_has_the_predicted_bytes(tmp_path, rows):
    rng = np.random.default_rng(0)
    columns = {f"n{i}": rng.random(rows) for i in range(3)} | {"k": rng.integers(0, 100, rows), "c": np.zeros(rows)}
    write_table(tmp_path / "t.parquet", columns, {"model": "x"})
    table = Table(rows, numbers=3, labels=(100,), runs=1)
    assert table.nbytes == pytest.approx((tmp_path / "t.parquet").stat().st_size, rel=0.05, abs=2000)


def test_more_of_anything_is_predicted_to_take_more():
    architecture = describe(FAMILIES["llama"](0))
    base = Params.model_validate({"prepare": {"model": "m"}, "tokenize": {"text": "t"}})
    before = {stage.stage: stage for stage in footprints(architecture, base, torch.float32)}

    def after(section: str, **values: object) -> dict:
        changed = base.model_copy(update={section: getattr(base, section).model_copy(update=values)})
        return {stage.stage: stage for stage in footprints(architecture, changed, torch.float32)}

    assert after("gradients", storage_dtype="float32")["gradients"].written > before["gradients"].written
    assert after("gradients", second_moments="full")["gradients"].written > before["gradients"].written
    assert after("compute", batch_tokens=128)["gradients"].sums > before["gradients"].sums
    assert after("activations", storage_dtype="bfloat16")["activations"].written < before["activations"].written
    assert before["hessian"].written == 0 < after("hessian", estimator="fisher")["hessian"].written
    assert after("tokenize", calibration_sequences=512)["tokenize"].written > before["tokenize"].written
    assert after("slice", dtype="bfloat16")["slice"].written < before["slice"].written
    assert after("allocate", ratio=0.9)["slice"].written < before["slice"].written
    assert after("allocate", objective="cache")["slice"].written > before["slice"].written
    halved = {stage.stage: stage for stage in footprints(architecture, base, torch.bfloat16)}
    assert halved["prepare"].written < before["prepare"].written


def test_uniform_shapes_are_those_of_the_allocate_stage(project, tmp_path):
    """Scores by `random` do not compare between parts, so that the stage takes the same division."""
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["score"]["criterion"], params["score"]["scaling"] = "random", "rank"
    params["allocate"] |= {"method": "uniform", "min_channels": 4, "channel_multiple": 4}
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    for name in ("architecture.json", "weights.parquet", "gradients", "sensitivity.parquet"):
        (artifacts / name).symlink_to(project / "artifacts" / name)
    architecture = Architecture.from_json((artifacts / "architecture.json").read_text())
    limits = Allocate(min_channels=4, channel_multiple=4)
    for number, shape in enumerate(uniform_shapes(architecture, limits, torch.float32)):
        params["allocate"]["ratio"] = RATIOS[number]
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
        if number == 0:
            import_module("stages.score").main(tmp_path / "params.yaml", artifacts)
        import_module("stages.allocate").main(tmp_path / "params.yaml", artifacts, tmp_path)
        plan, meta = read_plan(Layout(artifacts), architecture)
        size = cost.size(architecture, plan)
        assert shape.loads == meta["shape"]
        assert {part: plan.kept(0, part) for part in architecture.parts} == shape.kept
        assert (size.decoder, size.total, 4 * size.cache) == (shape.decoder, shape.total, shape.cache)
        assert shape.weights == 4 * size.total
        assert shape.kept["mlp"] % 4 == 0


def test_a_share_that_the_floors_forbid_is_shown_as_refused(tmp_path):
    shapes = uniform_shapes(Shape(kv=4, ffn=12).architecture(), Allocate(min_groups=3, min_channels=9), torch.float32)
    assert [bool(shape.refused) for shape in shapes] == [False, False, True, True]
    assert "min_channels" in shapes[-1].refused


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_model_is_described_from_its_config_as_from_its_weights(tmp_path, name):
    model = FAMILIES[name](0)
    model.config.save_pretrained(tmp_path)
    found = inspect_model(params_for(str(tmp_path), None, False, None))
    assert found.architecture == describe(model)
    assert found.shapes[0].total == sum(parameter.numel() for parameter in model.parameters())
    data = json.loads(json.dumps(as_data(found)))
    by_part = sum(part["parameters"] for part in data["parts"].values())
    assert by_part + data["outside"] == data["total_parameters"] == found.shapes[0].total
    assert [stage["stage"] for stage in data["stages"]][-1] == "report"


def test_a_published_config_alone_is_enough_and_fits_a_hundred_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = {"num_hidden_layers": 2, "intermediate_size": 256, "torch_dtype": "bfloat16"}
    config_folder(tmp_path / "model", CONFIGS["Llama-3.1-8B"] | smaller)
    found = inspect_model(params_for("model", None, False, None))
    shown = as_text(found)
    assert f"{found.architecture.total_parameters:,}" in shown
    assert "stored as bfloat16" in shown
    assert "a stock config says 1, 2, 4, 8" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_nothing_loads_weights(tmp_path, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    done = CliRunner().invoke(app, ["inspect", str(tiny.write_model(tmp_path / "model")), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["layers"] == 4


def test_the_params_file_decides_what_is_collected_and_may_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(config_folder(tmp_path / "model", CONFIGS["SmolLM2-135M"]))
    tiny.write_params(tmp_path / "params.yaml", "another", "text", gradients={"sequences": 5})
    found = params_for(model, "main", True, None)
    assert (found.prepare.model, found.prepare.revision, found.prepare.trust_remote_code) == (model, "main", True)
    assert found.gradients.sequences == 5
    tiny.write_params(tmp_path / "other.yaml", "another", "text", gradients={"sequences": 6})
    assert params_for(model, None, False, tmp_path / "other.yaml").gradients.sequences == 6
    with pytest.raises(ParamsError, match=r"missing\.yaml does not exist"):
        params_for(model, None, False, tmp_path / "missing.yaml")
    (tmp_path / "params.yaml").unlink()
    assert (
        params_for(model, None, False, None).gradients.sequences == Params.model_fields["gradients"].default.sequences
    )


def test_a_model_that_is_not_there_or_not_dense_is_refused_in_one_line(tmp_path):
    quantized = CONFIGS["SmolLM2-135M"] | {"quantization_config": {"quant_method": "awq"}}
    with pytest.raises(SourceError, match="is quantized"):
        inspect_model(params_for(str(config_folder(tmp_path / "q", quantized)), None, False, None))
    (tmp_path / "no.gguf").write_bytes(b"nothing that is a model")
    config_folder(tmp_path / "odd", CONFIGS["SmolLM2-135M"] | {"num_attention_heads": 7})
    config_folder(tmp_path / "other", {"model_type": "t5"})
    for place in ("no", "no.gguf", "odd", "other"):
        done = CliRunner().invoke(app, ["inspect", str(tmp_path / place)])
        assert done.exit_code == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
