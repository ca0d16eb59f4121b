"""The pictures of the report with their captions, and the folder that they are written to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from libprune.engine.tables import Columns
from libprune.pipeline.atomic import writing_folder
from libprune.report import cut_pictures, gradient_pictures
from libprune.report.canvas import PAGE_DPI, Figure, draw_note, png
from libprune.report.gradient_text import Diagnosis, gradient_report
from libprune.report.markdown import Picture
from libprune.report.recovery import draw_learning_curve
from libprune.report.svg import svg

NAMES = (
    "grad_dist",
    "grad_heatmap",
    "grad_comparison",
    "layer_variance",
    "sensitivity",
    "kept_share",
    "scores",
    "learning_curve",
)
"""The names of all pictures; dvc.yaml lists them as plots."""
TEXT = "gradient_report.txt"
"""The file beside the pictures that holds the gradients of every layer in numbers."""


def draw_picture(name: str, figure: Figure, alt: str, caption: str) -> Picture:
    """A figure as a picture of the report, in both of its forms."""
    content = png(figure, PAGE_DPI)
    figure.set_layout_engine("none")  # it is laid out, and would be again, which takes most of the time
    return Picture(name, alt, caption, content, svg(figure, name, alt))


def gradient_gallery(rows: Columns) -> list[Picture]:
    """The pictures of the gradients that show something, from the rows of `gradients/layers.parquet`.

    Without a gradient above zero there is none; with a single batch there are no batches to compare.
    """
    if not (rows["mean_abs"] > 0).any():
        return []
    return [
        draw_picture(
            "grad_dist",
            gradient_pictures.draw_grad_dist(rows),
            "distribution of mean |g| by layer",
            "One value for each parameter and batch of the layer: its mean |g|. Box: quartiles and median; whiskers: "
            "smallest and largest; diamonds: the means that the ratio is of.",
        ),
        draw_picture(
            "grad_heatmap",
            gradient_pictures.draw_grad_heatmap(rows),
            "mean |g| by parameter type and layer",
            "Mean over the batches; each tick of the colour bar is a power of ten or a multiple of it.",
        ),
        *(_comparison(rows) if len(set(rows["batch"])) > 1 else []),
        draw_picture(
            "layer_variance",
            gradient_pictures.draw_layer_variance(rows),
            "spread of the gradients inside layers and over batches",
            "Above: root mean square, over the parameters of the layer and the batches, of the standard deviation of "
            "one parameter's gradient entries. Below: standard deviation over batches of the layer's mean |g|, over "
            "its mean.",
        ),
    ]


def _comparison(rows: Columns) -> list[Picture]:
    """The picture that compares batches, of which there are several."""
    return [
        draw_picture(
            "grad_comparison",
            gradient_pictures.draw_grad_comparison(rows),
            "mean |g| by layer in the first batches",
            "Where the lines lie together, one batch would have shown the same, and the statistics are steady.",
        )
    ]


def cut_gallery(plan: Columns, meta: Mapping[str, Any]) -> list[Picture]:
    """The pictures of the kept shares and of the scores, from the plan and its metadata; none where nothing is cut."""
    if plan["keep"].all():
        return []
    return [
        draw_picture(
            "kept_share",
            cut_pictures.draw_kept_share(plan, meta),
            "kept and removed share of units by layer, a panel for each part that loses some",
            "Shares of the units of a part in a layer; a part that loses none has no panel. The dashed line would be "
            "the share of every layer, were the cut spread evenly.",
        ),
        draw_picture(
            "scores",
            cut_pictures.draw_scores(plan, meta),
            "scores of kept and removed units, a panel for each part",
            "All layers together, the colours stacked. The cut of a layer is the highest score among its removed "
            "units; the dashed lines are the lowest and the highest cut of all layers.",
        ),
    ]


def sensitivity_gallery(table: Columns) -> list[Picture]:
    """The picture of the sensitivity to each layer, from the rows of `sensitivity.parquet`; none without rows."""
    if not len(table["layer_idx"]):
        return []
    return [
        draw_picture(
            "sensitivity",
            cut_pictures.draw_sensitivity(table),
            "loss increase of removing each layer, and each of its parts alone",
            "Measured on calibration sequences, one removal at a time, without repair.",
        )
    ]


def recovery_gallery(recovery: Mapping[str, Any] | None) -> list[Picture]:
    """The picture of the training, from what it came to; none where nothing was trained."""
    if recovery is None:
        return []
    return [
        draw_picture(
            "learning_curve",
            draw_learning_curve(recovery),
            "loss on trained and on held-out sequences over the tokens trained on",
            "Line: mean over the steps since the point before. Diamonds: sequences of the text that are never "
            "trained on. Dashed: the step with the lowest held-out loss, whose weights are the recovered model's.",
        )
    ]


def write_gallery(folder: Path, pictures: list[Picture], rows: Columns, diagnosis: Diagnosis) -> None:
    """Write all pictures and `gradient_report.txt` as a folder, whole or not at all.

    Where a picture is not given, a note takes its place: to DVC, a listed plot that is missing is a failure.

    Args:
        folder: the folder, which is replaced.
        pictures: the pictures to write.
        rows: the rows of `gradients/layers.parquet`, for the text.
        diagnosis: the plan's metadata under `diagnosis`, for the text.
    """
    with writing_folder(folder) as partial:
        drawn = {picture.name: picture.png for picture in pictures}
        for name in dict.fromkeys((*NAMES, *drawn)):
            (partial / f"{name}.png").write_bytes(
                drawn.get(name) or png(draw_note(f"{name}: there is nothing to show"))
            )
        (partial / TEXT).write_text(gradient_report(rows, diagnosis), encoding="utf-8")
