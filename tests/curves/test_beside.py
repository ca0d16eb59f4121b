"""The report beside other experiments: all are on the curve, and the workspace's own is marked."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.curves.beside import describe_beside, draw_curve, publish_beside
from libprune.curves.pictures import frontier
from libprune.engine.errors import ArtifactError
from libprune.report.canvas import ORANGE
from libprune.report.page import html_page
from libprune.report.svg import find_spots, svg
from tests.support.page import Page
from tests.support.reported import write_artifacts
from tests.support.swept import row

HARSH = row("_<b>x</b> | y", 1.4)
ROWS = [replace(row("a", 1.2), size=9_000_000), replace(row("workspace", 1.3), size=8_000_000), HARSH]


def test_the_report_of_the_workspace_is_written_with_the_curve_and_all_rows(tmp_path):
    layout, out = write_artifacts(tmp_path / "artifacts", 0), tmp_path / "out"
    assert publish_beside(ROWS, layout, out) == f"report with the curve of all: {out}/report.html"
    text, html = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert text.index("## Beside the other experiments") < text.index("## What was asked")
    assert "3 experiments have results. This report is of workspace." in text
    assert (out / "gradient_analysis/size_curve.png").read_bytes().startswith(b"\x89PNG")
    assert html.count('id="size_curve-') > 0
    page = Page(html)
    assert "experiment _<b>x</b> | y: 1.4 ± 0.01" in " ".join(page.texts["title"])
    assert any(cell.startswith("_<b>x</b> | y") for cell in page.texts["td"])
    assert "b" not in {tag for tag, _ in page.tags}


def test_without_a_result_in_the_workspace_there_is_no_report_and_it_is_said(tmp_path):
    layout = write_artifacts(tmp_path / "artifacts", 0)
    assert "run `dvc repro`" in publish_beside([ROWS[0], HARSH], layout, tmp_path / "out")
    layout.evaluation.unlink()
    assert "run `dvc repro`" in publish_beside(ROWS, layout, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_workspace_with_half_of_its_artifacts_is_refused(tmp_path):
    layout = write_artifacts(tmp_path / "artifacts", 0)
    layout.plan.unlink()
    with pytest.raises(ArtifactError, match="run `dvc repro allocate`"):
        publish_beside(ROWS, layout, tmp_path / "out")


def test_the_chosen_one_is_the_only_diamond_and_every_point_has_its_figures():
    figure = draw_curve(ROWS, ROWS[1])
    points = [part.lines[0] for part in figure.axes[0].containers]
    assert [line.get_color() == ORANGE and line.get_marker() == "D" for line in points] == [False, True, False]
    svg(figure, "a", "")
    assert [spot.text for spot in find_spots(figure)] == [
        "size in MB 9, experiment a: 1.2 ± 0.01",
        "size in MB 8, experiment workspace: 1.3 ± 0.01",
        "size in MB 1, experiment _<b>x</b> | y: 1.4 ± 0.01",
    ]


def test_a_size_that_is_not_known_makes_all_sizes_shares_and_recovered_rows_are_compared_after_it():
    unknown = replace(row("n", 1.5, after=1.1), size=None)
    figure = draw_curve([row("m", 1.6, after=1.2), unknown], unknown)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "kept share of the decoder in %"
    assert axes.get_ylabel() == "perplexity after recovery ÷ dense"
    assert [list(part.lines[0].get_xdata()) + list(part.lines[0].get_ydata()) for part in axes.containers] == [
        [pytest.approx(80), 1.2],
        [pytest.approx(80), 1.1],
    ]


@given(st.lists(st.tuples(st.floats(1, 9), st.floats(1, 9)), min_size=1, max_size=8))
def test_the_line_joins_those_that_no_other_beats(points):
    def beaten(one: tuple[float, float]) -> bool:
        return any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points)

    assert frontier(points) == sorted({one for one in points if not beaten(one)})


def test_the_table_is_the_one_of_compare():
    paragraphs, picture = describe_beside(ROWS, ROWS[1])
    page = Page(html_page("\n\n".join(paragraphs), "t", {f"gradient_analysis/{picture.file}": picture.svg}))
    assert len(page.texts["tr"]) == 1 + len(ROWS)
    assert "± one standard error" in page.texts["em"][0]
