"""The commands that prune a model of one's own: at once, or in a project."""

from pathlib import Path
from typing import Annotated, Any

import typer

from libprune.pipeline import stage

Text = Annotated[
    str, typer.Option("--text", help="The text to calibrate on: a file, a folder, package://name/file, or a hub id.")
]
Ratio = Annotated[float, typer.Option("--ratio", help="The share of the decoder layers' parameters to remove, 0 to 1.")]
Preset = Annotated[str, typer.Option("--preset", help="fast, balanced, best, hgsp, hgsp+adaptive or hgsp+all.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any key of params.yaml, as KEY=VALUE; may be given many times.")
]
ModelToPrune = Annotated[str, typer.Argument(help="A folder, a GGUF file, package://name/file, or a hub id.")]


def _changes(model: str, text: str, ratio: float, preset: str, settings: list[str] | None) -> dict[str, Any]:
    from libprune.project.params_file import settings as parsed

    named = {"prepare.model": model, "tokenize.text": text, "allocate.ratio": ratio, "preset": preset}
    return named | parsed(settings or [])


def prune(
    model: ModelToPrune,
    out: Annotated[Path, typer.Argument(help="The folder to write; it does not exist yet.")],
    text: Text,
    ratio: Ratio = 0.2,
    preset: Preset = "balanced",
    settings: Settings = None,
) -> None:
    """Prune a model: OUT gets the pruned model, the report and the params that were used.

    The statistics of the model stay in a project in the user's cache, so that another ratio or method starts from them.
    """
    from libprune.engine.errors import ProjectError
    from libprune.project.run import hand_out, reserved, run, set_up

    with stage.user_errors():
        if out.exists():
            raise ProjectError(f"{out} exists; name a folder that does not")
        changes = _changes(model, text, ratio, preset, settings)
        with reserved(changes["prepare.model"]):
            project = set_up(changes)
            typer.echo(f"project: {project} (keeps the statistics; remove it to free the disk)")
            run(project)
            folder = hand_out(project, out)
    typer.echo(f"\nmodel:   {folder}\nreport:  {out / 'report/report.html'}\nparams:  {out / 'params.yaml'}")


def new(
    folder: Annotated[Path, typer.Argument(help="The folder of the project; it does not exist yet.")],
    model: Annotated[str, typer.Option("--model", help="A folder, a GGUF file, package://name/file, or a hub id.")],
    text: Text,
    ratio: Ratio = 0.2,
    preset: Preset = "balanced",
    settings: Settings = None,
) -> None:
    """Make a project that prunes a model: params.yaml and dvc.yaml, to be run with `dvc repro`."""
    from libprune.project.create import create_project

    with stage.user_errors():
        done = create_project(folder, _changes(model, text, ratio, preset, settings))
    for line in done:
        typer.echo(line)
    typer.echo(f"{folder / 'params.yaml'} says what will be done; change it as you like.\nnext: cd {folder}; dvc repro")


def update(
    folder: Annotated[Path, typer.Argument(help="The folder of the project.")] = Path(),
) -> None:
    """Bring the dvc.yaml and the params.yaml of a project to the installed version of libprune."""
    from libprune.project.create import update_project

    with stage.user_errors():
        for line in update_project(folder):
            typer.echo(line)
