"""The `libprune` command: what it prints, and how it ends."""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from libprune.cli.main import app
from libprune.pipeline.atomic import write_json
from libprune.pipeline.layout import Layout
from libprune.report.programs import closing
from tests.support import tiny
from tests.support.evaluated import EVALUATION


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


def test_a_result_is_shown_as_the_last_stage_of_a_run_shows_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "evaluation.json", EVALUATION)
    done = CliRunner().invoke(app, ["show", "--artifacts", str(tmp_path)])
    assert done.exit_code == 0
    assert done.output.splitlines() == closing(EVALUATION, Layout(tmp_path), Path("report"))


def test_without_a_result_the_stage_to_run_is_named(tmp_path):
    done = CliRunner().invoke(app, ["show", "--artifacts", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "run `dvc repro evaluate` first" in done.stderr
