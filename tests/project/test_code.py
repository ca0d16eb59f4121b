"""The links of a project to the installed code."""

import pytest

from libprune.engine.errors import ProjectError
from libprune.pipeline.sources import require_own_code
from libprune.project.code import link_code
from libprune.project.pipeline_file import CODE, code_paths, pipeline_text


def test_links_lead_to_the_code_and_old_ones_go(tmp_path):
    (tmp_path / "dvc.yaml").write_text(pipeline_text())
    link_code(tmp_path)
    (tmp_path / CODE / "gone").symlink_to(tmp_path / "nowhere")
    link_code(tmp_path)
    links = {path.name: path.resolve() for path in (tmp_path / CODE).iterdir()}
    assert links == {name: path.resolve() for name, path in code_paths().items()}
    require_own_code(tmp_path / CODE)


def test_the_pipeline_of_another_version_is_refused(tmp_path):
    (tmp_path / "dvc.yaml").write_text("# Pipeline 0123456789abcdef, written by libprune 9.\n")
    with pytest.raises(ProjectError, match="libprune update"):
        link_code(tmp_path)
    assert not (tmp_path / CODE).exists()


def test_a_stage_does_not_run_beside_the_links_of_another_environment(tmp_path):
    require_own_code(tmp_path)
    (tmp_path / "other/engine").mkdir(parents=True)
    (tmp_path / "engine").symlink_to(tmp_path / "other/engine")
    with pytest.raises(ProjectError, match="dvc repro --force --single-item code"):
        require_own_code(tmp_path)
