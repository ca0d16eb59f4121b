"""What `libprune new`, `prune` and `update` take and say; the project itself is tested elsewhere."""

import pytest
from typer.testing import CliRunner

import libprune
from libprune.cli import projects
from libprune.cli.main import app
from libprune.engine.errors import ProjectError
from libprune.pipeline.params import load_params
from libprune.project import run as runner
from tests.support import tiny

RUNNER = CliRunner()


def test_the_version_is_that_of_the_package():
    assert RUNNER.invoke(app, ["--version"]).output == f"libprune {libprune.__version__}\n"


def test_options_become_params_and_the_next_command_is_said(tmp_path):
    folder = tmp_path / "mine"
    words = ["--model", "org/model", "--text", "org/text", "--ratio", "0.3", "--preset", "fast"]
    done = RUNNER.invoke(app, ["new", str(folder), *words, "--set", "score.criterion=wanda"])
    assert done.exit_code == 0, done.output
    assert f"next: cd {folder}; dvc repro" in done.output
    params = load_params(folder / "params.yaml")
    assert (params.preset, params.allocate.ratio, params.score.criterion) == ("fast", 0.3, "wanda")
    assert RUNNER.invoke(app, ["update", str(folder)]).output == "nothing to update\n"


@pytest.mark.parametrize("word", ["ratio", "allocate.ratoi=0.3", "allocate.ratio=a", "preset=fst"])
def test_a_wrong_setting_is_one_line(tmp_path, word):
    done = RUNNER.invoke(app, ["new", str(tmp_path / "mine"), "--model", "org/m", "--text", "org/t", "--set", word])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = RUNNER.invoke(app, ["prune", "org/model", str(tmp_path), "--text", "org/text"])
    assert done.exit_code == 1
    assert "exists; name a folder that does not" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_runs_for_one_model_do_not_share_its_project(tmp_path, monkeypatch):
    """The second begins while the first has its project and runs nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny.write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("one\ntwo\nthree\n")
    asked, seconds = ["prune", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt")], []

    def run(project):
        before = (project / "params.yaml").read_text()
        seconds.append(RUNNER.invoke(app, [*asked, str(tmp_path / "two"), "--ratio", "0.4"]))
        assert (project / "params.yaml").read_text() == before
        raise ProjectError("the first is over")

    monkeypatch.setattr(runner, "run", run)
    first = RUNNER.invoke(app, [*asked, str(tmp_path / "one"), "--ratio", "0.3"])
    assert "the first is over" in first.stderr
    assert "is in use by another run of libprune; wait until it has ended" in seconds[0].stderr


def test_the_commands_are_those_of_this_module():
    callbacks = {command.callback for command in app.registered_commands}
    assert {projects.prune, projects.new, projects.update} <= callbacks


def test_a_wrong_number_is_told_with_the_option():
    done = RUNNER.invoke(app, ["prune", "m", "o", "--text", "t", "--ratio", "30%"])
    assert done.exit_code == 2
    assert "--ratio" in done.stderr
