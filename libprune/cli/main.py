"""The `libprune` command."""

from pathlib import Path
from typing import Annotated

import typer

from libprune.cli import compare as compare_cli
from libprune.cli import masks as masks_cli
from libprune.pipeline import stage

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Structured pruning of language models. The pipeline itself runs with `dvc repro`."""


@app.command()
def show(artifacts: stage.Root = stage.ROOT) -> None:
    """Print the headline table, where the final model lies, and how to load it."""
    from libprune.pipeline.artifacts import damage, read_json
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.terminal import text_table
    from libprune.report.headline import HEADER, headline_rows
    from libprune.report.programs import final_folder, how_to_load

    layout = Layout(artifacts)
    with stage.user_errors():
        result = read_json(layout.evaluation, "evaluate")
        with damage(layout.evaluation, "evaluate"):
            table = text_table(headline_rows(result), HEADER)
            folder = final_folder(result, layout)
            load = how_to_load(str(folder), result["plan"]["shape"], result["model"]["head"])
    typer.echo(table)
    before = f"before: {layout.pruned} (before recovery; sizes and speed were measured on it)\n"
    before = before if folder != layout.pruned else ""
    typer.echo(f"\nmodel:  {folder}\n{before}load:   {load}\nreport: report/report.html")


@app.command("params")
def validate(params: stage.ParamsFile = stage.PARAMS) -> None:
    """Validate the params file without running anything."""
    from libprune.pipeline.params import load_params

    with stage.user_errors():
        load_params(params)
    typer.echo(f"{params} is valid")


Model = Annotated[str, typer.Argument(help="A folder, a GGUF file, package://name/file, or a hub id.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")]
OtherParams = Annotated[
    Path | None,
    typer.Option("--params", help="The params that the stages would read; by default params.yaml, if there is one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: numbers unrounded, and the bytes of every file.")]


@app.command()
def inspect(
    model: Model,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    params: OtherParams = None,
    as_json: Json = False,
) -> None:
    """Show the parts of a model, the files that stages would write and its uniform shapes; no weight is read."""
    import json

    from libprune.cli.inspection import inspect_model, params_for
    from libprune.cli.inspection_output import as_data, as_text
    from libprune.pipeline.terminal import printable

    with stage.user_errors():
        inspection = inspect_model(params_for(model, revision, trust_remote_code, params))
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
    from libprune.pipeline.terminal import printable
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
    """Say how much of what is no longer needed lies here and in the caches, and remove what is named.

    DVC's lock file is mended, too, if a kill has left it unreadable.
    """
    from libprune.cli.cleaning import clean as lines_of
    from libprune.pipeline.locks import mend_lock

    with stage.user_errors():
        for path in mend_lock(Path()):
            typer.echo(f"{path}: unreadable since a kill, removed")
        for line in lines_of(Path(), what or []):
            typer.echo(line)


app.add_typer(compare_cli.app, name="compare")
app.add_typer(masks_cli.app, name="masks")
