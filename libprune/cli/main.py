"""The `libprune` command."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer

import libprune
from libprune.cli import compare as compare_cli
from libprune.cli import curve as curve_cli
from libprune.cli import masks as masks_cli
from libprune.cli import projects
from libprune.pipeline import stage

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"libprune {libprune.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Structured pruning of language models: `prune` does all at once, `new` makes a project for `dvc repro`.

    Files of a project that a kill of DVC has left unreadable are repaired first.
    """
    from libprune.pipeline.locks import RECORD, UNREADABLE, mend

    with suppress(OSError):
        for path in mend(Path()):
            kept = f"; what it held is in {UNREADABLE}" if path.name == RECORD else ""
            typer.echo(f"{path}: unreadable since a kill, mended{kept}", err=True)


app.command()(projects.prune)
app.command()(projects.new)
app.command()(projects.update)
app.command()(curve_cli.curve)


@app.command()
def show(artifacts: stage.Root = stage.ROOT) -> None:
    """Print the headline table, where the final model lies, and how to load it."""
    from libprune.cli.current import require_current
    from libprune.pipeline.artifacts import damage, read_json
    from libprune.pipeline.layout import Layout
    from libprune.report.programs import closing

    layout = Layout(artifacts)
    with stage.user_errors():
        require_current(layout)
        result = read_json(layout.evaluation, "evaluate")
        with damage(layout.evaluation, "evaluate"):
            lines = closing(result, layout, Path("report"))
    typer.echo("\n".join(lines))


@app.command("params")
def validate(
    params: Annotated[Path, typer.Option("--params", help="The params file.")] = stage.PARAMS,
) -> None:
    """Find every mistake in the params that can be found before anything runs."""
    from libprune.foresight.foresee import foresee

    with stage.user_errors():
        foresee(params)
    typer.echo(f"{params} is valid")


Model = Annotated[str, typer.Argument(help="A folder, a GGUF file, package://name/file, or a hub id.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")]
OtherParams = Annotated[
    Path | None,
    typer.Option("--params", help="The params that the stages would read; by default params.yaml, if there is one."),
]
Experts = Annotated[
    Literal["whole", "channels"] | None,
    typer.Option("--experts", help="Units of a mixture of experts; by default those that the params say."),
]
Heads = Annotated[
    Literal["groups", "queries"] | None,
    typer.Option("--heads", help="Units of an attention; by default those that the params say."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: numbers unrounded, and the bytes of every file.")]


@app.command()
def inspect(
    model: Model,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    params: OtherParams = None,
    experts: Experts = None,
    heads: Heads = None,
    as_json: Json = False,
) -> None:
    """Show the parts of a model, the files that stages would write and its uniform shapes; no weight is read."""
    import json

    from libprune.cli.inspection import inspect_model, params_for
    from libprune.cli.inspection_output import as_data, as_text
    from libprune.engine.errors import printable

    with stage.user_errors():
        inspection = inspect_model(params_for(model, revision, trust_remote_code, params, experts, heads))
    typer.echo(json.dumps(as_data(inspection), indent=2) if as_json else printable(as_text(inspection)))


Folder = Annotated[Path, typer.Argument(help="A folder that the slice or the recover stage has written.")]
TrustFolder = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the folder's modeling file, if its layers differ in width.")
]
DenseFolder = Annotated[
    Path | None,
    typer.Option("--dense", help="The dense model's folder, to compare the logits with those under the mask."),
]


@app.command()
def check(folder: Folder, trust_remote_code: TrustFolder = False, dense: DenseFolder = None) -> None:
    """Check that a pruned or recovered folder is as recorded, loads in a process without libprune, and generates."""
    from libprune.engine.errors import printable
    from libprune.results.check import check_folder

    faults = 0
    with stage.user_errors():
        for finding in check_folder(folder, trust_remote_code, dense):
            typer.echo(printable(f"{finding.kind:<6} {finding.about:<10} {finding.text}"))
            faults += finding.kind == "fault"
    if faults:
        raise SystemExit(1)


What = Annotated[list[str] | None, typer.Argument(help="Any of leftovers, work, datasets, dvc; none: only say.")]


@app.command()
def clean(what: What = None) -> None:
    """Print how much of the disk can be freed here and in the caches, and remove what is named."""
    from libprune.cli.cleaning import clean as lines_of

    with stage.user_errors():
        for line in lines_of(Path(), what or []):
            typer.echo(line)


app.add_typer(compare_cli.app, name="compare")
app.add_typer(masks_cli.app, name="masks")
