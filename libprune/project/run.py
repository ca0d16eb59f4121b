"""A model pruned by one call: in a project of its own in the user's cache, which keeps the statistics."""

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from libprune.engine.errors import ProjectError
from libprune.engine.yaml_file import read_yaml
from libprune.pipeline.artifacts import read_json
from libprune.pipeline.atomic import writing, writing_folder
from libprune.pipeline.layout import Layout
from libprune.pipeline.locks import mend, running
from libprune.pipeline.processes import environment
from libprune.project.commands import dvc
from libprune.project.create import create_project, update_project
from libprune.project.dvc_output import quiet_dvc
from libprune.project.params_file import params_text, placed
from libprune.report.programs import final_folder


def project_of(model: str) -> Path:
    """The folder in the user's cache with the project of a model; it need not exist.

    Args:
        model: a path that exists, a hub id, or a file of a package.
    """
    name = "".join(c if c.isalnum() or c in "-._" else "-" for c in Path(model).name)
    return user_cache_path("libprune") / "projects" / f"{name}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


@contextmanager
def reserved(model: str) -> Iterator[None]:
    """Inside the context no other run has the project of a model, whose params it would change before they are read.

    Args:
        model: as of `prepare.model`.

    Raises:
        LibpruneError: if another one has it, or the model is a path that does not exist.
    """
    project = project_of(placed({"prepare.model": model})["prepare.model"])
    project.parent.mkdir(parents=True, exist_ok=True)
    with (project.parent / f".{project.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = f"{project} is in use by another run of libprune; wait until it has ended"
            raise ProjectError(said) from None
        except OSError:  # a file system without locks, on which nothing is known of others
            pass
        yield


def set_up(changes: Mapping[str, Any]) -> Path:
    """Make the project of a model, or give the one that there is other params; return its folder.

    Args:
        changes: values of params by key, with `prepare.model` and `tokenize.text` among them.

    Raises:
        LibpruneError: if the params are not valid, or the project is in use.
    """
    project = project_of(placed(changes)["prepare.model"])
    if not project.exists():
        create_project(project, changes, scm=False)
        return project
    if others := running(project):
        raise ProjectError(f"{project} is in use by process {others[0]}; wait until it has ended")
    text = params_text(changes)
    mend(project)
    with writing(project / "params.yaml") as partial:
        partial.write_text(text)
    update_project(project)
    return project


def run(project: Path, stages: Sequence[str] = ()) -> None:
    """Run what is not up to date in a project; what DVC and the stages print goes to the terminal.

    Args:
        project: the folder of the project.
        stages: run only these and what they read; all if none are named.

    Raises:
        ProjectError: if a stage has failed, which has said why, or DVC cannot work in the project.
    """
    code = subprocess.run(quiet_dvc(["repro", *stages]), cwd=project, env=environment()).returncode
    if code:
        dvc(project, "status")  # which fails with the cure, if it is not the stage that failed
        raise ProjectError(f"`dvc repro` in {project} ended with {code}; what was finished is kept")


def stages_before(project: Path, stage: str) -> tuple[str, ...]:
    """The stages that make what a stage reads, in the order of the pipeline.

    Args:
        project: the folder of the project.
        stage: the name of the stage.

    Raises:
        LibpruneError: if the folder has no pipeline with this stage.
    """
    pipeline = project / "dvc.yaml"
    if not pipeline.is_file():
        raise ProjectError(f"{project.absolute()} has no dvc.yaml; change to the folder of a project")
    stages = read_yaml(pipeline).get("stages") or {}
    if stage not in stages:
        raise ProjectError(f"{pipeline} has no stage {stage}; run `libprune update`")
    read = set(stages[stage].get("deps", ()))
    return tuple(name for name, one in stages.items() if any(_path(out) in read for out in one.get("outs", ())))


def _path(out: str | Mapping[str, Any]) -> str:
    """The path of an output, which may stand alone or with settings."""
    return out if isinstance(out, str) else next(iter(out))


def hand_out(project: Path, out: Path) -> Path:
    """Copy the final model, the report and the params of a project; return the folder of the model.

    The report then names the folders as they are called beside it.

    Args:
        project: the folder of the project, all of whose stages have run.
        out: the folder that is made.
    """
    layout = Layout(project / "artifacts")
    final = final_folder(read_json(layout.evaluation, "evaluate"), layout)
    with writing_folder(out.absolute()) as partial:
        shutil.copytree(final, partial / "model")
        shutil.copytree(project / "report", partial / "report")
        for text in partial.glob("report/report.*"):
            named = text.read_text().replace(str(Path("artifacts", final.name)), "model")
            text.write_text(named.replace(str(Path("artifacts/exported")), "exported"))
        shutil.copyfile(project / "params.yaml", partial / "params.yaml")
        if read_json(layout.export, "export")["files"]:
            shutil.copytree(layout.exported, partial / "exported")
    return out / "model"
