"""The `libprune compare` commands: DVC's experiments side by side, and comparisons of settings over seeds."""

from pathlib import Path
from typing import Annotated

import typer

from libprune.engine.errors import printable
from libprune.pipeline import stage

app = typer.Typer(add_completion=False, invoke_without_command=True, pretty_exceptions_enable=False)

Out = Annotated[Path, typer.Option("--out", help="The folder for what is written.")]
AllCommits = Annotated[bool, typer.Option("--all-commits", help="Experiments of every commit, not only of HEAD.")]
File = Annotated[Path, typer.Argument(help="A comparison file, such as comparisons/classical.yaml.")]
Guide = Annotated[Path | None, typer.Option("--guide", help="Write a guide to the settings to this Markdown file.")]

OUT = Path("report/compare")


@app.callback()
def compare_experiments(context: typer.Context, out: Out = OUT, all_commits: AllCommits = False) -> None:
    """Show DVC's experiments and the workspace as one table and one picture, the lowest perplexity first.

    The order is by the perplexity before recovery, unless every row has one after it. The report of the workspace is
    written again, with the perplexity and the size of all experiments as a curve.
    """
    if context.invoked_subcommand is not None:
        return
    from libprune.curves.beside import publish_beside
    from libprune.engine.errors import LibpruneError
    from libprune.experiments.dvc_experiments import gather_comparable
    from libprune.experiments.sweep_picture import write_picture
    from libprune.experiments.sweep_table import csv_text, markdown_text, params_diff, remarks, tabulate_experiments
    from libprune.pipeline.atomic import writing
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.terminal import text_table

    with stage.user_errors():
        rows, left_out = gather_comparable(all_commits)
        if out.exists() and not out.is_dir():
            raise LibpruneError(f"--out {out} is a file; name a folder")
        for name, text in (("table.md", markdown_text(rows, left_out)), ("table.csv", csv_text(rows))):
            with writing(out / name) as partial:
                partial.write_text(text)
        write_picture(out / "perplexity.png", rows)
    command = params_diff(rows)
    typer.echo("\n".join([text_table(*tabulate_experiments(rows)), "", *map(printable, remarks(rows, left_out))]))
    typer.echo(f"\nwritten: {out}/table.md, table.csv, perplexity.png")
    with stage.user_errors():
        typer.echo(publish_beside(rows, Layout(stage.ROOT), out))
    if command:
        typer.echo(f"the two best, param by param: {command}")


@app.command()
def run(file: File, out: Out = OUT, guide: Guide = None) -> None:
    """Run what a comparison file lacks, one experiment after the other, and show all of it."""
    from libprune.experiments.dvc_experiments import gather, read_lock, show
    from libprune.experiments.file import read_comparison
    from libprune.experiments.report import COSTS, gather_now, write_comparison
    from libprune.experiments.runs import missing_runs, run_all

    with stage.user_errors():
        comparison = read_comparison(file)
        todo = missing_runs(comparison, *gather(show(), read_lock))
        wanted = len(comparison.settings) * len(comparison.seeds)
        typer.echo(f"{comparison.name}: {wanted - len(todo)} of {wanted} runs have results, {len(todo)} to do")
        try:
            failed = run_all(comparison, todo, out / comparison.name / "logs", out / COSTS, typer.echo)
        except KeyboardInterrupt:
            typer.echo("stopped; the same command goes on from here", err=True)
            raise SystemExit(130) from None
        typer.echo("")
        try:
            typer.echo(printable(write_comparison(gather_now(comparison, out, failed=failed), out, guide)))
        finally:
            for name, reason in failed.items():
                typer.echo(printable(f"failed: {name}: {reason}"), err=True)
    if failed:
        raise SystemExit(1)


@app.command("gather")
def gather_only(file: File, out: Out = OUT, all_commits: AllCommits = False, guide: Guide = None) -> None:
    """Show the results of a comparison file that experiments already have, under any name, and run nothing."""
    from libprune.experiments.file import read_comparison
    from libprune.experiments.report import gather_now, write_comparison

    with stage.user_errors():
        comparison = read_comparison(file)
        typer.echo(printable(write_comparison(gather_now(comparison, out, all_commits), out, guide)))
