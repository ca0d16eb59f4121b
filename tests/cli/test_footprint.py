"""The predicted bytes of every file are those that the real stages write."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from libprune.cli.footprint import Table, _lora_parameters, footprints, header_bytes
from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.pipeline.artifacts import read_architecture, write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import Params, load_params
from libprune.pipeline.sections import Allocate, Recover
from libprune.recovery.student import prepare, trained_parameters
from tests.support import tiny
from tests.support.models import ENCODERS, FAMILIES, MIXTURES

PER_FILE = 4096
"""Bytes of headers and texts that a prediction may miss in each file, beside a tenth of the file."""
CURVE = 30_000
"""Bytes that the prediction of the record of a recovery may miss: how long its curve is, is not foretold."""


STAGES = ["prepare", "tokenize", "gradients", "hessian", "activations", "ablation"]
STAGES += ["score", "sensitivity", "depth", "levels", "width", "latency", "allocate"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A tiny project whose collecting stages, score and allocate have run, with every kind of statistic."""
    changes = {
        "gradients": {"sequences": 6, "second_moments": "full"},
        "hessian": {"sequences": 6, "estimator": "hutchinson"},
        "ablation": {"units": 9, "sequences": 2},
        "score": {"criterion": "taylor_2nd"},
        "allocate": {"method": "hgsp", "ratio": 0.3},
        "evaluate": {},
    }
    return tiny.write_project(tmp_path_factory.mktemp("project"), STAGES, **changes)


def predicted(project: Path) -> dict[str, int]:
    params = load_params(project / "params.yaml")
    architecture = read_architecture(Layout(project / "artifacts"))
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


TRAINED = {"length": 8, "tokens": 128, "held_out": 2, "batch_tokens": 32, "checks": 2}


def test_the_files_of_a_recovery_have_the_predicted_bytes(project, tmp_path, quick_proof):
    project = shutil.copytree(project, tmp_path / "copy")
    artifacts = project / "artifacts"
    for top_k, stages in ((None, ["slice", "teacher", "recover"]), (3, ["teacher"])):
        tiny.change_params(project, "recover", **TRAINED, method="full", top_k=top_k)
        tiny.run_stages(project, stages)
        made = [artifacts / "tokens/recovery.parquet", *artifacts.glob("teacher/*"), *artifacts.glob("recovered/*")]
        real = {str(path.relative_to(artifacts)): path.stat().st_size for path in made}
        expected = predicted(project)
        assert {name for name in real if name.startswith(("tokens", "teacher"))} <= expected.keys()
        for name in real.keys() & expected.keys():
            bound = CURVE if name.endswith("libprune.json") else 0.1 * real[name] + PER_FILE
            assert abs(expected[name] - real[name]) <= bound, name
    tiny.change_params(project, "recover", method="none")
    assert not any(name.startswith(("teacher", "recovered")) for name in predicted(project))


def test_files_for_other_programs_are_foretold_by_their_types(project):
    before = predicted(project).keys()
    tiny.change_params(project, "export", formats=["gguf", "onnx"], gguf_types=["f16", "q8_0"])
    sizes = predicted(project)
    names = ["exported/model.f16.gguf", "exported/model.q8_0.gguf", "exported/onnx"]
    assert sizes.keys() - before == set(names)
    half, eighth, whole = (sizes[name] for name in names)
    architecture = read_architecture(Layout(project / "artifacts"))
    left = architecture.total_parameters - round(0.3 * architecture.decoder_parameters)
    assert whole == 4 * left
    assert half - eighth == pytest.approx((2 - 34 / 32) * left, abs=1)
    assert half > 2 * left
    tiny.change_params(project, "export", formats=[])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # said by peft of GPT-2, which it sets right itself
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {*ENCODERS, *MIXTURES, "gemma4_text"}))
@pytest.mark.parametrize("targets", ["all-linear", ["down_proj", "1.self_attn.o_proj", "fc2"]])
def test_the_matrices_of_lora_are_those_that_peft_makes(name, targets):
    model = FAMILIES[name](0)
    recover = Recover(method="lora", lora_rank=3, lora_targets=targets)
    foretold = _lora_parameters(describe(model), recover, Allocate(ratio=None))
    try:
        trained = trained_parameters(prepare(model, recover))
    except LibpruneError:  # no map has such a name
        trained = {}
    assert foretold == sum(parameter.numel() for parameter in trained.values())


def test_training_is_predicted_from_what_pruning_leaves():
    architecture = describe(FAMILIES["llama"](0))

    def foretold(ratio: float | None, **recover: object):
        sections = {"recover": recover, "allocate": {"ratio": ratio}, "compute": {"dtype": "float32"}}
        base = Params.model_validate({"prepare": {"model": "m"}, "tokenize": {"text": "t"}, **sections})
        return {stage.stage: stage for stage in footprints(architecture, base, torch.float32)}

    total, left = (
        architecture.total_parameters,
        round(architecture.total_parameters - 0.5 * architecture.decoder_parameters),
    )
    assert not {"teacher", "recover"} & foretold(0.5).keys()
    full = foretold(0.5, method="full")["recover"]
    assert full.training == 4 * (4 * left + total)
    assert full.checkpoints == 3 * 12 * left
    assert foretold(0.5, method="full", top_k=4)["recover"].training == 16 * left
    lora = [foretold(ratio, method="lora", lora_rank=2, top_k=4)["recover"] for ratio in (0.1, 0.25, 0.5)]
    assert lora[0].checkpoints > lora[1].checkpoints > lora[2].checkpoints
    assert lora[2].training == 4 * left + lora[2].checkpoints // 3 // 12 * 16  # weights, gradients and two states


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
    assert after("tokenize", repair_length=256)["tokenize"].written > before["tokenize"].written
    assert after("slice", dtype="bfloat16")["slice"].written < before["slice"].written
    assert after("allocate", ratio=0.9)["slice"].written < before["slice"].written
    assert after("allocate", objective="cache")["slice"].written > before["slice"].written
    halved = {stage.stage: stage for stage in footprints(architecture, base, torch.bfloat16)}
    assert halved["prepare"].written < before["prepare"].written
