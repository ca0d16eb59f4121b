"""Commands run with the programs of this environment, and what they say is not lost."""

import pytest

from libprune.engine.errors import ProjectError
from libprune.project.commands import dvc, git, in_repository


def test_what_git_refuses_is_told_with_its_words(tmp_path):
    with pytest.raises(ProjectError, match=r"git nothing --here. in .* failed: .*nothing"):
        git(tmp_path, "nothing", "--here")


def test_what_dvc_refuses_is_told_with_its_words(tmp_path):
    with pytest.raises(ProjectError, match=r"`dvc status` in .* failed: this folder is no project of DVC"):
        dvc(tmp_path, "status")


def test_a_folder_is_in_a_repository_or_not(tmp_path):
    assert not in_repository(tmp_path)
    git(tmp_path, "init", "--quiet")
    (tmp_path / "inner").mkdir()
    assert in_repository(tmp_path / "inner")
