"""What DVC and git say: their commonest faults in one line with the cure, and a way to run DVC without its notices."""

import os
import re
import sys
from collections.abc import Sequence

# What DVC 3.67 and git 2 print, provoked by `tests/project/test_dvc_output.py` where that takes a moment. The first
# that is found counts; `{0}` is what a group has caught.
_FAULTS = [
    (
        r"Unable to read RWLock-file '([^']*)'",
        "{0} is unreadable, as a kill of DVC leaves it; run `libprune clean`, which mends it, then the same command",
    ),
    (
        r"is busy, it is being blocked by:\s+\(PID (\d+)\)",
        "another run of DVC, process {0}, works on the same files; wait for its end, or stop it with `kill {0}`. If "
        "there is no such process, delete .dvc/tmp/rwlock",
    ),
    (
        r"Unable to acquire lock",
        "another command of DVC runs in this project; wait for its end. If there is none (`pgrep -fa dvc`), delete "
        ".dvc/tmp/lock",
    ),
    (
        r"not inside of a DVC repository",
        "this folder is no project of DVC; change to the folder with dvc.yaml, or make a project: `libprune new`",
    ),
    (
        r"is not tracked by any supported SCM tool",
        "there is no git repository; run `git init` first, or `dvc init --no-scm` to do without experiments",
    ),
    (
        r"is not a git repository|not a git repository \(or any|Only supported for Git repositories",
        "there is no git repository, such as in a folder from a zip file; run `git init && git add . && git commit -m "
        "start`, or `dvc config core.no_scm true` to do without experiments",
    ),
    (r"Empty git repo", "the git repository has no commit yet; run `git add . && git commit -m start`"),
    (
        r"dubious ownership in repository at '([^']*)'|\.git/: repository path '([^']*)' is not owned",
        "the folder belongs to another user; if you trust it, run `git config --global --add safe.directory {0}`",
    ),
    (
        r"Please tell me who you are|unable to auto-detect email address",
        'git does not know you; run `git config user.name "Your Name" && git config user.email you@example.com`',
    ),
    (
        r"Unable to create '([^']*index\.lock)'|(?<=the )index is locked",
        "another git command runs, or one was killed; wait for its end, or delete .git/index.lock",
    ),
    (
        r"output '([^']*)' is already tracked by SCM",
        "{0} is in git, but DVC is to keep it; run `git rm -r --cached {0} && git commit -m untrack`",
    ),
    (
        r"'(?:\./)?dvc\.lock' is invalid",
        "dvc.lock cannot be read, such as after a merge; take one side with `git checkout --ours dvc.lock`, then run "
        "the same command",
    ),
    (
        r"'(?:\./)?(dvc\.yaml|params\.yaml)' is invalid",
        "{0} cannot be read; mend the line that is named, or take it back with `git checkout {0}`",
    ),
    (
        r"'[^']*dvc\.yaml' does not exist",
        "there is no dvc.yaml in this folder; change to the folder of the project, or make one: `libprune new`",
    ),
    (
        r"Stage '([^']*)' not found inside",
        "there is no stage {0}; `dvc stage list` names all of them",
    ),
    (
        r"Could not override '([^']*)'|Error parsing override '([^']*)'",
        "-S {0} names no key of params.yaml with a value; write it as `-S allocate.ratio=0.3`",
    ),
    (
        r"conflicts with existing experiment '([^']*)'",
        "there is an experiment {0} already; choose another name with -n, or write over it with -f",
    ),
    (
        r"'([^']*)' does not appear to be an experiment",
        "there is no experiment {0}; `dvc exp list` names all of them",
    ),
    (
        r"Checkout failed for following targets|failed to pull data from the cloud",
        "files are missing in DVC's cache; make them anew with `dvc repro`, or fetch them with `dvc pull`",
    ),
    (
        r"No space left on device",
        "the disk is full; `libprune clean` says what can be freed. What was finished is kept",
    ),
    (
        r"No module named dvc\b|No such file or directory: 'dvc'|\bdvc: (?:command )?not found",
        "DVC is not installed here; run `pip install dvc`",
    ),
    (
        r"No such file or directory: 'git'|\bgit: (?:command )?not found",
        "git is not installed; install it, or use `dvc init --no-scm`",
    ),
]


def explain_dvc(output: str) -> str | None:
    """The commonest faults of DVC and git in one line, with the cure.

    Args:
        output: what a command of DVC or git has printed, both streams or that of errors.

    Returns:
        One line without a full stop at the end; None if the output tells of no fault that is known.
    """
    for pattern, cure in _FAULTS:
        if found := re.search(pattern, output):
            return cure.format(next((group for group in found.groups() if group), ""))
    return None


_QUIET = """
import logging, sys
from dvc.cli import main
logging.disable(logging.INFO)
raise SystemExit(main(sys.argv[2:]))
"""


def quiet_dvc(words: Sequence[str]) -> list[str]:
    """The command that runs DVC without its notices of stages and lock files; errors and warnings stay.

    Where its output is a terminal, that of the stages is too, so that their bars are drawn.

    Args:
        words: of DVC's command line, such as `repro`.
    """
    return [sys.executable, "-c", _QUIET, "dvc", *words]


if __name__ == "__main__":
    os.execv(sys.executable, quiet_dvc(sys.argv[1:]))
