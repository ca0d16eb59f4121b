"""The `libprune` command."""

from pathlib import Path

import typer

from libprune import stage

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Structured pruning of language models. The pipeline itself runs with `dvc repro`."""


@app.command()
def show(artifacts: stage.Root = stage.ROOT, metrics: stage.Metrics = stage.METRICS) -> None:
    """Print the headline table, where the pruned model lies, and how to load it."""
    from libprune.artifacts import Layout, read_json
    from libprune.report import HEADER, headline, how_to_load, text_table

    with stage.user_errors():
        evaluation = read_json(metrics / "evaluation.json", "evaluate")
        allocation = read_json(metrics / "allocation.json", "allocate")
    pruned = Layout(artifacts).pruned
    typer.echo(text_table(headline(evaluation), HEADER))
    typer.echo(f"\nmodel:  {pruned}\nload:   {how_to_load(str(pruned), allocation['shape'])}\nreport: report/report.md")


@app.command()
def check(params: stage.ParamsFile = Path("params.yaml")) -> None:
    """Validate the params file without running anything."""
    from libprune.params import load_params

    with stage.user_errors():
        load_params(params)
    typer.echo(f"{params} is valid")
