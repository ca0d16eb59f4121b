"""A project is there whole or not at all, and lies in a repository if one can be had."""

import configparser
from pathlib import Path

import pytest

from libprune.engine.errors import LibpruneError, ParamsError, ProjectError
from libprune.pipeline.params import load_params
from libprune.project import create
from libprune.project.commands import git
from libprune.project.create import create_project, update_project
from libprune.project.pipeline_file import digest, pipeline_text
from tests.support.closure import ROOT
from tests.support.files import tree

CHANGES = {"prepare.model": "org/model", "tokenize.text": "org/text", "allocate.ratio": 0.3}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("projects") / "mine"
    assert create_project(folder, CHANGES) == ["A git repository was made for it, with one commit."]
    return folder


def test_a_project_has_its_files_and_one_commit_without_changes(project):
    files = {".dvc", ".dvcignore", ".git", ".gitignore", "README.md", "dvc.yaml", "params.yaml"}
    assert {path.name for path in project.iterdir()} == files
    assert load_params(project / "params.yaml").allocate.ratio == 0.3
    git(project, "diff", "--exit-code", "HEAD")
    assert "# mine" in (project / "README.md").read_text()
    assert [path.name for path in project.parent.iterdir()] == ["mine"]


def test_results_are_ignored_by_git_and_compiled_files_by_dvc(project):
    ours, own = (set((folder / ".gitignore").read_text().split()) for folder in (ROOT, project))
    assert {"/artifacts/", "/report/", "/.work/", "/dvc_plots/"} <= ours & own
    assert (project / ".dvcignore").read_text().split() == ["__pycache__", "*.pyc"]


def test_without_git_dvc_does_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(create, "has_git", lambda: False)
    assert "git is not installed" in create_project(tmp_path / "mine", CHANGES)[0]
    config = configparser.ConfigParser()
    config.read(tmp_path / "mine/.dvc/config")
    assert config.getboolean("core", "no_scm")


def test_in_a_repository_of_the_user_nothing_is_committed(tmp_path):
    git(tmp_path, "init", "--quiet")
    assert "commit its files" in create_project(tmp_path / "mine", CHANGES)[0]
    assert not (tmp_path / "mine/.git").exists()
    with pytest.raises(ProjectError):
        git(tmp_path, "rev-parse", "--verify", "HEAD")


@pytest.mark.parametrize("changes", [{"allocate.ratio": 2.0}, {"allocate.ratoi": 0.2}, {"tokenize.text": "./gone.txt"}])
def test_wrong_params_leave_nothing(tmp_path, changes):
    with pytest.raises(LibpruneError):
        create_project(tmp_path / "mine", CHANGES | changes)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused_and_kept(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious").write_text("x")
    for name, fault in (("mine", "not empty"), ("mine/precious", "is a file")):
        with pytest.raises(ProjectError, match=fault):
            create_project(tmp_path / name, CHANGES)
    assert (tmp_path / "mine/precious").read_text() == "x"


def test_the_folder_that_a_shell_is_in_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    for name in (Path(), tmp_path / "mine"):
        with pytest.raises(ProjectError, match="mine is the folder that this runs in"):
            create_project(name, CHANGES)
    assert list(Path().iterdir()) == []


@pytest.fixture
def old_project(tmp_path) -> Path:
    """A project that another version has written, with a value of the user."""
    text = pipeline_text().replace("artifacts/plan.parquet", "artifacts/plan-of-old.parquet")
    rest = text.partition("\n")[2]
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").write_text(f"# Pipeline {digest(rest)}, written by libprune 0.0.1.\n{rest}")
    params = (ROOT / "params.yaml").read_text().replace("  ratio: 0.2", "  ratio: 0.45")
    (tmp_path / "params.yaml").write_text(params.replace("  calibration_length: 128\n", ""))
    return tmp_path


def test_an_update_brings_the_pipeline_and_new_keys_and_keeps_values(old_project):
    named = [line.partition(" ")[0] for line in update_project(old_project)]
    assert named == [str(old_project / name) for name in ("dvc.yaml", "params.yaml")]
    assert (old_project / "dvc.yaml").read_text() == pipeline_text()
    params = load_params(old_project / "params.yaml")
    assert (params.allocate.ratio, params.tokenize.calibration_length) == (0.45, 128)
    assert update_project(old_project) == ["nothing to update"]


def test_an_update_does_not_write_over_what_a_user_has_changed(old_project):
    with (old_project / "dvc.yaml").open("a") as file:
        file.write("# mine\n")
    before = (old_project / "dvc.yaml").read_text()
    with pytest.raises(ProjectError, match="changed by hand"):
        update_project(old_project)
    assert (old_project / "dvc.yaml").read_text() == before
    (old_project / "dvc.yaml").rename(old_project / "mine.yaml")
    update_project(old_project)
    assert (old_project / "dvc.yaml").read_text() == pipeline_text()


@pytest.mark.parametrize("text", ["", "prepare:\n  model: [\n", "- a\n", "preset: fast\npreset: best\n"])
def test_params_that_cannot_be_read_are_named_and_stay(old_project, text):
    (old_project / "params.yaml").write_text(text)
    before = tree(old_project)
    with pytest.raises(ParamsError, match=r"params\.yaml (is not valid YAML: |holds )"):
        update_project(old_project)
    assert tree(old_project) == before


def test_what_is_no_project_is_not_updated(tmp_path):
    with pytest.raises(ProjectError, match="is no project of `libprune new`"):
        update_project(tmp_path)
    (tmp_path / ".dvc").mkdir()
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    with pytest.raises(ProjectError, match="is no project of `libprune new`"):
        update_project(tmp_path)
