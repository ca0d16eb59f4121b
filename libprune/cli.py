"""The `libprune` command."""

from pathlib import Path

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
    load = how_to_load(str(layout.pruned), result["plan"]["shape"])
    typer.echo(f"\nmodel:  {layout.pruned}\nload:   {load}\nreport: report/report.html")


@app.command()
def check(params: stage.ParamsFile = Path("params.yaml")) -> None:
    """Validate the params file without running anything."""
    from libprune.params import load_params

    with stage.user_errors():
        load_params(params)
    typer.echo(f"{params} is valid")
