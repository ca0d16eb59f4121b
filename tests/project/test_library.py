"""The steps as functions; docs/library.md shows all of them in a row, and its test runs them."""

import pytest

import libprune
from libprune.engine.errors import LibpruneError, ParamsError, ProjectError
from libprune.project import library
from libprune.project.params_file import params_text


def test_the_package_offers_the_functions_of_the_module():
    assert {name: getattr(libprune, name) for name in libprune.__all__} == {
        name: getattr(library, name) for name in libprune.__all__
    }
    assert set(libprune.__all__) < set(dir(libprune))
    with pytest.raises(AttributeError, match="has no attribute 'prunes'"):
        _ = libprune.prunes


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ProjectError, match=r"holds no params\.yaml"):
        libprune.load("org/model", "org/text", tmp_path)


def test_settings_hold_for_later_steps_and_wrong_ones_change_nothing(tmp_path):
    work = libprune.Work(tmp_path)
    (tmp_path / "params.yaml").write_text(params_text({"prepare.model": "org/model", "tokenize.text": "org/text"}))
    steps = {libprune.score: {"score.criterion": "wanda"}, libprune.allocate: {"allocate.ratio": 0.4}}
    for step, settings in steps.items():
        with pytest.raises(LibpruneError, match="run `dvc repro"):
            step(work, settings=settings)
    assert (work.params.score.criterion, work.params.allocate.ratio) == ("wanda", 0.4)
    before = (tmp_path / "params.yaml").read_text()
    with pytest.raises(LibpruneError, match=r"allocate\.ratio"):
        libprune.allocate(work, ratio=1.5)
    assert (tmp_path / "params.yaml").read_text() == before


def test_params_that_cannot_be_read_are_named_and_stay(tmp_path):
    (tmp_path / "params.yaml").write_text("prepare:\n  model: [\n")
    with pytest.raises(ParamsError, match=r"params\.yaml is not valid YAML: line 3"):
        libprune.allocate(libprune.Work(tmp_path), ratio=0.5)
    assert (tmp_path / "params.yaml").read_text() == "prepare:\n  model: [\n"
