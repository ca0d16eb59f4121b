"""report: what was cut, what it cost and how to load the result, as a page, in Markdown, and in pictures."""

from pathlib import Path
from typing import Annotated

import typer

from libprune.pipeline import stage


def main(
    artifacts: stage.Root = stage.ROOT,
    report: Annotated[Path, typer.Option("--report", help="The folder of the report.")] = Path("report"),
) -> None:
    """Draw the pictures, and write report.md and report.html from what evaluate and the statistics say."""
    from libprune.pipeline.layout import Layout
    from libprune.report.publish import publish_report

    publish_report(Layout(artifacts), report, Path())
    typer.echo(f"{report / 'report.html'} needs no other file; {report / 'report.md'} says the same")


app = stage.app(main)
if __name__ == "__main__":
    app()
