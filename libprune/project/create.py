"""A new project: the params, the pipeline, and a repository in which DVC keeps what stages give."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

from libprune.engine.errors import ProjectError
from libprune.engine.yaml_file import read_yaml
from libprune.pipeline.atomic import writing, writing_folder
from libprune.project.commands import dvc, git, has_git, in_repository
from libprune.project.params_file import completed, params_text
from libprune.project.pipeline_file import TEMPLATES, is_current, is_untouched, pipeline_text

_IGNORED = ("/artifacts/", "/report/", "/logs/", "/dvc_plots/", "/.work/")
_DVC_CONFIG = """[core]
    analytics = false
    check_update = false
    no_scm = {no_scm}
[cache]
    type = "reflink,hardlink,symlink,copy"
"""
_OURS = "# Pipeline "
"""The beginning of a dvc.yaml of a project."""
_AUTHOR = ("-c", "user.name=libprune", "-c", "user.email=libprune@localhost")
"""Who makes the first commit of a repository that has only been made for it."""


def create_project(folder: Path, changes: Mapping[str, Any], scm: bool = True) -> list[str]:
    """Make a folder with params.yaml, dvc.yaml, a README and a repository of DVC; it is there whole or not at all.

    Args:
        folder: where; it is empty or does not exist.
        changes: values of params by key, with `prepare.model` and `tokenize.text` among them.
        scm: whether the project is to lie in a git repository; one is made if there is none.

    Returns:
        Sentences on what was done.

    Raises:
        LibpruneError: if the folder is taken, the params are not valid, or git or DVC refuse.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ProjectError(f"{folder} exists and is not empty; name a folder that does not exist")
    if folder.exists() and not folder.is_dir():
        raise ProjectError(f"{folder} is a file; name a folder that does not exist")
    if folder.resolve() == Path.cwd():  # a shell would stay in the one that is replaced
        raise ProjectError(f"{folder.resolve()} is the folder that this runs in; name one inside it, or another")
    with writing_folder(folder.absolute()) as partial:
        (partial / "params.yaml").write_text(params_text(changes))
        (partial / "dvc.yaml").write_text(pipeline_text())
        (partial / ".gitignore").write_text("".join(f"{path}\n" for path in _IGNORED))
        (partial / "README.md").write_text(_readme(folder.absolute().name))
        return _start_repository(partial, scm)


def _start_repository(folder: Path, scm: bool) -> list[str]:
    if not scm or not has_git():
        _start_dvc(folder, "--no-scm")
        why = ["git is not installed: the project has no history, and `dvc exp` does not work"] if scm else []
        return why
    if in_repository(folder):
        _start_dvc(folder, "--subdir")
        return ["The project lies in a git repository; commit its files before you use `dvc exp`."]
    git(folder, "init", "--quiet")
    _start_dvc(folder)
    git(folder, "add", ".")
    git(folder, *_AUTHOR, "commit", "--quiet", "--message", f"A project of libprune {version('libprune')}")
    return ["A git repository was made for it, with one commit."]


def _start_dvc(folder: Path, *options: str) -> None:
    dvc(folder, "init", "--quiet", *options)
    (folder / ".dvc/config").write_text(_DVC_CONFIG.format(no_scm="--no-scm" in options))
    (folder / ".dvcignore").write_text("__pycache__\n*.pyc\n")


def update_project(folder: Path) -> list[str]:
    """Bring the pipeline and the params of a project to this version of libprune.

    Args:
        folder: the project.

    Returns:
        Sentences on what was done.

    Raises:
        ProjectError: if it is no project of `libprune new`, or somebody has changed its dvc.yaml by hand.
        ParamsError: if params.yaml cannot be read.
    """
    pipeline, params = folder / "dvc.yaml", folder / "params.yaml"
    old = pipeline.read_text() if pipeline.is_file() else None
    if not params.is_file() or not (folder / ".dvc").is_dir() or not (old or _OURS).startswith(_OURS):
        raise ProjectError(
            f"{folder.absolute()} is no project of `libprune new`: .dvc or params.yaml lacks, or dvc.yaml is another"
        )
    read_yaml(params)
    before = params.read_text()
    if old is not None and is_current(old):
        done = []
    elif old is not None and not is_untouched(old):
        raise ProjectError(
            f"{pipeline} was changed by hand; move it away, run `libprune update`, and make your changes again"
        )
    else:
        done = [(pipeline, pipeline_text())]
    done += [(params, after)] if (after := completed(before)) != before else []
    for path, text in done:
        with writing(path) as partial:
            partial.write_text(text)
    return [f"{path} is now that of libprune {version('libprune')}" for path, _ in done] or ["nothing to update"]


def _readme(name: str) -> str:
    return Template((TEMPLATES / "README.md.tmpl").read_text()).substitute(name=name)
