"""The report of the workspace's result beside DVC's other experiments: the curve of perplexity against size."""

from collections.abc import Sequence
from pathlib import Path

from libprune.curves.pictures import Point, draw_points, frontier
from libprune.experiments.dvc_experiments import WORKSPACE, Experiment, Measure, compared_figures
from libprune.experiments.sweep_table import remarks, tabulate_experiments
from libprune.pipeline.layout import Layout
from libprune.report.canvas import Figure
from libprune.report.gallery import draw_picture
from libprune.report.markdown import Picture, markdown_table, picture_paragraphs, prose
from libprune.report.publish import publish_report
from libprune.report.report import PICTURES


def publish_beside(rows: Sequence[Experiment], layout: Layout, folder: Path) -> str:
    """Write the workspace's report with the curve of all experiments, on which its own result is marked.

    The stage `report` does not read the experiments: it would give another page after each of them.

    Args:
        rows: the experiments with results, at least two.
        layout: the workspace's artifacts.
        folder: the folder of the report.

    Returns:
        What to print: where the report is, or why there is none.

    Raises:
        ArtifactError: if some artifact is missing, damaged or belongs to another result.
    """
    chosen = next((row for row in rows if WORKSPACE in row.names), None)
    if chosen is None or not layout.evaluation.exists():
        return "no report with the curve of all: the workspace has no result of its params; run `dvc repro`"
    beside, picture = describe_beside(rows, chosen)
    publish_report(layout, folder, Path(), beside, [picture])
    return f"report with the curve of all: {folder}/report.html"


def describe_beside(rows: Sequence[Experiment], chosen: Experiment) -> tuple[list[str], Picture]:
    """A section of the report on all experiments, in paragraphs of Markdown, and the picture that it shows.

    Args:
        rows: the experiments with results, at least two.
        chosen: the one among them that the report is of.
    """
    cells, header = tabulate_experiments(rows)
    shown = [place for place, name in enumerate(header) if name != "trained"]  # too wide for a page
    picture = draw_picture(
        "size_curve",
        draw_curve(rows, chosen),
        f"{rows[0].measure.name} against size of all experiments",
        "Bars: ± one standard error over windows. The line joins the experiments than which no other is both smaller "
        "and better. Diamond: the model of this report.",
    )
    return [
        "## Beside the other experiments",
        f"{len(rows)} experiments have results. This report is of {prose(chosen.label)}.",
        *picture_paragraphs(PICTURES, picture),
        markdown_table([_chosen_cells(row, shown) for row in cells], _chosen_cells(header, shown)),
        *map(prose, remarks(rows, {})),
    ], picture


def _chosen_cells(row: Sequence[str], places: Sequence[int]) -> tuple[str, ...]:
    return tuple(prose(row[place]) for place in places)


def draw_curve(rows: Sequence[Experiment], chosen: Experiment) -> Figure:
    """Draw the perplexity ratio of every experiment over its size, and mark one.

    The ratio is the one after recovery if every experiment has one, else the one before it. The size is that of the
    pruned model's folder, or the kept share of the decoder if a folder's size is not known.

    Args:
        rows: at least one experiment.
        chosen: the one among them to mark.
    """
    figures = compared_figures(rows)
    in_bytes = all(row.size is not None for row in rows)
    points = [
        Point(
            (row.size or 0) / 1e6 if in_bytes else 100 * (1 - row.removed),
            one.ratio,
            f"experiment {row.label}",
            low=one.ratio - one.error,
            high=one.ratio + one.error,
            style="chosen" if row is chosen else "plain",
        )
        for row, one in zip(rows, figures, strict=True)
    ]
    return draw_points(
        points,
        frontier([(one.x, one.y) for one in points]),
        "size in MB (of the pruned model's folder)" if in_bytes else "kept share of the decoder in %",
        loss_label(rows[0].measure, figures is not rows),
    )


def loss_label(measure: Measure, trained: bool) -> str:
    """What the axis of the loss shows.

    Args:
        measure: what the results are compared by.
        trained: whether they are those after recovery.
    """
    return f"{measure.name}{' after recovery' if trained else ''}{measure.scale.removeprefix(measure.name)}"
