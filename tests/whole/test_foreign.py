"""No stage goes on with artifacts of another model or text, or with changed files."""

import inspect
import random
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from libprune.engine.errors import LibpruneError
from libprune.models.folder import fingerprint
from libprune.pipeline.artifacts import read_json, read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.shards import load_tensor
from libprune.results.record import read_whole
from tests.support import tiny
from tests.support.closure import ROOT

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
CHANGES = {
    "hessian": {"estimator": "none"},
    "score": {"criterion": "obs_fisher"},
    "allocate": {"method": "global", "worth": "sensitivity", "objective": "latency"},
    "latency": {"tokens": 4, "widths": 2, "rounds": 1},
    "slice": {"repair": "local"},
    "recover": {"method": "full", "top_k": 3},
    "evaluate": {"continuations": 0},
    "export": {"formats": ["transformers"], "pad_channels": 8},
}
FIRST = {(stage, "artifacts/tokens/calibration.parquet") for stage in ("gradients", "activations", "sensitivity")}
FIRST |= {("teacher", "artifacts/tokens/evaluation.parquet")}
"""Stages that have nothing to compare a text with: what they make of it names it, and the stages behind them refuse."""


def run(project: Path, stage: str) -> None:
    main = import_module(f"stages.{stage}").main
    places = {"params": "params.yaml", "artifacts": "artifacts", "metrics": "metrics", "report": "report"}
    main(**{name: project / places[name] for name in inspect.signature(main).parameters})


def made(project: Path, model: Path, seed: int) -> Path:
    """A project in which all stages have run."""
    project.mkdir()
    documents = tiny.write_text(project / "text.txt", 120).read_text().splitlines()
    random.Random(seed).shuffle(documents)
    (project / "text.txt").write_text("\n".join(documents) + "\n")
    tiny.write_params(project / "params.yaml", str(model), str(project / "text.txt"), **CHANGES)
    for stage in PIPELINE:
        run(project, stage)
    return project


@pytest.fixture(scope="module")
def projects(tmp_path_factory) -> dict[str, Path]:
    """A project, one with another model, and one with another text."""
    root = tmp_path_factory.mktemp("foreign")
    model = tiny.write_model(root / "model")
    other = shutil.copytree(model, root / "other")
    changed = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    changed.save_pretrained(other)
    return {
        "own": made(root / "own", model, 0),
        "model": made(root / "other-model", other, 0),
        "text": made(root / "other-text", model, 1),
    }


@pytest.fixture
def project(projects, tmp_path) -> Path:
    return Path(shutil.copytree(projects["own"], tmp_path / "project"))


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {one.relative_to(path.parent).as_posix(): one.read_bytes() for one in files}


def clear(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


READ = [
    pytest.param(stage, artifact, id=f"{stage}-{artifact.removeprefix('artifacts/')}")
    for stage, entry in PIPELINE.items()
    for artifact in entry["deps"]
    if artifact.startswith("artifacts/")
]


@pytest.mark.parametrize("kind", ["model", "text"])
@pytest.mark.parametrize(("stage", "artifact"), READ)
def test_a_stage_refuses_an_artifact_of_another_model_or_text_or_does_not_read_it(
    projects, project, stage, artifact, kind
):
    own, foreign = project / artifact, projects[kind] / artifact
    if content(own) == content(foreign) or (kind == "text" and (stage, artifact) in FIRST):
        pytest.skip("nothing foreign in it, or nothing to compare it with")
    clear(own)
    (shutil.copytree if foreign.is_dir() else shutil.copyfile)(foreign, own)
    try:
        run(project, stage)
    except LibpruneError:
        return
    clear(own)
    run(project, stage)  # goes through without it: it is not read under these params


def flipped(path: Path, rng: random.Random) -> Iterator[str]:
    """The file with one flipped bit, several times; what was flipped."""
    whole = path.read_bytes()
    places = {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(12))}
    for place in sorted(places):
        bit = rng.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        yield f"bit {bit} of byte {place} of {path}"
    path.write_bytes(whole)


def read(layout: Layout, path: Path, names: list[str]) -> Any:
    """What stages get to know of a file: of one in the dense model's folder, that it is of another model."""
    for folder in (layout.pruned, layout.recovered):
        if path.is_relative_to(folder):
            return read_whole(folder, layout, {}).provenance
    if path.is_relative_to(layout.model):
        return fingerprint(layout.model)
    if path.suffix == ".parquet":
        columns, meta = read_table(path, "stage")
        return {name: [str(value) for value in values] for name, values in columns.items()}, meta
    if path.suffix == ".json":
        return read_json(path, "stage")
    return {name: [tensor.tolist(), meta] for name in names for tensor, meta in [load_tensor(path, name, "stage")]}


def names_in(path: Path) -> list[str]:
    if path.suffix != ".safetensors":
        return []
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def test_a_flipped_bit_is_found_when_the_file_is_read_or_changes_nothing(project):
    layout, rng = Layout(project / "artifacts"), random.Random(0)
    files = [path for path in sorted(layout.root.rglob("*")) if path.is_file()]
    files = [path for path in files if path.suffix in {".parquet", ".json", ".safetensors"}]
    tried = 0
    for path in files:
        if path.is_relative_to(layout.exported):
            continue  # for other programs; no stage reads it
        names = names_in(path)
        whole = read(layout, path, names)
        for what in flipped(path, rng):
            tried += 1
            try:
                found = read(layout, path, names)
            except LibpruneError:
                continue
            assert (found != whole) if path.is_relative_to(layout.model) else (found == whole), what
    assert tried > 300


def test_shards_of_two_artifacts_in_one_folder_are_refused(projects, project):
    shard = "artifacts/activations/layer-002.safetensors"
    shutil.copyfile(projects["text"] / shard, project / shard)
    with pytest.raises(LibpruneError, match=r"layer-002\.safetensors belongs to tokens"):
        run(project, "score")
