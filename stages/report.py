"""report: what was cut, what it cost and how to load the result, in Markdown."""

from pathlib import Path
from typing import Annotated

import typer

from libprune import stage


def main(
    artifacts: stage.Root = stage.ROOT,
    metrics: stage.Metrics = stage.METRICS,
    report: Annotated[Path, typer.Option("--report", help="The folder of the report.")] = Path("report"),
) -> None:
    """Write report/report.md from the metrics."""
    from libprune.artifacts import Layout, read_json, writing
    from libprune.report import markdown

    evaluation = read_json(metrics / "evaluation.json", "evaluate")
    allocation = read_json(metrics / "allocation.json", "allocate")
    pruning = read_json(metrics / "slice.json", "slice")
    with writing(report / "report.md") as partial:
        partial.write_text(markdown(evaluation, allocation, pruning, str(Layout(artifacts).pruned)))


app = stage.app(main)
if __name__ == "__main__":
    app()
