"""No stage goes on with artifacts of another model, text or settings, or with changed files."""

import inspect
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from libprune.engine.errors import LibpruneError
from libprune.models.folder import own_model
from libprune.pipeline.artifacts import damage, read_architecture, read_json, read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.shards import load_tensor
from libprune.results.record import read_whole
from tests.support import tiny
from tests.support.closure import ROOT
from tests.support.exported import run_here

PIPELINE = {
    name: [dep.removeprefix("artifacts/") for dep in entry["deps"] if dep.startswith("artifacts/")]
    for name, entry in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items()
}
CHANGES: dict[str, dict[str, Any]] = {
    "score": {"criterion": "obs_fisher + taylor_2nd", "scaling": "rank"},
    "ablation": {"units": 4, "sequences": 2},
    "allocate": {"method": "global", "worth": "sensitivity", "depth": "joint", "width": 36, "ratio": 0.4},
    "latency": {"tokens": 4, "widths": 2, "rounds": 1},
    "slice": {"repair": "local", "fisher_share": 0.5},
    "recover": {"method": "full", "top_k": 3, "tokens": 64},
    "evaluate": {"continuations": 0, "rounds": 1},
    "export": {"formats": ["transformers"], "pad_channels": 8, "speed": False},
}
"""Settings with which stages read as much as possible."""
SEARCH = {"allocate": {"method": "search", "worth": "none", "evaluations": 1, "width": None}}
TIMED = {"allocate": {"objective": "latency", "width": None}}
ALONE = {"levels": SEARCH, "latency": TIMED}
"""Settings without which a stage has nothing to do."""
SPECIAL: dict[tuple[str, str], dict[str, Any]] = {
    **{("allocate", name): SEARCH for name in ("model", "activations", "levels.parquet")},
    ("allocate", "latency.json"): TIMED,
    ("allocate", "width.parquet"): {"allocate": {**SEARCH["allocate"], "evaluations": 0, "width": "auto"}},
    ("score", "ablation.parquet"): {"score": {"fusion": "best"}},
    ("recover", "model"): {"recover": {"top_k": None}},
    ("slice", "tokens/repair.parquet"): {"slice": {"repair": "sequential", "fisher_share": 0.0}},
}
"""Settings with which a stage reads what it does not read with `CHANGES`."""
FIRST = {
    *((stage, "tokens/calibration.parquet") for stage in ("gradients", "hessian", "activations", "ablation")),
    *((stage, "tokens/calibration.parquet") for stage in ("sensitivity", "width")),
    ("teacher", "tokens/evaluation.parquet"),
}
"""Texts that a stage has nothing to compare with: what it makes of them names them, and later stages refuse that."""
SETTINGS = {
    ("allocate", "levels.parquet"),
    *(("evaluate", name) for name in ("plan.parquet", "pruned", "recovered")),
    *(("export", name) for name in ("pruned", "recovered")),
    *(("report", name) for name in ("plan.parquet", "evaluation.json", "export.json")),
}
"""What a stage reads beside something else that names the settings that both must be of."""


def run(project: Path, stage: str, changes: Mapping[str, Any] | None = None) -> None:
    """Run a stage of a project in this process, with changed params if asked to."""
    main, params = import_module(f"stages.{stage}").main, project / "params.yaml"
    before = params.read_text()
    for section, values in ALONE.get(stage, changes or {}).items():
        tiny.change_params(project, section, **values)
    places = {name: project / name for name in ("artifacts", "metrics", "report")} | {"params": params}
    try:
        main(**{name: places[name] for name in inspect.signature(main).parameters})
    finally:
        params.write_text(before)


def made(project: Path, model: Path, seed: int = 0) -> Path:
    """A project in which all stages have run."""
    project.mkdir()
    documents = tiny.write_text(project / "text.txt", 120).read_text().splitlines()
    random.Random(seed).shuffle(documents)
    (project / "text.txt").write_text("\n".join(documents) + "\n")
    tiny.write_params(project / "params.yaml", str(model), str(project / "text.txt"), **CHANGES)
    run_from(project, "sources")
    return project


def run_from(project: Path, first: str) -> None:
    """Run a stage and all later ones but the report, which nothing reads."""
    stages = list(PIPELINE)
    for stage in stages[stages.index(first) : -1]:
        run(project, stage)


@pytest.fixture(scope="module")
def projects(tmp_path_factory, by_forks) -> Iterator[dict[str, Path]]:
    """A project, and others with another model, another text and other settings."""
    root = tmp_path_factory.mktemp("foreign")
    model = tiny.write_model(root / "model")
    other = shutil.copytree(model, root / "other")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch, by_forks():
        patch.setattr("libprune.results.proof.reload", run_here)
        patch.setattr("libprune.statistics.latency._seconds", tiny.by_parameters)
        own = made(root / "own", model)
        changed = Path(shutil.copytree(own, root / "of-other-settings"))
        tiny.change_params(changed, "score", mlp="unit_fisher")
        tiny.change_params(changed, "allocate", ratio=0.4)
        run_from(changed, "score")
        of_another_model, of_another_text = made(root / "model-2", other), made(root / "text-2", model, seed=1)
        yield {"own": own, "model": of_another_model, "text": of_another_text, "settings": changed}


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {one.relative_to(path.parent).as_posix(): one.read_bytes() for one in files}


@contextmanager
def away(path: Path) -> Iterator[None]:
    """Without an artifact, for which another may be put in its place."""
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    try:
        yield
    finally:
        if path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        aside.rename(path)


def copy(path: Path, target: Path) -> None:
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target)


@pytest.mark.parametrize("stage", [stage for stage in PIPELINE if stage not in {"sources", "prepare"}])
def test_what_a_stage_reads_is_refused_if_it_is_of_another_model_text_or_settings(projects, stage):
    own, tried = projects["own"], 0
    for name, kind in product(PIPELINE[stage], ("model", "text", "settings")):
        artifact, foreign = (projects[of] / "artifacts" / name for of in ("own", kind))
        alone = (kind == "text" and (stage, name) in FIRST) or (kind == "settings" and (stage, name) not in SETTINGS)
        if alone or name.startswith("sources") or content(foreign) == content(artifact):
            continue
        with away(artifact):
            copy(foreign, artifact)
            with pytest.raises(LibpruneError, match=r"^[^\n]*artifacts/[^\n]*run `dvc repro[^\n]*$"):
                run(own, stage, SPECIAL.get((stage, name)))
                pytest.fail(f"{stage} went on with {name} of another {kind}")
        tried += 1
    assert tried


def test_a_shard_or_table_of_another_text_among_those_of_one_artifact_is_refused(projects):
    for stage, name in (("score", "activations/layer-002.safetensors"), ("score", "hessian/units.parquet")):
        artifact, foreign = (projects[of] / "artifacts" / name for of in ("own", "text"))
        with away(artifact):
            copy(foreign, artifact)
            with pytest.raises(LibpruneError, match=rf"{artifact.name} belongs to tokens"):
                run(projects["own"], stage)


def read(layout: Layout, path: Path) -> Any:
    """What stages get to know of a file."""
    for folder in (layout.pruned, layout.recovered):
        if path.is_relative_to(folder):
            return read_whole(folder, layout, {}).provenance
    if path.is_relative_to(layout.model):
        return own_model(layout, read_architecture(layout))
    if path == layout.architecture:
        return read_architecture(layout)
    if path.suffix == ".parquet":
        columns, meta = read_table(path, "stage")
        return {name: [str(value) for value in values] for name, values in columns.items()}, meta
    if path.suffix == ".json":
        return read_json(path, "stage")
    with damage(path, "stage"), safe_open(path, framework="pt") as file:
        names = list(file.keys())
    return {name: [tensor.tolist(), meta] for name in names for tensor, meta in [load_tensor(path, name, "stage")]}


def test_a_flipped_bit_is_found_when_the_file_is_read_or_changes_nothing(projects):
    layout, rng, tried = Layout(projects["own"] / "artifacts"), random.Random(0), 0
    passed_over = (layout.sources, layout.exported)  # the user's, and for other programs
    for path in sorted(path for path in layout.root.rglob("*") if path.is_file()):
        if any(map(path.is_relative_to, passed_over)) or path.suffix == ".md":
            continue
        expected, whole = read(layout, path), path.read_bytes()
        for place in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(4))}:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
            tried += 1
            try:
                found = read(layout, path)
            except LibpruneError as error:
                assert "\n" not in str(error)
                continue
            finally:
                flipped = path.read_bytes()
                path.write_bytes(whole)
            assert found == expected, (path, place, flipped[place])
    assert tried > 200
