"""The faults of DVC and git are known by what they really print, and each comes with a cure."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from libprune.project.dvc_output import explain_dvc, quiet_dvc
from tests.support.closure import ROOT


def run(folder: Path, *command: str) -> str:
    """What a command prints that fails."""
    own = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": own, "DVC_NO_ANALYTICS": "1", "HOME": str(folder), "LC_ALL": "C"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0, done.stdout
    return done.stdout + done.stderr


def dvc(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "dvc", *words)


@pytest.fixture
def project(tmp_path) -> Path:
    """A project of DVC with one stage, in a git repository without a commit."""
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    (tmp_path / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: echo hi > a.txt, params: [x], outs: [a.txt]}}")
    (tmp_path / "params.yaml").write_text("x: 1\n")
    return tmp_path


def held_by_a_process(folder: Path) -> None:
    holder = {"pid": 1, "cmd": "dvc repro"}
    content = {"write": {str(folder / "a.txt"): holder}, "read": {}}
    (folder / ".dvc/tmp/rwlock").write_text(json.dumps(content))


def cut_off_lock(folder: Path) -> None:
    (folder / ".dvc/tmp/rwlock").write_text("")


def damaged_lock(folder: Path) -> None:
    (folder / "dvc.lock").write_text("<<<<<<< HEAD\nschema: '2.0'\n=======\n>>>>>>> b\n")


def damaged_yaml(folder: Path) -> None:
    (folder / "dvc.yaml").write_text("a: [")


def no_git(folder: Path) -> None:
    (folder / ".git").rename(folder / "git-away")


def no_dvc(folder: Path) -> None:
    (folder / ".dvc").rename(folder / "dvc-away")


def no_pipeline(folder: Path) -> None:
    (folder / "dvc.yaml").unlink()


def nothing(folder: Path) -> None:
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("damage", "words", "cure"),
    [
        (cut_off_lock, dvc("repro"), ".dvc/tmp/rwlock is unreadable, as a kill of DVC leaves it; run `libprune clean`"),
        (held_by_a_process, dvc("repro"), "process 1,"),
        (no_git, dvc("exp", "run"), "git init"),
        (no_git, ("git", "status"), "git init"),
        (no_dvc, dvc("repro"), "libprune new"),
        (nothing, dvc("exp", "run"), "has no commit yet"),
        (damaged_lock, dvc("repro"), "git checkout --ours dvc.lock"),
        (damaged_yaml, dvc("repro"), "dvc.yaml cannot be read"),
        (no_pipeline, dvc("repro"), "there is no dvc.yaml"),
        (nothing, dvc("repro", "nonsense"), "there is no stage nonsense"),
        (nothing, ("git", "-c", "user.useConfigOnly=true", "commit", "--allow-empty", "-m", "x"), "user.email"),
    ],
)
def test_what_is_really_printed_is_explained(project, damage: Callable[[Path], None], words, cure):
    damage(project)
    assert cure in str(explain_dvc(run(project, *words)))


def test_another_command_of_dvc_is_waited_for(project):
    with (project / ".dvc/tmp/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = run(project, *dvc("status"))
    assert "another command of DVC runs" in str(explain_dvc(said))


RECORDED = {
    "ERROR: failed to initiate DVC - /a is not tracked by any supported SCM tool (e.g. Git).": "git init",
    "fatal: detected dubious ownership in repository at '/a'": "safe.directory /a",
    "ERROR: unexpected error - /a/.git/: repository path '/a' is not owned by current user": "safe.directory /a",
    "fatal: Unable to create '/a/.git/index.lock': File exists.": "delete .git/index.lock",
    "ERROR: unexpected error - the index is locked; this might be due to a concurrent": "delete .git/index.lock",
    "ERROR: failed to reproduce 'a':  output 'a.txt' is already tracked by SCM (e.g. Git).": "rm -r --cached a.txt",
    "ERROR: Invalid `--set-param` value: Could not override 'y.z'.": "-S y.z names no key",
    "ERROR: unexpected error - Error parsing override 'x'": "-S x names no key",
    "ERROR: Experiment conflicts with existing experiment 'e1'.": "an experiment e1 already",
    "ERROR: 'nope' does not appear to be an experiment commit.": "no experiment nope",
    "ERROR: Checkout failed for following targets:\na.txt": "dvc repro",
    "OSError: [Errno 28] No space left on device": "libprune clean",
    "/usr/bin/python: No module named dvc": "pip install dvc",
    "FileNotFoundError: [Errno 2] No such file or directory: 'git'": "install it",
}
"""What DVC 3.67 and git 2 printed when it was provoked by hand, and what the explanation holds."""


@pytest.mark.parametrize("output", RECORDED)
def test_what_was_printed_once_is_explained(output):
    said = explain_dvc(f"Running stage 'a':\n{output}\nmore")
    assert said is not None
    assert RECORDED[output] in said
    assert not set("\n{}") & set(said)


@pytest.mark.parametrize(
    "output",
    ["", "Stage 'a' didn't change, skipping", "ERROR: failed to reproduce 'a': failed to run: false, exited with 1"],
)
def test_what_a_stage_has_said_itself_is_not_explained(output):
    assert explain_dvc(output) is None


def test_run_quietly_dvc_leaves_what_stages_print_and_errors(project):
    stages = "{a: {cmd: echo of the stage}, b: {cmd: 'false', deps: [params.yaml]}}"
    (project / "dvc.yaml").write_text(f"stages: {stages}")
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "libprune.project.dvc_output", "repro"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "of the stage\n"
    assert done.stderr.startswith("ERROR: failed to reproduce 'b'")
    assert done.returncode != 0
    assert quiet_dvc(["repro"])[-2:] == ["dvc", "repro"]
