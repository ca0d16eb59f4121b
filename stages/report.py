"""report: what was cut, what it cost and how to load the result, in Markdown."""

from pathlib import Path
from typing import Annotated

import typer

from libprune import stage


def main(
    artifacts: stage.Root = stage.ROOT,
    report: Annotated[Path, typer.Option("--report", help="The folder of the report.")] = Path("report"),
) -> None:
    """Write report/report.md from what evaluate measured."""
    from libprune.artifacts import Layout, read_json, writing
    from libprune.report import markdown

    layout = Layout(artifacts)
    result = read_json(layout.comparison, "evaluate")
    with writing(report / "report.md") as partial:
        partial.write_text(markdown(result, str(layout.pruned)))


app = stage.app(main)
if __name__ == "__main__":
    app()
