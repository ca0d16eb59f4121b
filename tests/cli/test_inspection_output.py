"""An inspection as text and as data."""

import json
import math
import re

import pytest

from libprune.cli.inspection import inspect_model, params_for
from libprune.cli.inspection_output import as_data, as_text
from libprune.pipeline.sections import Vocabulary
from libprune.pipeline.terminal import gigabytes
from tests.support.published import CONFIGS, MIXTURES, write_config


def test_a_published_config_alone_is_enough_and_fits_a_hundred_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = {"num_hidden_layers": 2, "intermediate_size": 256, "torch_dtype": "bfloat16"}
    write_config(tmp_path / "model", CONFIGS["Llama-3.1-8B"] | smaller)
    inspection = inspect_model(params_for("model", None, False, None))
    shown = as_text(inspection)
    assert f"{inspection.architecture.total_parameters:,}" in shown
    assert "stored as bfloat16" in shown
    assert "a stock config says 1, 2, 4, 8" in shown
    assert re.search(r"^devices of tensor parallelism: dense.*: 1, 2, 4, 8, 16, 32", shown, re.MULTILINE)
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


def test_what_stays_whole_beside_a_language_model_is_one_row(tmp_path):
    smaller = {"num_hidden_layers": 2, "intermediate_size": 256}
    config = CONFIGS["Qwen3-VL-4B-Instruct"]
    write_config(tmp_path / "model", config | {"text_config": config["text_config"] | smaller})
    inspection = inspect_model(params_for(str(tmp_path / "model"), None, False, None))
    text, vision = as_text(inspection), [p for p in inspection.architecture.parameters if p.whole]
    assert {p.name.partition(".visual.")[0] for p in vision} == {"model"}
    held = sum(map(inspection.architecture.numel, vision))
    assert re.search(rf"^  beside the language model, {len(vision)} tensors +{held:,}$", text, re.MULTILINE)
    assert "axes       model 2,560, ffn 256, kv 8, d 128, vocab 151,936, q 4\n" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("experts", "units", "said"),
    [
        ("whole", "128 experts a layer (axis experts)", "this run cuts whole experts; a layer keeps 8 or more"),
        ("channels", "768 channels a layer (axis inner)", "this run cuts channels, the same in all experts of a layer"),
    ],
)
def test_a_mixture_says_what_a_token_goes_through_and_which_units_are_cut(tmp_path, experts, units, said):
    write_config(tmp_path / "model", MIXTURES["Qwen3-30B-A3B"] | {"num_hidden_layers": 2})
    inspection = inspect_model(params_for(str(tmp_path / "model"), None, False, None, experts))
    text, mixture = as_text(inspection), as_data(inspection)["mixture"]
    assert f"experts    {units}, " in text
    assert "mixture    128 experts in each of 2 layers, 8 for a token" in text
    assert f"mixture    {said}" in text
    idle = 2 * 120 * 3 * 768 * 2048
    assert mixture["active_parameters"] == inspection.architecture.total_parameters - idle
    assert f"{mixture['active_parameters']:,} parameters are active for a token" in text
    kept = [shape.kept["experts"] for shape in inspection.shapes if not shape.refused]
    assert min(kept) < max(kept)
    assert experts == "whole" or all(count % 8 == 0 for count in kept)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_has_rows_and_a_line_that_fit_a_hundred_columns(tmp_path, method):
    smaller = {"num_hidden_layers": 2, "intermediate_size": 256, "torch_dtype": "bfloat16"}
    write_config(tmp_path / "model", CONFIGS["Llama-3.1-8B"] | smaller)
    params = params_for(str(tmp_path / "model"), None, False, None)
    recover = params.recover.model_copy(update={"method": method, "dtype": "bfloat16"})
    inspection = inspect_model(params.model_copy(update={"recover": recover}))
    lines, data = as_text(inspection).splitlines(), as_data(inspection)
    stage = next(one for one in data["stages"] if one["stage"] == "recover")
    assert stage["training"] > 0
    (line,) = (line for line in lines if line.startswith("recover takes"))
    assert f"{gigabytes(stage['training'])} of memory" in line
    assert f"{gigabytes(stage['checkpoints'])} of checkpoints" in line
    assert [line.split()[0] for line in lines if line.startswith(("teacher ", "recover  "))] == ["teacher", "recover"]
    assert max(map(len, lines)) <= 100


def test_a_smaller_vocabulary_is_announced_and_not_counted(tmp_path):
    write_config(tmp_path / "model", CONFIGS["SmolLM2-135M"] | {"num_hidden_layers": 2, "intermediate_size": 96})
    params = params_for(str(tmp_path / "model"), None, False, None)
    prepare = params.prepare.model_copy(update={"vocabulary": Vocabulary(text="news.txt")})
    all_of_them = as_text(inspect_model(params))
    shown = as_text(inspect_model(params.model_copy(update={"prepare": prepare})))
    (added,) = set(shown.splitlines()) - set(all_of_them.splitlines())
    assert added == "vocabulary rows go that news.txt never needs; below are all of them"
