"""What the stages teacher and recover leave where nothing is trained, and the figures of a training."""

import csv
import json

import pytest

from libprune.pipeline.artifacts import read_table
from libprune.pipeline.layout import Layout
from libprune.recovery.idle import COLUMNS, write_figures, write_no_model, write_no_text


def test_without_a_text_the_tokens_are_an_empty_table_and_no_prediction_is_stored(tmp_path):
    layout = Layout(tmp_path)
    write_no_text(layout)
    columns, meta = read_table(layout.recovery_tokens, "teacher")
    assert {name: len(values) for name, values in columns.items()} == {"input_ids": 0}
    assert meta["sequences"] == 0
    assert [path.name for path in layout.teacher.iterdir()] == ["teacher.json"]
    assert json.loads((layout.teacher / "teacher.json").read_text()) == {"top_k": None}


def test_without_a_training_the_folder_of_the_recovered_model_holds_a_note_alone(tmp_path):
    layout = Layout(tmp_path)
    layout.recovered.mkdir()
    (layout.recovered / "model.safetensors").touch()
    write_no_model(layout)
    assert [path.name for path in layout.recovered.iterdir()] == ["recovery.json"]
    assert json.loads((layout.recovered / "recovery.json").read_text()) == {"method": "none"}


@pytest.mark.parametrize("figures", [{}, {"tokens": 64, "held_out_after": 0.25}])
def test_figures_and_the_curve_read_back(tmp_path, figures):
    first = dict(zip(COLUMNS, (0, 0, 0.0, None, 2.5), strict=True))
    last = dict(zip(COLUMNS, (2, 64, 1.5, 0.75, None), strict=True))
    curve = [first, last] if figures else []
    write_figures(tmp_path, figures, curve)
    assert json.loads((tmp_path / "recovery.json").read_text()) == figures
    lines = (tmp_path / "learning_curve.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    read = [{key: float(value) if value else None for key, value in row.items()} for row in csv.DictReader(lines)]
    assert read == curve
