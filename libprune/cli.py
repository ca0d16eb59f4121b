"""The `libprune` command."""

from pathlib import Path
from typing import Annotated

import typer

from libprune import stage

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Structured pruning of language models. The pipeline itself runs with `dvc repro`."""


@app.command()
def show(artifacts: stage.Root = stage.ROOT) -> None:
    """Print the headline table, where the pruned model lies, and how to load it."""
    from libprune.artifacts import Layout, read_json
    from libprune.report import HEADER, headline, how_to_load, text_table

    layout = Layout(artifacts)
    with stage.user_errors():
        result = read_json(layout.comparison, "evaluate")
    typer.echo(text_table(headline(result), HEADER))
    load = how_to_load(str(layout.pruned), result["plan"]["shape"], result["model"]["head"])
    typer.echo(f"\nmodel:  {layout.pruned}\nload:   {load}\nreport: report/report.html")


@app.command("params")
def validate(params: stage.ParamsFile = stage.PARAMS) -> None:
    """Validate the params file without running anything."""
    from libprune.params import load_params

    with stage.user_errors():
        load_params(params)
    typer.echo(f"{params} is valid")


Model = Annotated[str, typer.Argument(help="A folder, a GGUF file, package://name/file, or a hub id.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model.")]
OtherParams = Annotated[
    Path | None,
    typer.Option("--params", help="What the stages would write depends on it; params.yaml if there is one."),
]
Json = Annotated[bool, typer.Option("--json", help="For machines: numbers unrounded, bytes of every file.")]


@app.command()
def inspect(
    model: Model,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    params: OtherParams = None,
    as_json: Json = False,
) -> None:
    """Show what a model is made of, what the stages would write and which uniform shapes it has; reads no weight."""
    import json

    from libprune.inspection import as_data, inspect_model, params_for
    from libprune.inspection_text import as_text

    with stage.user_errors():
        found = inspect_model(params_for(model, revision, trust_remote_code, params))
    typer.echo(json.dumps(as_data(found), indent=2) if as_json else as_text(found))


Folder = Annotated[Path, typer.Argument(help="What the slice stage has written.")]
TrustFolder = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the folder's modeling file, if its layers differ in width.")
]
DenseFolder = Annotated[
    Path | None,
    typer.Option("--dense", help="The dense model's folder, to compare the logits with those under the mask."),
]


@app.command()
def check(folder: Folder, trust_remote_code: TrustFolder = False, dense: DenseFolder = None) -> None:
    """Check that a pruned folder is as recorded, loads in a process without libprune, and generates."""
    from libprune.checking import check_folder

    faults = 0
    for finding in check_folder(folder, trust_remote_code, dense):
        typer.echo(f"{finding.kind:<6} {finding.about:<10} {finding.text}")
        faults += finding.kind == "fault"
    if faults:
        raise SystemExit(1)


Out = Annotated[Path, typer.Option("--out", help="The folder for table.md, table.csv and perplexity.png.")]
AllCommits = Annotated[bool, typer.Option("--all-commits", help="Experiments of every commit, not only of HEAD.")]


@app.command()
def compare(out: Out = Path("report/compare"), all_commits: AllCommits = False) -> None:
    """Show DVC's experiments and the workspace as one table and one picture, the lowest perplexity first."""
    from libprune.artifacts import writing
    from libprune.errors import LibpruneError
    from libprune.experiments import comparable
    from libprune.report import text_table
    from libprune.sweep_picture import write_picture
    from libprune.sweep_table import csv_text, markdown_text, params_diff, remarks, table

    with stage.user_errors():
        rows, left_out = comparable(all_commits)
        if out.exists() and not out.is_dir():
            raise LibpruneError(f"--out {out} is a file; name a folder")
        for name, text in (("table.md", markdown_text(rows, left_out)), ("table.csv", csv_text(rows))):
            with writing(out / name) as partial:
                partial.write_text(text)
        write_picture(out / "perplexity.png", rows)
    command = params_diff(rows)
    typer.echo("\n".join([text_table(*table(rows)), "", *remarks(rows, left_out)]))
    typer.echo(f"\nwritten: {out}/table.md, table.csv, perplexity.png")
    if command:
        typer.echo(f"the two best, param by param: {command}")
