"""A result is shown only while it belongs to the params."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from libprune.cli.current import require_current
from libprune.cli.main import app
from libprune.engine.errors import ArtifactError
from libprune.pipeline.layout import Layout
from tests.support.closure import ROOT
from tests.support.params import PLACES, shipped

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
BESIDE = {"sources", "export", "report"}
"""Stages whose params the evaluation does not depend on."""
READ = {key for name, stage in PIPELINE.items() if name not in BESIDE for key in stage.get("params", ())}


def look_up(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data[part]
    return data


def locked(data: dict[str, Any]) -> dict[str, Any]:
    """What DVC notes down of a run of the pipeline with the given params; each digest is that of a path."""

    def entries(listed: list[Any]) -> list[dict[str, str]]:
        paths = [one if isinstance(one, str) else next(iter(one)) for one in listed]
        return [{"path": path, "md5": hashlib.md5(b"{}" if "evaluation" in path else path.encode()).hexdigest()}
                for path in paths]  # fmt: skip

    return {
        name: {
            "deps": entries([dep for dep in stage["deps"] if dep.startswith("artifacts")]),
            "params": {"params.yaml": {k: look_up(data, k) for k in stage.get("params", ()) if isinstance(k, str)}},
            "outs": entries([*stage.get("outs", []), *stage.get("metrics", [])]),
        }
        for name, stage in PIPELINE.items()
    }


@pytest.fixture
def project(tmp_path) -> Path:
    """A project whose pipeline has run."""
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "evaluation.json").write_text("{}")
    write(tmp_path, shipped(), locked(shipped()))
    return tmp_path


def write(folder: Path, params: dict[str, Any], stages: dict[str, Any]) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}, sort_keys=False))


def test_a_result_of_the_params_is_current(project):
    require_current(Layout(project / "artifacts"))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from([place for place in PLACES if len(place) == 2]), gone=st.booleans())
def test_a_change_of_any_param_behind_the_evaluation_is_named_and_no_other(project, place, gone):
    changed, key = shipped(), ".".join(place)
    changed[place[0]][place[1]] = "other"
    if gone:
        del changed[place[0]][place[1]]
    write(project, changed, locked(shipped()))
    if key not in READ:
        require_current(Layout(project / "artifacts"))
        return
    now = "nothing" if gone else "other"
    with pytest.raises(ArtifactError, match=rf"^params\.yaml says {key}: {now}, and the last result was made with .*"):
        require_current(Layout(project / "artifacts"))


def test_of_several_keys_the_first_is_named_with_their_number(project):
    changed = shipped()
    changed["allocate"] |= {"ratio": 0.3, "min_groups": 2}
    write(project, changed, locked(shipped()))
    with pytest.raises(ArtifactError, match=r"allocate\.ratio: 0\.3, .* with 0\.2 \(2 keys differ\); `dvc repro`"):
        require_current(Layout(project / "artifacts"))


def test_a_run_that_was_stopped_half_way_is_noticed(project):
    stages = copy.deepcopy(locked(shipped()))
    for out in stages["allocate"]["outs"]:
        out["md5"] = "new"
    write(project, shipped(), stages)
    with pytest.raises(ArtifactError, match=r"the stage allocate has run since the last result was made; `dvc repro`"):
        require_current(Layout(project / "artifacts"))


def test_an_evaluation_of_another_run_is_noticed_and_nothing_is_shown(project):
    (project / "artifacts" / "evaluation.json").write_text('{"a": 1}')
    done = CliRunner().invoke(app, ["show", "--artifacts", str(project / "artifacts")])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "evaluation.json is not the file that dvc.lock records; `dvc repro` brings it up to date" in done.stderr


@pytest.mark.parametrize("lacking", ["dvc.lock", "params.yaml"])
def test_where_nothing_is_noted_down_nothing_is_said(project, lacking):
    (project / lacking).unlink()
    require_current(Layout(project / "artifacts"))


def test_stages_that_were_run_without_dvc_are_not_judged(project):
    write(project, shipped(), {})
    require_current(Layout(project / "artifacts"))
