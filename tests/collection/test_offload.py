"""Where weights are: what is chosen, what a pass holds, and stages with weights on disk, which write the same bytes."""

import json
from pathlib import Path

import pytest
import torch

from libprune.collection import offload
from libprune.collection.offload import pass_bytes, settle
from libprune.engine.describe import describe
from libprune.models.parallel import World
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Activations, Compute, Gradients, Hessian
from libprune.statistics.activations import measure_activations
from libprune.statistics.gradients import measure_gradients
from libprune.statistics.hessian import measure_hessian
from tests.support import tiny
from tests.support.measured import LENGTH, write_project
from tests.support.models import FAMILIES

STAGES = ("prepare", "tokenize", "gradients", "hessian", "activations", "ablation", "score", "sensitivity", "depth")
STAGES += ("levels", "width", "allocate", "slice", "teacher", "recover", "export", "evaluate")
TIMED = {"speed", "draft", "decode", "prefill", "sha256", "peak_memory_bytes"}
"""Keys of an evaluation that hold measured times and memory, or depend on them."""
CPU = torch.device("cpu")


def needs(**changes: int) -> offload.PassBytes:
    return offload.PassBytes(
        **{"weights": 400, "layer": 10, "states": 5, "kept": 80, "logits": 20, "described": 7, "summed": 9, "grams": 8}
        | changes
    )


@pytest.mark.parametrize(
    ("asked", "free", "world", "chosen"),
    [
        ({}, 1000, World(), "none"),
        ({}, 900, World(), "disk"),
        ({"gradient_checkpointing": True}, 900, World(), "none"),
        ({}, 1900, World(0, 2, local_size=2), "disk"),
        ({}, 100, World(0, 2, sharded=True), "none"),
        ({"offload": "none"}, 100, World(), "none"),
        ({"offload": "disk"}, 10**6, World(), "disk"),
        ({"offload": "cpu"}, 10**6, World(), "cpu"),
    ],
)
def test_weights_are_on_disk_where_they_would_take_half_of_free_memory(asked, free, world, chosen, monkeypatch, capsys):
    monkeypatch.setattr(offload, "free_memory", lambda: free)
    compute = Compute(**asked)
    found = settle(compute, needs(), CPU, world)
    assert found == compute.model_copy(update={"offload": chosen})
    said = capsys.readouterr().out
    assert ("compute.offload: auto is " + chosen in said) == (compute.offload == "auto")


@pytest.mark.parametrize(("beside", "chosen"), [(0, "none"), (38, "none"), (39, "disk"), (2000, "disk")])
def test_what_something_else_is_going_to_take_is_not_free(beside, chosen, monkeypatch, capsys):
    monkeypatch.setattr(offload, "free_memory", lambda: 1000)
    assert settle(Compute(), needs(), CPU, World(), beside).offload == chosen
    assert ("0.0 MB of which the training takes" in capsys.readouterr().out) == (beside > 0)


@pytest.mark.parametrize(("on_gpu", "host", "chosen"), [(2000, 0, "none"), (900, 900, "cpu"), (900, 700, "disk")])
def test_a_gpu_takes_weights_from_the_host_where_they_fit_there(on_gpu, host, chosen, monkeypatch):
    monkeypatch.setattr(offload, "free_memory", lambda: host)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (on_gpu, 10**9))
    assert settle(Compute(), needs(), torch.device("cuda:0"), World()).offload == chosen


def test_a_pass_holds_what_the_shapes_say():
    architecture = describe(FAMILIES["llama"](0))
    found = pass_bytes(architecture, 100, torch.bfloat16)
    sizes = architecture.sizes
    assert found.weights == 2 * architecture.total_parameters
    assert found.states == 2 * 100 * sizes["model"] * architecture.layers
    assert found.logits == 4 * 100 * sizes["vocab"]
    assert found.kept == architecture.layers * found.layer
    assert pass_bytes(architecture, 200, torch.bfloat16).layer == 2 * found.layer


STATED = ("llama_mha", "gpt2", "qwen3_moe", "gpt_oss")
"""Tied embeddings, weights stored [in, out], and mixtures without and with biases."""


@pytest.mark.parametrize("name", STATED)
def test_statistics_of_weights_on_disk_have_the_same_bytes(name, tmp_path):
    """In another type than that in which the model is stored, so that no weight is read from its own file."""
    layout = Layout(write_project(FAMILIES[name](0), tmp_path / "project") / "artifacts")
    written = []
    for kind in ("none", "disk"):
        compute = Compute(device="cpu", dtype="bfloat16", batch_tokens=3 * LENGTH, offload=kind)
        measure_gradients(layout, compute, Gradients(sequences=5, batch_sequences=2))
        measure_hessian(layout, compute, Hessian(sequences=3, estimator="fisher"))
        measure_activations(layout, compute, Activations(sequences=5))
        written.append({path: path.read_bytes() for path in layout.root.rglob("*") if path.is_file()})
    assert len(written[0]) > 3 * 4
    assert written[0] == written[1]


SEARCH = {"method": "search", "evaluations": 2, "shape": "per_layer", "worth": "none"}
CASES = {
    "tied": ("llama_mha", "bfloat16", SEARCH, "local"),
    "mixture": ("qwen3_moe", "float32", {"method": "uniform", "shape": "per_layer", "worth": "none"}, "sequential"),
}


@pytest.mark.parametrize("case", CASES)
def test_with_weights_on_disk_every_stage_writes_the_same_bytes(case, tmp_path, quick_proof):
    """In the type in which the model is stored, so that its own file is mapped, and in another one."""
    name, dtype, allocate, repair = CASES[case]
    source = tmp_path / "source"
    FAMILIES[name](0).save_pretrained(source)
    tiny.write_tokenizer(source)
    text = tiny.write_text(tmp_path / "text.txt", documents=120)
    written = []
    for kind in ("none", "disk"):
        folder = tmp_path / kind
        folder.mkdir()
        tiny.write_params(
            folder / "params.yaml",
            str(source),
            str(text),
            compute={"device": "cpu", "dtype": dtype, "batch_tokens": 64, "offload": kind},
            tokenize={"calibration_sequences": 16},
            ablation={"units": 3, "sequences": 2},
            score={"scaling": "rank"},
            allocate={"ratio": 0.15, "worth": "sensitivity", "split": "proportional"} | allocate,
            slice={"repair": repair},
        )
        tiny.run_stages(folder, STAGES)
        files = [path for path in (folder / "artifacts").rglob("*") if path.is_file()]
        written.append({str(path.relative_to(folder)): _untimed(path) for path in files})
    assert written[0].keys() == written[1].keys()
    assert not [path for path, content in written[0].items() if content != written[1][path]]
    assert not list(tmp_path.rglob(".work/tmp*")), "files without names leave nothing"


def _untimed(path: Path) -> object:
    """The content of a file; of the evaluation without what was timed."""
    return _without(json.loads(path.read_text())) if path.name == "evaluation.json" else _read(path)


def _read(path: Path) -> bytes:
    return b"" if path.name == "model_card.md" else path.read_bytes()


def _without(found: object) -> object:
    if isinstance(found, dict):
        return {key: _without(value) for key, value in found.items() if key not in TIMED and "seconds" not in key}
    return found
