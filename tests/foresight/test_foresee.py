"""All faults of a file together, as the command and the first stage tell them."""

import re

import pytest
from typer.testing import CliRunner

from libprune.cli.main import app
from libprune.engine.errors import ParamsError
from libprune.foresight.foresee import foresee
from tests.support import tiny
from tests.support.closure import run_without_torch


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Valid params of a hub model and a text that lies here."""
    monkeypatch.chdir(tmp_path)
    tiny.write_text(tmp_path / "text.txt")
    tiny.write_params(tmp_path / "params.yaml", "owner/model", "text.txt")
    return tmp_path


def test_params_without_a_fault_are_given_back(project):
    assert foresee(project / "params.yaml").tokenize.text == "text.txt"


def test_every_fault_has_its_line_and_all_are_told_at_once(project):
    tiny.change_params(project, "score", criterion="tailor + wnada", scaling="rank")
    tiny.change_params(project, "gradients", sequences=99)
    tiny.change_params(project, "tokenize", evaluation_text="./nowhere.txt")
    path, lines = project / "params.yaml", (project / "params.yaml").read_text().splitlines()
    with pytest.raises(ParamsError) as caught:
        foresee(path)
    keys = []
    for fault in caught.value.faults:
        found = re.match(rf"{re.escape(str(path))}, line (\d+): ", fault)
        assert found, fault
        keys.append(lines[int(found[1]) - 1].strip().partition(":")[0])
    assert sorted(keys) == ["criterion", "criterion", "evaluation_text", "sequences"]
    done = CliRunner().invoke(app, ["params"])
    assert done.exit_code == 1
    assert done.stderr.splitlines() == [f"error: {fault.removeprefix(f'{project}/')}" for fault in caught.value.faults]


def test_a_file_that_is_not_understood_is_not_looked_at_further(project):
    tiny.change_params(project, "allocate", ratio=2)
    tiny.change_params(project, "score", criterion="tailor")
    with pytest.raises(ParamsError) as caught:
        foresee(project / "params.yaml")
    assert len(caught.value.faults) == 1


def test_the_first_stage_finds_them_too_and_loads_no_torch(project):
    tiny.change_params(project, "tokenize", text=str(project / "text.txt"))
    assert run_without_torch("sources", project) == [f"tokenize.text: {project / 'text.txt'}"]
