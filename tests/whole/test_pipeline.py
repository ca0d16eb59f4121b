"""The whole pipeline on a tiny model: with only the declared files, and under DVC."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from libprune.pipeline.processes import runs
from libprune.project.create import create_project
from tests.support import tiny
from tests.support.closure import ROOT
from tests.support.preloaded import BIN, install

ORDER = ["sources", "prepare", "tokenize", "gradients", "hessian", "activations", "ablation"]
ORDER += ["score", "sensitivity", "depth", "levels", "width", "latency", "allocate", "slice"]
ORDER += ["teacher", "recover", "export", "evaluate", "report"]
TRACKED = ["dvc.yaml", ".dvcignore", ".gitignore", "libprune", "stages"]


PYTHON = f"{BIN}/python"
"""A folder's own, with everything heavy imported; of those on the PATH it is the first."""


def environment(folder: Path) -> dict[str, str]:
    """Of a command in a folder."""
    settings = {
        "PATH": f"{(folder / PYTHON).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "DVC_NO_ANALYTICS": "1",
        "LIBPRUNE_CHECKPOINT_SECONDS": "0",
    }
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | settings


def run(command: list[str], cwd: Path, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, env=environment(cwd) | more, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "model": str(tiny.write_model(folder / "model")),
        "text": str(tiny.write_text(folder / "text.txt", documents=600)),
    }


def stages() -> dict:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def outputs(stage: dict) -> list[str]:
    entries = [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def copy(path: str, source: Path, target: Path) -> None:
    (target / path).parent.mkdir(parents=True, exist_ok=True)
    if (source / path).is_dir():
        shutil.copytree(source / path, target / path, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source / path, target / path)


def test_each_stage_needs_only_what_it_declares(tmp_path, sources, python):
    """Every stage runs in a folder that holds its declared code, inputs and params, and nothing else.

    The folders have the same path, so that code which several stages declare is compiled once.
    """
    pipeline, made, folder = stages(), tmp_path / "made", tmp_path / "folder"
    made.mkdir()
    params = tiny.write_params(tmp_path / "params.yaml", **sources, recover={"method": "full"})
    for name in ORDER:
        stage = pipeline[name]
        for dep in stage["deps"]:
            copy(dep, ROOT if dep.startswith(("libprune/", "stages/")) else made, folder)
        for package in ("libprune", "stages"):
            (folder / package / "__init__.py").touch()
        shutil.copyfile(params, folder / "params.yaml")
        install(python, folder)
        run(["sh", "-c", stage["cmd"]], folder, PYTHONPYCACHEPREFIX=str(tmp_path / "compiled"))
        for out in outputs(stage):
            copy(out, folder, made)
        shutil.rmtree(folder)
    evaluation = json.loads((made / "metrics/evaluation.json").read_text())
    assert evaluation["pruned"]["decoder_share_removed"] == pytest.approx(0.2, abs=0.02)
    assert evaluation["dense"]["perplexity"] > 1
    assert evaluation["recovered"]["tokens"] == 256
    assert evaluation["recovered"]["perplexity_ratio"] != evaluation["perplexity_ratio"]
    assert "from_pretrained" in (made / "report/report.md").read_text()
    assert "from_pretrained" in (made / "report/report.html").read_text()


@pytest.fixture(scope="module")
def project(tmp_path_factory, sources, python) -> Path:
    """A fresh repository with the tiny params, reproduced once."""
    folder = tmp_path_factory.mktemp("project")
    for path in TRACKED:
        copy(path, ROOT, folder)
    copy(".dvc/config", ROOT, folder)
    copy(".dvc/.gitignore", ROOT, folder)
    install(python, folder)
    tiny.write_params(folder / "params.yaml", **sources)
    run(["git", "init", "-q"], folder)
    run(["git", "config", "user.name", "t"], folder)
    run(["git", "config", "user.email", "t@example.com"], folder)
    commit(folder)
    first = run(["dvc", "repro"], folder)
    assert stages_run(first) == ORDER
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    run(["git", "add", "-A"], folder)
    run(["git", "commit", "-q", "-m", "state"], folder)


def stages_run(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The stages that really ran, in an order that respects the pipeline."""
    found = {line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")}
    return [name for name in ("code", *ORDER) if name in found]


def change(folder: Path, section: str, key: str, value: object) -> None:
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params[section][key] = value
    path.write_text(yaml.safe_dump(params, sort_keys=False))


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics/evaluation.json").read_text())


BUILT = ["LICENSE", "README.md", "pyproject.toml", "setup.py", "dvc.yaml", "params.yaml", "libprune", "stages"]
MEASURED = ("artifacts/evaluation.json", "artifacts/model_card.md", "report/")
"""Outputs with seconds or a commit in them."""


def digests(folder: Path) -> dict[str, str]:
    """Of all outputs that depend on nothing but code, params and sources."""
    outs = [
        out for stage in yaml.safe_load((folder / "dvc.lock").read_text())["stages"].values() for out in stage["outs"]
    ]
    return {out["path"]: out["md5"] for out in outs if not out["path"].startswith((*MEASURED, "metrics/"))}


def test_a_project_on_the_built_package_gives_the_same_artifacts_and_notices_an_upgrade(project, tmp_path, python):
    """What pip would install is built, and runs where no repository is."""
    source, folder = tmp_path / "source", tmp_path / "mine"
    for path in BUILT:
        copy(path, ROOT, source)
    run([sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")], source)
    params = yaml.safe_load((project / "params.yaml").read_text())
    changes = {
        f"{section}.{key}": value
        for section, keys in params.items()
        if section != "preset"
        for key, value in keys.items()
    }
    create_project(folder, changes)
    install(python, folder)
    done = run(["dvc", "repro"], folder, PYTHONPATH=str(tmp_path / "build/lib"))
    assert stages_run(done) == ["code", *ORDER]
    assert {path: digest for path, digest in digests(folder).items() if "/code/" not in path} == digests(project)
    with (tmp_path / "build/lib/libprune/scoring/score.py").open("a") as file:
        file.write("# newer\n")
    again = stages_run(run(["dvc", "repro", "--dry"], folder))
    assert {"code", "sources", "score"} <= set(again) and not {"prepare", "gradients", "activations"} & set(again)


def test_a_second_repro_runs_nothing(project):
    assert stages_run(run(["dvc", "repro"], project)) == []


def test_another_criterion_reruns_from_score_and_switching_back_restores(project):
    before = metrics(project)
    change(project, "score", "criterion", "magnitude")
    after = ["sources", "score", "levels", "allocate", "slice", "recover", "export", "evaluate", "report"]
    assert stages_run(run(["dvc", "repro"], project)) == after
    assert metrics(project)["pruned"]["perplexity"] != before["pruned"]["perplexity"]
    assert "score.criterion" in run(["dvc", "params", "diff"], project).stdout
    change(project, "score", "criterion", "auto")
    assert stages_run(run(["dvc", "repro"], project)) == ["sources"], "which looks for mistakes"
    assert metrics(project) == before


def test_per_layer_result_from_an_experiment(project):
    """Another allocation with a training, as users try one; the result has layers of different widths and loads."""
    settings = ("allocate.method=global", "allocate.min_channels=0", "recover.method=full")
    done = run(["dvc", "exp", "run", *(word for setting in settings for word in ("-S", setting))], project)
    after = ["sensitivity", "levels", "allocate", "slice", "teacher", "recover", "export", "evaluate", "report"]
    assert stages_run(done) == ["sources", *after]
    for folder in ("pruned", "recovered"):
        assert (project / "artifacts" / folder / "modeling_pruned.py").exists()
    assert metrics(project)["recovered"]["perplexity"] != metrics(project)["pruned"]["perplexity"]
    assert "perplexity" in run(["dvc", "metrics", "diff"], project).stdout
    run(["git", "checkout", "-q", "."], project)
    run(["dvc", "checkout", "-q"], project)


def test_a_search_measures_levels_once_for_all_ratios(project):
    done = run(["dvc", "exp", "run", "-S", "preset=best", "-S", "allocate.evaluations=4"], project)
    after = ["score", "sensitivity", "levels", "allocate", "slice", "recover", "export", "evaluate", "report"]
    assert stages_run(done) == ["sources", *after]
    assert json.loads((project / "metrics/allocation.json").read_text())["trials"] == 4
    change(project, "allocate", "ratio", 0.3)
    assert stages_run(run(["dvc", "repro", "--dry", "allocate"], project)) == ["sources", "allocate"]
    run(["git", "checkout", "-q", "."], project)
    run(["dvc", "checkout", "-q"], project)


def test_experiments_are_compared_with_those_results_that_belong_to_their_params(project):
    """The workspace is edited after its run, so that its metrics are another setting's."""
    done = run(["dvc", "exp", "run", "-n", "short-prompt", "-S", "evaluate.prompt_tokens=4"], project)
    assert stages_run(done) == ["sources", "evaluate", "report"]
    change(project, "allocate", "ratio", 0.25)
    text = compare(project, "--out", "report/sweep").stdout
    assert re.search(r"^short-prompt .* 4 .* × \d\.\d{3} ± \d\.\d{3}", text, re.MULTILINE)
    assert "workspace (allocate last ran with allocate.ratio 0.2, not 0.25)" in text
    written = {path.name for path in (project / "report/sweep").iterdir()}
    assert written == {"table.md", "table.csv", "perplexity.png"}
    difference = run(text.rpartition(": ")[2].split(), project).stdout
    assert "evaluate.prompt_tokens" in difference
    run(["git", "checkout", "-q", "."], project)
    run(["dvc", "checkout", "-q"], project)


COMPARISON = """
name: two
title: Two seeds
settings:
  fisher: {}
  broken: {tokenize.evaluation_windows: 100000}
seeds: [0, 1]
"""


def compare(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command by the folder's own `python`, which DVC then finds for the stages."""
    command = [PYTHON, "-c", f"from libprune.cli.main import app; app(['compare', *{list(arguments)!r}])"]
    return run(command, folder, check)


def test_a_comparison_runs_what_is_missing_and_leaves_the_workspace_as_it_was(project):
    """HEAD is one of its runs, and a setting that fails does not stop the others."""
    before = {path: (project / path).read_bytes() for path in ("params.yaml", "dvc.lock", "artifacts/plan.parquet")}
    (project / "two.yaml").write_text(COMPARISON)
    done = compare(project, "run", "two.yaml", check=False)
    assert done.returncode == 1
    assert "two: 1 of 4 runs have results, 3 to do" in done.stdout
    assert re.search(r"^failed: two-broken-s1: .*100000", done.stderr, re.MULTILINE)
    assert re.search(r"^fisher +2 ", done.stdout, re.MULTILINE)
    assert "no unit was measured: set `ablation.units`" in done.stdout
    folder = project / "report/compare/two"
    with (folder / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["setting"], row["seed"]) for row in rows] == [("fisher", "0"), ("fisher", "1")]
    assert [bool(row["pruning_seconds"]) for row in rows] == [False, True], "HEAD was made before the comparison"
    assert (folder / "perplexity.png").exists()
    (project / "two.yaml").unlink()
    assert before == {path: (project / path).read_bytes() for path in before}
    assert run(["git", "status", "--porcelain"], project).stdout == ""
    assert stages_run(run(["dvc", "repro"], project)) == []


def test_a_wrong_param_stops_at_once_and_loses_nothing(project):
    change(project, "allocate", "ratio", 0.99)
    done = run(["dvc", "repro"], project, check=False)
    assert done.returncode != 0
    assert "allocate.ratio" in done.stderr
    assert (project / "artifacts/plan.parquet").exists(), "the first stage refused it"
    change(project, "allocate", "ratio", 0.2)
    assert stages_run(run(["dvc", "repro"], project)) == []


def test_a_stage_ends_with_its_dvc_and_the_next_repro_goes_on(project, python):
    """DVC is killed while gradients are collected: nothing runs on alone, and nothing is collected twice.

    `sh` waits for the stage, where bash becomes it: killing DVC then leaves the stage its parent. That stage is
    run by the real `python`.
    """
    change(project, "gradients", "batch_sequences", 1)
    for section, key in (("tokenize", "calibration_sequences"), ("gradients", "sequences")):
        change(project, section, key, 200)  # seconds of work, so that the kill comes before its end
    change(project, "compute", "batch_tokens", 16)
    run(["dvc", "repro", "tokenize"], project)
    (project / PYTHON).unlink()
    repro = subprocess.Popen(
        ["dvc", "repro", "gradients"],
        cwd=project,
        env=environment(project) | {"SHELL": "/bin/sh"},
        stdout=subprocess.DEVNULL,
    )
    while not list(project.glob(".work/gradients/*/process-*/after-*")):
        assert repro.poll() is None
        time.sleep(0.001)
    stage = int((project / ".work/gradients.lock").read_text())
    repro.kill()
    repro.wait()
    deadline = time.monotonic() + 10
    while runs(stage) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(stage)
    (project / PYTHON).symlink_to(python)
    done = run(["dvc", "repro", "gradients"], project, LIBPRUNE_CHECKPOINT_SECONDS="60")
    assert "continues from a saved state" in done.stdout
    assert not list((project / ".work/gradients").iterdir())
