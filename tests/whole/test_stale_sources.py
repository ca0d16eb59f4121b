"""What changed at the same path is noticed: the real stage that links to sources, and real DVC.

The stages that read sources only write files here, so that each run takes a second.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from libprune.pipeline.params import load_params
from tests.support.closure import ROOT
from tests.support.preloaded import BIN, install

SETTINGS = {
    "prepare": {"model": "local/model"},
    "tokenize": {"text": "local/text.txt", "evaluation_text": "local/evaluation"},
    "recover": {
        "teacher": "local/teacher.gguf",
        "text": [{"text": "local/one.jsonl", "share": 0.5}, {"text": "local/two", "share": 0.5}],
    },
    "evaluate": {"task_folder": "local/tasks"},
}
READERS = {
    "local/model/model.safetensors": {"prepare"},
    "local/text.txt": {"tokenize", "teacher"},
    "local/evaluation/a.txt": {"tokenize"},
    "local/teacher.gguf": {"teacher", "recover"},
    "local/one.jsonl": {"teacher"},
    "local/two/a.txt": {"teacher"},
    "local/tasks/task.yaml": {"evaluate"},
}
"""The stages that read each file."""
FIRST = {".gguf": "GGUF, first", ".jsonl": '{"text": "first"}\n'}
"""What is in the files at first, where it must look like what it is."""


def writing(stage: dict) -> str:
    """A command that writes what a stage writes, always the same."""
    entries = [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]
    paths = [shlex.quote(entry if isinstance(entry, str) else next(iter(entry))) for entry in entries]
    return " && ".join(f"mkdir -p $(dirname {path}) && echo '{{\"a\": 1}}' > {path}" for path in paths)


@pytest.fixture(scope="module")
def project(tmp_path_factory, python) -> Path:
    """A repository whose sources git does not track, reproduced once."""
    folder = tmp_path_factory.mktemp("stale")
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    kept = {"sources": stages["sources"]}
    for name in sorted(set().union(*READERS.values())):
        links = [dep for dep in stages[name]["deps"] if dep.startswith("artifacts/sources/")]
        kept[name] = stages[name] | {"cmd": writing(stages[name]), "deps": links}
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": kept}))
    shutil.copytree(ROOT / "libprune", folder / "libprune", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ("stages/__init__.py", "stages/sources.py", ".dvc/config", ".dvcignore"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, values in SETTINGS.items():
        params[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    load_params(folder / "params.yaml")
    install(python, folder)
    (folder / ".gitignore").write_text("/artifacts/\n/report/\n/local/\n/.venv/\n__pycache__/\n")
    for path in READERS:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(FIRST.get(Path(path).suffix, "first"))
    (folder / "local/model/config.json").write_text('{"model_type": "llama"}')
    run(folder, "git", "init", "-q")
    commit(folder)
    assert "sources" in stages_run(run(folder, "dvc", "repro"))
    commit(folder)
    return folder


def run(folder: Path, *command: str) -> str:
    names = {f"GIT_{who}_{what}": "t@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    paths = f"{folder / BIN}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    settings |= names | {"PATH": paths, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def commit(folder: Path) -> None:
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-q", "-m", "state")


def stages_run(output: str) -> set[str]:
    """The stages that ran or were fetched from what had run before."""
    lines = (line for line in output.splitlines() if line.startswith("Running stage") or "is cached" in line)
    return {line.split("'")[1] for line in lines}


def told(folder: Path) -> set[str]:
    """The stages of which DVC says that something has changed."""
    lines = run(folder, "dvc", "status").splitlines()
    return {line[:-1] for line in lines if line.endswith(":") and not line.startswith("\t")}


@pytest.mark.parametrize("path", READERS)
def test_each_source_has_a_link_on_which_its_readers_depend(project, path):
    link = next(
        link for link in (project / "artifacts/sources").iterdir() if (project / path).is_relative_to(link.resolve())
    )
    stages = yaml.safe_load((project / "dvc.yaml").read_text())["stages"]
    assert {name for name, one in stages.items() if f"artifacts/sources/{link.name}" in one["deps"]} == READERS[path]


def test_status_tells_a_change_and_repro_reads_again_what_changed(project):
    assert told(project) == set()
    (project / "local/model/model.safetensors").write_text("other")
    (project / "local/two/b.txt").write_text("new")
    assert told(project) == {"sources", "prepare", "teacher"}
    assert stages_run(run(project, "dvc", "repro")) == {"sources", "prepare", "teacher"}
    assert told(project) == set()
    commit(project)


def test_an_experiment_reads_again_what_changed_and_nothing_else(project):
    """In a copy of the project, too, which holds no untracked file, and of the model only what git tracks."""
    run(project, "git", "add", "-f", "local/model/config.json")
    commit(project)
    assert stages_run(run(project, "dvc", "exp", "run", "--temp", "-S", "evaluate.rounds=7")) == {"sources", "evaluate"}
    (project / "local/text.txt").write_text("other")
    changed = {"sources", "tokenize", "teacher"}
    assert stages_run(run(project, "dvc", "exp", "run", "--temp")) == changed
    assert stages_run(run(project, "dvc", "exp", "run")) == changed
