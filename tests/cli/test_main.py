"""The `libprune` command: what it prints, and how it ends."""

import json

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from libprune.cli.main import app
from libprune.pipeline.atomic import write_json
from libprune.pipeline.terminal import text_table
from libprune.report.headline import HEADER, headline_rows
from libprune.report.programs import how_to_load
from tests.support import tiny
from tests.support.evaluated import EVALUATION, changed, trained


def test_nothing_loads_weights(tmp_path, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    done = CliRunner().invoke(app, ["inspect", str(tiny.write_model(tmp_path / "model")), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["layers"] == 4


def test_a_valid_params_file_is_confirmed_and_a_wrong_key_is_named(tmp_path):
    path = tiny.write_params(tmp_path / "params.yaml", "model", "text")
    done = CliRunner().invoke(app, ["params", "--params", str(path)])
    assert (done.exit_code, done.output) == (0, f"{path} is valid\n")
    tiny.change_params(tmp_path, "score", criterium="taylor")
    done = CliRunner().invoke(app, ["params", "--params", str(path)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "unknown key 'score.criterium'; did you mean 'criterion'?" in done.stderr


@pytest.mark.parametrize("shape", ["uniform", "per_layer"])
def test_a_result_is_shown_with_its_place_and_the_line_that_loads_it(tmp_path, shape):
    write_json(tmp_path / "evaluation.json", changed(plan={"shape": shape}))
    done = CliRunner().invoke(app, ["show", "--artifacts", str(tmp_path)])
    assert done.exit_code == 0
    table, _, places = done.output.partition("\n\n")
    assert table == text_table(headline_rows(EVALUATION), HEADER)
    assert places.splitlines() == [
        f"model:  {tmp_path / 'pruned'}",
        f"load:   {how_to_load(str(tmp_path / 'pruned'), shape, 'causal_lm')}",
        "report: report/report.html",
    ]


def test_of_a_recovered_result_both_folders_are_shown_and_the_recovered_one_is_loaded(tmp_path):
    write_json(tmp_path / "evaluation.json", trained())
    done = CliRunner().invoke(app, ["show", "--artifacts", str(tmp_path)])
    assert done.exit_code == 0
    table, _, places = done.output.partition("\n\n")
    assert table == text_table(headline_rows(trained()), HEADER)
    assert places.splitlines() == [
        f"model:  {tmp_path / 'recovered'}",
        f"before: {tmp_path / 'pruned'} (before recovery; sizes and speed were measured on it)",
        f"load:   {how_to_load(str(tmp_path / 'recovered'), 'uniform', 'causal_lm')}",
        "report: report/report.html",
    ]


def test_without_a_result_the_stage_to_run_is_named(tmp_path):
    done = CliRunner().invoke(app, ["show", "--artifacts", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "run `dvc repro evaluate` first" in done.stderr
