"""Commands of DVC and git, run in a project with the Python and the programs of this environment."""

import shutil
import subprocess
import sys
from pathlib import Path

from libprune.engine.errors import ProjectError
from libprune.pipeline.processes import environment
from libprune.project.dvc_output import explain_dvc


def dvc(folder: Path, *words: str) -> None:
    """Run a command of DVC that takes a moment.

    Raises:
        ProjectError: with the cure if it fails in a known way, or with what DVC says.
    """
    _run(folder, [sys.executable, "-m", "dvc"], "dvc", words)


def git(folder: Path, *words: str) -> None:
    """Run a command of git.

    Raises:
        ProjectError: with what git says, if it fails.
    """
    _run(folder, ["git"], "git", words)


def has_git() -> bool:
    """Whether git is installed."""
    return shutil.which("git") is not None


def in_repository(folder: Path) -> bool:
    """Whether a folder lies in the working tree of a git repository."""
    command = ["git", "-C", str(folder), "rev-parse", "--is-inside-work-tree"]
    return has_git() and subprocess.run(command, capture_output=True, text=True).stdout.strip() == "true"


def _run(folder: Path, program: list[str], name: str, words: tuple[str, ...]) -> None:
    done = subprocess.run([*program, *words], cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        said = done.stderr or done.stdout
        cure = explain_dvc(said) or " ".join(said.split())
        raise ProjectError(f"`{' '.join([name, *words])}` in {folder} failed: {cure}")
