"""The scores of a layout: read whole, of the model that is there, and changed by columns."""

from dataclasses import replace

import numpy as np
import pytest

from libprune.engine.errors import ArtifactError
from libprune.pipeline.artifacts import write_architecture, write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.scores import Scores, read_scores
from tests.support.shapes import EQUAL_COSTS


@pytest.fixture
def layout(tmp_path) -> Layout:
    layout = Layout(tmp_path)
    write_architecture(layout, replace(EQUAL_COSTS.architecture(), fingerprint="here"))
    write_table(layout.calibration_tokens, {}, {"model": "here", "tokens": "text"})
    write_table(layout.scores, table(), {"model": "here", "tokens": "text", "comparable": True, "scaling": "none"})
    return layout


def table() -> dict:
    return EQUAL_COSTS.table(1.0 + np.arange(len(EQUAL_COSTS.unit_costs())))


def test_what_was_written_is_read_with_its_model(layout):
    scores = read_scores(layout)
    assert scores.architecture.fingerprint == "here"
    assert scores.origin == {"model": "here", "tokens": "text"}
    for name, values in table().items():
        assert (scores.table[name] == values).all()


def test_scores_of_another_model_are_refused(layout):
    write_table(layout.scores, table(), {"model": "elsewhere"})
    with pytest.raises(ArtifactError, match=r"belongs to model 'elsewhere', .*run `dvc repro`"):
        read_scores(layout)


def test_scores_of_another_text_are_refused_and_those_of_none_belong_to_the_text_beside_them(layout):
    write_table(layout.calibration_tokens, {}, {"model": "here", "tokens": "another"})
    with pytest.raises(ArtifactError, match=r"belongs to tokens 'text', .*run `dvc repro`"):
        read_scores(layout)
    write_table(layout.scores, table(), {"model": "here"})
    assert read_scores(layout).origin == {"model": "here", "tokens": "another"}


def test_missing_scores_name_the_stage(layout):
    layout.scores.unlink()
    with pytest.raises(ArtifactError, match="run `dvc repro score` first"):
        read_scores(layout)


@pytest.mark.parametrize(("comparable", "scaling"), [(True, "none"), (True, "rank"), (False, "none"), (False, "rank")])
def test_scores_compare_as_they_are_only_unscaled(comparable, scaling):
    scores = Scores(EQUAL_COSTS.architecture(), table(), {"comparable": comparable, "scaling": scaling})
    assert scores.compares("none") is (comparable and scaling == "none")
    assert scores.compares("sensitivity")


def test_without_a_text_the_origin_is_the_model_alone():
    assert Scores(EQUAL_COSTS.architecture(), table(), {"model": "here"}).origin == {"model": "here"}


def test_columns_are_added_or_take_the_place_of_others_and_the_scores_stay(layout):
    scores = read_scores(layout)
    before = scores.table["score"].copy()
    changed = scores.with_columns({"score": 2 * before, "more": before})
    assert (changed.table["score"] == 2 * before).all()
    assert (changed.table["more"] == before).all()
    assert (scores.table["score"] == before).all()
    assert "more" not in scores.table
    assert changed.meta is scores.meta
