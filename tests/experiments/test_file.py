"""Comparison files: what is wrong in one is refused by name before anything runs."""

from itertools import product
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.errors import LibpruneError
from libprune.experiments.file import SEED, leaves_of, read_comparison, read_file, read_setting, with_changes
from libprune.pipeline.params import Params
from tests.support.closure import ROOT
from tests.support.compared import comparison, write_comparison

DATA = yaml.safe_load((ROOT / "params.yaml").read_text())
LEAVES = leaves_of(DATA)
READY = sorted((ROOT / "comparisons").glob("*.yaml"))


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_every_setting_of_the_comparisons_that_come_with_the_project_is_valid(path):
    found = read_file(path)
    assert found.name == path.stem
    assert found.title
    for name, own in found.changes().items():
        assert isinstance(read_setting(name, {**found.base, **own}, DATA, found.seeds[0], path).params, Params)


values = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4), st.lists(st.integers(), max_size=2))
some_changes = st.dictionaries(st.sampled_from(sorted(LEAVES)), values, max_size=4)


@given(some_changes)
def test_changes_are_what_differs_and_the_file_is_left_alone(changes):
    assert leaves_of(with_changes(DATA, changes)) == LEAVES | changes
    assert leaves_of(DATA) == LEAVES


def test_a_section_that_the_params_file_lacks_is_added():
    assert with_changes({"preset": "fast"}, {"score.seed": 1, "preset": "best"}) == {
        "preset": "best",
        "score": {"seed": 1},
    }


def test_runs_are_every_setting_with_every_seed_and_the_seeds_outermost(tmp_path):
    made = comparison(tmp_path, set={"allocate.ratio": 0.3})
    runs = list(made.runs())
    assert [(run.seed, run.setting) for run in runs] == list(product((0, 1, 2), ("fisher", "plain")))
    assert len({run.experiment for run in runs}) == len(runs)
    for run in runs:
        assert run.changes[SEED] == run.leaves[SEED] == run.seed
        assert run.leaves["allocate.ratio"] == 0.3
        assert run.is_of(run.leaves)
        assert not any(run.is_of(other.leaves) for other in runs if other is not run)


def test_a_param_that_only_one_side_has_makes_another_run(tmp_path):
    run = next(comparison(tmp_path).runs())
    assert not run.is_of({**run.leaves, "score.more": 1})
    assert not run.is_of({key: value for key, value in run.leaves.items() if key != "score.seed"})
    assert run.is_of({**run.leaves, "allocate.ratio": "0.2"})  # as a number that YAML reads as text


def test_a_grid_is_every_combination_under_the_names_of_its_values(tmp_path):
    grid = {"score.criterion": ["taylor", "unit_fisher"], "allocate.ratio": [0.2, 0.3]}
    made = comparison(tmp_path, settings=None, grid=grid)
    assert [setting.name for setting in made.settings] == ["taylor-0.2", "taylor-0.3", *(
        f"unit_fisher-{ratio}" for ratio in (0.2, 0.3)
    )]  # fmt: skip
    for setting in made.settings:
        assert setting.name == "-".join(str(value) for value in setting.changes.values())


def test_combinations_whose_names_would_be_the_same_are_refused(tmp_path):
    texts = ["a b", "a_b"]
    with pytest.raises(LibpruneError, match="two combinations are called 'a_b'"):
        comparison(tmp_path, settings=None, grid={"tokenize.text": texts})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seed": [0]}, r"unknown key 'seed'; did you mean 'seeds'"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "names one twice"),
        ({"seeds": [-1]}, "seeds.0"),
        ({"name": "a b"}, "name"),
        ({"settings": None}, "either settings or a grid"),
        ({"grid": {"allocate.ratio": [0.1]}}, "either settings or a grid"),
        ({"settings": None, "grid": {"allocate.ratio": []}}, "a param has no values"),
        ({"reference": "fischer"}, r"reference 'fischer' is no setting; did you mean 'fisher'\?"),
        ({"settings": {"a": {"score.criterio": 1}}}, r"'a': unknown param 'score.criterio'; did you mean 'score.crit"),
        ({"set": {"allocate.rato": 0.1}}, r"unknown param 'allocate.rato'; did you mean 'allocate.ratio'"),
        ({"settings": {"a": {"score.criterion": "tailor"}}}, r"setting 'a': .*did you mean 'taylor'"),
        ({"settings": {"a": {"allocate.ratio": 2}}}, r"setting 'a': allocate.ratio"),
        ({"settings": {"a": {"slice.repair": "none", "slice.drift": 0.5}}}, r"setting 'a': slice.drift belongs"),
        ({"set": {SEED: 3}}, r"tokenize.seed is what `seeds` sets"),
        ({"settings": {"a..b": {}}}, "a name has letters"),
        ({"settings": {"a": {}, "b": {"allocate.ratio": 0.2}}}, "'a' and 'b' have the same params"),
    ],
)
def test_what_is_wrong_is_said_by_name(tmp_path, content, message):
    with pytest.raises(LibpruneError, match=message) as caught:
        comparison(tmp_path, **content)
    assert "made-up.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "\x00"])
def test_a_file_that_holds_no_comparison_is_refused(tmp_path, text):
    path = tmp_path / "made-up.yaml"
    path.write_text(text)
    with pytest.raises(LibpruneError, match=r"made-up\.yaml"):
        read_comparison(path, ROOT / "params.yaml")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LibpruneError, match=r"params\.yaml does not exist"):
        read_comparison(write_comparison(tmp_path), Path(tmp_path / "params.yaml"))
