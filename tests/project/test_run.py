"""The project of a model lies in the user's cache, is found again, and gives its results."""

import errno
import json
from pathlib import Path

import pytest

from libprune.engine.errors import ProjectError, SourceError
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import load_params
from libprune.project import run as runner
from libprune.project.pipeline_file import pipeline_text
from libprune.project.run import hand_out, project_of, reserved, set_up, stages_before
from tests.support import tiny


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/libprune/projects"


@pytest.fixture
def changes(tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    tiny.write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("one\ntwo\nthree\n")
    return {"prepare.model": "model", "tokenize.text": "text.txt", "allocate.ratio": 0.3}


def test_a_second_call_finds_the_project_and_only_the_params_differ(cache, changes, tmp_path):
    project = set_up(changes | {"allocate.method": "global"})
    assert project.parent == cache
    assert project.name.startswith("model-")
    params = load_params(project / "params.yaml")
    assert (params.prepare.model, params.tokenize.text) == (str(tmp_path / "model"), str(tmp_path / "text.txt"))
    (project / "artifacts").mkdir()
    assert set_up(changes | {"allocate.ratio": 0.4}) == project
    params = load_params(project / "params.yaml")
    assert (params.allocate.ratio, params.allocate.method) == (0.4, "uniform"), "settings do not stick"
    assert (project / "artifacts").is_dir()
    assert (project / "dvc.yaml").read_text() == pipeline_text()


def test_wrong_params_change_nothing(cache, changes):
    with pytest.raises(SourceError, match=r"prepare\.model: \./gone does not exist"):
        set_up(changes | {"prepare.model": "./gone"})
    assert not cache.exists()


def test_a_project_in_use_is_left_alone(cache, changes, monkeypatch):
    project = project_of(str(Path("model").absolute()))
    project.mkdir(parents=True)
    monkeypatch.setattr(runner, "running", lambda folder: [4711] if folder == project else [])
    with pytest.raises(ProjectError, match="in use by process 4711"):
        set_up(changes)
    assert list(project.iterdir()) == []


def test_where_a_file_system_has_no_locks_nobody_is_refused(cache, changes, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runner.fcntl, "flock", flock)
    with reserved(changes["prepare.model"]), reserved(changes["prepare.model"]):
        pass


def test_models_of_one_name_have_projects_of_their_own(cache):
    assert len({project_of("a/model"), project_of("b/model"), project_of("a/model")}) == 2
    assert project_of("hub/na me:x").parent == cache


def result(project: Path, recovered: bool, files: list) -> Layout:
    layout = Layout(project / "artifacts")
    for folder in (layout.pruned, layout.recovered, layout.exported, project / "report"):
        folder.mkdir(parents=True)
        (folder / "what").write_text(folder.name)
    (project / "report/report.md").write_text("artifacts/pruned artifacts/recovered artifacts/exported")
    layout.evaluation.write_text(json.dumps({"recovered": {"tokens": 1} if recovered else None}))
    layout.export.write_text(json.dumps({"files": files}))
    (project / "params.yaml").write_text("preset: fast\n")
    return layout


@pytest.mark.parametrize(("recovered", "files"), [(False, []), (True, [{"name": "model.gguf"}])])
def test_the_final_model_the_report_and_the_params_are_handed_out(tmp_path, recovered, files):
    result(tmp_path / "project", recovered, files)
    assert hand_out(tmp_path / "project", tmp_path / "out") == tmp_path / "out/model"
    assert (tmp_path / "out/model/what").read_text() == ("recovered" if recovered else "pruned")
    report = (tmp_path / "out/report/report.md").read_text()
    assert report == ("artifacts/pruned model exported" if recovered else "model artifacts/recovered exported")
    names = {"model", "report", "params.yaml"} | ({"exported"} if files else set())
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_the_stages_before_one_are_those_that_make_what_it_reads(tmp_path):
    outs = {"plain": ["a"], "with_settings": [{"b": {"cache": False}}], "beside": ["c"], "last": ["d"]}
    stages = {name: {"cmd": name, "outs": paths} for name, paths in outs.items()}
    stages["last"]["deps"] = ["libprune/engine", "b", "a"]
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": stages}))
    assert stages_before(tmp_path, "last") == ("plain", "with_settings")
    with pytest.raises(ProjectError, match="has no stage other; run `libprune update`"):
        stages_before(tmp_path, "other")
    with pytest.raises(ProjectError, match=r"has no dvc\.yaml; change to the folder of a project"):
        stages_before(tmp_path / "none", "last")
