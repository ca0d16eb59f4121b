"""The files of the report, from artifacts that belong together."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from libprune.engine.describe import describe
from libprune.engine.errors import ArtifactError
from libprune.engine.tables import unit_index
from libprune.models.sequences import Sequences
from libprune.models.tokens import write_tokens
from libprune.pipeline.artifacts import write_table
from libprune.pipeline.atomic import write_json
from libprune.pipeline.layout import Layout
from libprune.report.gallery import NAMES
from libprune.report.publish import publish_report
from tests.support.evaluated import EVALUATION, changed, trained
from tests.support.models import FAMILIES
from tests.support.tables import gradient_rows, sensitivity_rows


def write_artifacts(root: Path, measured: int, recovered: bool = False) -> Layout:
    """What the report reads, of a tiny model whose sensitivity is measured for some layers."""
    layout = Layout(root)
    architecture = replace(describe(FAMILIES["llama"](0)), fingerprint="cafe")
    root.mkdir()
    layout.architecture.write_text(architecture.to_json())
    write_table(layout.weights, unit_index(architecture), {"model": "cafe", "source": "a <b>model</b>"})
    origin = {"model": "cafe", "source": "a text", "documents": 3, "seed": 0}
    text = write_tokens(layout.calibration_tokens, Sequences(torch.zeros((2, 4), dtype=torch.long)), origin)
    made = {"model": "cafe", "tokens": text}
    write_table(layout.gradients / "layers.parquet", gradient_rows(architecture.layers), made)
    rows = unit_index(architecture)
    scores = np.random.default_rng(0).normal(size=len(rows["layer_idx"]))
    plan = EVALUATION["plan"] | {"model": "cafe"}
    write_table(layout.plan, rows | {"score": scores, "keep": scores > -1}, plan)
    write_json(layout.export, {"files": []})
    result = trained() if recovered else EVALUATION
    write_json(layout.evaluation, result | {"plan": plan, "pruning": result["pruning"] | {"tokens": text}})
    write_table(layout.sensitivity, sensitivity_rows(measured), made)
    return layout


@pytest.mark.parametrize(("layers", "recovered"), [(0, False), (2, False), (2, True)])
def test_the_stage_writes_every_picture_that_the_text_shows_and_leaves_other_files(tmp_path, layers, recovered):
    layout, folder = write_artifacts(tmp_path / "artifacts", layers, recovered), tmp_path / "report"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    publish_report(layout, folder, tmp_path)
    text = (folder / "report.md").read_text()
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert all((folder / path).read_bytes().startswith(b"\x89PNG") for path in shown)
    assert len(shown) == len(NAMES) - (not layers) - (not recovered)
    assert (folder / "report.html").read_text().count("data:image/png;base64,") == len(shown)
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
