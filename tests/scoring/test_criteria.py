"""Criteria: the names that are known, and how the tables that one reads are joined."""

import shutil

import pytest

from libprune.engine.errors import ArtifactError, LibpruneError
from libprune.pipeline.artifacts import read_table, write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Score
from libprune.scoring.criteria import CRITERIA, find_criterion, join_tables
from tests.support.scored import write_tables


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Layout:
    return write_tables(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture
def own(tmp_path) -> Layout:
    """Artifacts that a test may damage."""
    return write_tables(tmp_path)


@pytest.mark.parametrize(("word", "meant"), [("taylr", "taylor"), ("unit-fisher", "unit_fisher"), ("Wanda", "wanda")])
def test_an_unknown_criterion_is_told_the_nearest_and_the_known(word, meant):
    with pytest.raises(
        LibpruneError, match=rf"score\.criterion = '{word}' is unknown; did you mean '{meant}'"
    ) as error:
        find_criterion(word)
    assert all(name in str(error.value) for name in CRITERIA)


def test_a_missing_table_names_its_stage(own):
    shutil.rmtree(own.gradients)
    with pytest.raises(ArtifactError, match=r"gradients/units\.parquet does not exist; run `dvc repro gradients`"):
        join_tables(own, CRITERIA["taylor"], Score(criterion="taylor"))


def test_a_stage_that_collected_nothing_says_what_to_set(own):
    (own.hessian / "units.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"needs the hessian stage.*set hessian\.estimator to fisher"):
        join_tables(own, CRITERIA["taylor_2nd"], Score(criterion="taylor_2nd"))


def rewrite(layout: Layout, stage: str, meta: dict, step: int = 1) -> None:
    """Writes a stage's table again with other metadata, or its rows in steps."""
    path = layout.root / stage / "units.parquet"
    table, old = read_table(path, stage)
    write_table(path, {name: values[::step] for name, values in table.items()}, old | meta)


def test_a_table_of_another_model_is_refused(own):
    rewrite(own, "gradients", {"model": "elsewhere"})
    with pytest.raises(ArtifactError, match="belongs to model 'elsewhere', but the current model is 'here'"):
        join_tables(own, CRITERIA["taylor"], Score(criterion="taylor"))


def test_tables_from_different_texts_are_refused(own):
    rewrite(own, "hessian", {"tokens": "others"})
    with pytest.raises(ArtifactError, match="belongs to tokens 'others', but the current tokens is 'text'"):
        join_tables(own, CRITERIA["taylor_2nd"], Score(criterion="taylor_2nd"))


def test_rows_in_another_order_are_refused(own):
    rewrite(own, "activations", {}, step=-1)
    with pytest.raises(ArtifactError, match="do not list the units of this model in order"):
        join_tables(own, CRITERIA["wanda"], Score(criterion="wanda"))


def test_the_joined_origin_names_model_and_text(layout):
    assert join_tables(layout, CRITERIA["taylor_2nd"], Score(criterion="taylor_2nd"))[1] == {
        "model": "here",
        "tokens": "text",
    }
    assert join_tables(layout, CRITERIA["magnitude"], Score(criterion="magnitude"))[1] == {"model": "here"}
