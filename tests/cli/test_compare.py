"""The `libprune compare` commands stop in one line where there is nothing to compare."""

import pytest
from typer.testing import CliRunner

from libprune.cli import compare
from libprune.cli.main import app


@pytest.mark.parametrize("command", ["run", "gather"])
def test_a_comparison_file_that_is_missing_or_wrong_is_named_before_anything_runs(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text("settings: 3\n")
    for name, words in (("missing.yaml", "missing.yaml does not exist"), ("wrong.yaml", "wrong.yaml")):
        for program, before in ((app, ["compare"]), (compare.app, [])):
            done = CliRunner().invoke(program, [*before, command, name])
            assert (done.exit_code, done.stdout) == (1, "")
            assert done.stderr.startswith("error: ")
            assert done.stderr.count("\n") == 1
            assert words in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.yaml"]


def test_outside_of_a_project_there_are_no_experiments_to_show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["compare"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
