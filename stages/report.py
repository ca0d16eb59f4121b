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
    from libprune.pipeline.artifacts import read_json
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.terminal import at_the_end
    from libprune.report.programs import closing
    from libprune.report.publish import publish_report

    layout = Layout(artifacts)
    publish_report(layout, report, Path())
    for line in closing(read_json(layout.evaluation, "evaluate"), layout, report, keep=True):
        at_the_end(line)


app = stage.app(main)
if __name__ == "__main__":
    app()
