"""The files of the report, from artifacts that belong together."""

import re

import pytest

from libprune.engine.errors import ArtifactError
from libprune.pipeline.artifacts import write_table
from libprune.pipeline.atomic import write_json
from libprune.report.gallery import NAMES
from libprune.report.publish import publish_report
from tests.support.evaluated import changed
from tests.support.reported import write_artifacts
from tests.support.tables import gradient_rows


@pytest.mark.parametrize(("layers", "recovered"), [(0, False), (2, True)])
def test_the_stage_writes_every_picture_that_the_text_shows_and_leaves_other_files(tmp_path, layers, recovered):
    layout, folder = write_artifacts(tmp_path / "artifacts", layers, recovered), tmp_path / "report"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    publish_report(layout, folder, tmp_path)
    text = (folder / "report.md").read_text()
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert all((folder / path).read_bytes().startswith(b"\x89PNG") for path in shown)
    assert len(shown) == len(NAMES) - (not layers) - (not recovered)
    assert (folder / "report.html").read_text().count('<p class="picture"><svg ') == len(shown)
    assert {path.stem for path in (folder / "gradient_analysis").glob("*.png")} == set(NAMES)
    assert "gradient ratio" in (folder / "gradient_analysis/gradient_report.txt").read_text()
    assert {path.name for path in folder.iterdir()} == {"mine.txt", "report.md", "report.html", "gradient_analysis"}


@pytest.mark.parametrize("stale", ["plan", "gradients", "weights", "sensitivity"])
def test_a_report_of_artifacts_that_do_not_belong_together_is_refused(tmp_path, stale):
    layout = write_artifacts(tmp_path / "artifacts", 0)
    table = gradient_rows(1)
    if stale == "plan":
        write_json(layout.evaluation, changed(plan={"model": "cafe", "ratio": 0.7}))
    else:
        path = layout.gradients / "layers.parquet" if stale == "gradients" else layout.root / f"{stale}.parquet"
        write_table(path, table, {"model": "beef", "source": "another"})
    with pytest.raises(ArtifactError, match="run `dvc repro`"):
        publish_report(layout, tmp_path / "report", tmp_path)
    assert not (tmp_path / "report").exists()
