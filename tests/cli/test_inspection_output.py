"""An inspection as text and as data."""

import json
import math

from libprune.cli.inspection import inspect_model, params_for
from libprune.cli.inspection_output import as_data, as_text
from tests.support.published import CONFIGS, write_config


def test_a_published_config_alone_is_enough_and_fits_a_hundred_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = {"num_hidden_layers": 2, "intermediate_size": 256, "torch_dtype": "bfloat16"}
    write_config(tmp_path / "model", CONFIGS["Llama-3.1-8B"] | smaller)
    inspection = inspect_model(params_for("model", None, False, None))
    shown = as_text(inspection)
    assert f"{inspection.architecture.total_parameters:,}" in shown
    assert "stored as bfloat16" in shown
    assert "a stock config says 1, 2, 4, 8" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_the_parts_and_what_lies_outside_them_make_the_total_in_text_and_data(tmp_path):
    write_config(tmp_path / "model", CONFIGS["SmolLM2-135M"] | {"num_hidden_layers": 3, "intermediate_size": 96})
    inspection = inspect_model(params_for(str(tmp_path / "model"), None, False, None))
    data, text = as_data(inspection), as_text(inspection)
    counts = [*(part["parameters"] for part in data["parts"].values()), data["outside"]]
    norms = sum(
        math.prod(one["shape"]) for one in data["parameters"] if one["layer"] is not None and one["part"] is None
    )
    assert sum(counts) + norms == data["total_parameters"]
    assert sum(math.prod(one["shape"]) for one in data["parameters"]) == data["total_parameters"]
    for count in (*counts, data["total_parameters"]):
        assert f" {count:,} " in text
    assert [stage["written"] for stage in data["stages"]] == [sum(stage["files"].values()) for stage in data["stages"]]
    assert json.loads(json.dumps(data)) == data
