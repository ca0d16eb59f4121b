"""Params of a project: those of the repository with other values, and comments where they were."""

import re

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from libprune.engine.errors import ParamsError, SourceError
from libprune.engine.yaml_file import parsed
from libprune.pipeline.params import Params, validate_params
from libprune.project.params_file import changed, completed, params_text, replaced, settings
from tests.support.closure import ROOT
from tests.support.tiny import write_text

REPOSITORY = (ROOT / "params.yaml").read_text()
KEYS = [
    f"{section}.{key}" for section, keys in yaml.safe_load(REPOSITORY).items() if section != "preset" for key in keys
]


def comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.lstrip().startswith("#")]


def test_comments_and_all_other_values_stay():
    text = params_text({"prepare.model": "org/model", "tokenize.text": "a: b # c", "export.formats": ["gguf"]})
    assert comments(text) == comments(REPOSITORY)
    expected = yaml.safe_load(REPOSITORY)
    expected["prepare"]["model"], expected["tokenize"]["text"] = "org/model", "a: b # c"
    expected["export"]["formats"], expected["preset"] = ["gguf"], "balanced"
    expected["recover"]["method"] = "none"
    assert yaml.safe_load(text) == expected


SCALARS = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False) | st.text()


@effort(max_examples=10)
@given(values=st.dictionaries(st.sampled_from(KEYS), SCALARS | st.lists(SCALARS), max_size=4))
@example(values={"recover.learning_rate": 1e-05, "allocate.budgets": {"total": 2e-07}, "tokenize.column": "yes"})
def test_any_value_is_read_as_it_was_set(values):
    content = yaml.safe_load(replaced(REPOSITORY, values))
    for key, value in values.items():
        section, leaf = key.split(".")
        assert content[section][leaf] == value, "as DVC and other programs read it"
    assert comments(replaced(REPOSITORY, values)) == comments(REPOSITORY)


def test_without_changes_a_project_has_the_defaults_of_the_code():
    given = {"prepare.model": "org/model", "tokenize.text": "org/text"}
    plain = Params.model_validate({"prepare": {"model": "org/model"}, "tokenize": {"text": "org/text"}})
    assert validate_params(yaml.safe_load(params_text(given)), "here") == plain


@pytest.mark.parametrize("key", ["allocate.ratoi", "allocat.ratio", "preset.x", "allocate.ratio.x", "x"])
def test_an_unknown_key_is_refused(key):
    with pytest.raises(ParamsError, match=re.escape(f"{key}: params has no")):
        params_text({key: 1})


def test_a_value_out_of_range_is_refused():
    with pytest.raises(ParamsError, match=r"allocate\.ratio"):
        params_text({"allocate.ratio": 1.5})


@effort(max_examples=6)
@given(section=st.sampled_from([key.partition(".")[0] for key in KEYS]), key=st.sampled_from(KEYS))
def test_keys_that_a_file_lacks_come_back_and_no_value_is_lost(section, key):
    content = yaml.safe_load(params_text({"allocate.ratio": 0.35}))
    del content[key.partition(".")[0]][key.partition(".")[2]]
    content.pop(section)
    completed_content = yaml.safe_load(completed(yaml.safe_dump(content)))
    expected = yaml.safe_load(params_text({} if section == "allocate" else {"allocate.ratio": 0.35}))
    if key == "allocate.ratio":
        expected["allocate"]["ratio"] = 0.2
    assert completed_content == expected


def test_a_file_that_lacks_nothing_stays_to_the_letter():
    text = params_text({"allocate.ratio": 0.35})
    assert completed(text) == text


def test_truth_values_that_users_wrote_as_words_stay():
    text = params_text({"prepare.model": "org/model", "tokenize.text": "org/text"}).replace("speed: true", "speed: no")
    again = completed(changed(text, {"allocate.ratio": 0.3, "tokenize.column": "no"}))
    params = validate_params(parsed(again), "here")
    assert (params.export.speed, params.tokenize.column) == (False, "no")


def test_settings_are_values_of_yaml():
    words = ["allocate.ratio=0.3", "export.formats=[gguf, onnx]", "allocate.minutes=null", "prepare.model=a=b"]
    values = [0.3, ["gguf", "onnx"], None, "a=b"]
    assert [*settings(words).values()] == values
    assert settings(["recover.learning_rate=2e-5"]) == {"recover.learning_rate": 2e-5}


@pytest.mark.parametrize("rate", ["0.00002", "2e-5", "2.0e-05"])
def test_a_small_number_arrives_however_it_is_written(rate):
    given = {"prepare.model": "org/model", "tokenize.text": "org/text", **settings([f"recover.learning_rate={rate}"])}
    assert validate_params(parsed(params_text(given)), "here").recover.learning_rate == 2e-5


@pytest.mark.parametrize("word", ["allocate.ratio", "=3", "a=[", "a={b: "])
def test_a_setting_that_is_none_is_named(word):
    with pytest.raises(ParamsError, match=re.escape(repr(word))):
        settings([word])


def test_paths_become_absolute_and_must_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("one\ntwo\nthree\n")
    text = params_text({"tokenize.text": "text.txt", "prepare.model": "org/model"})
    again = changed(text, {"tokenize.evaluation_text": "text.txt", "tokenize.text": "org/text"})
    read = [yaml.safe_load(one) for one in (text, again)]
    assert [one["tokenize"]["text"] for one in read] == [str(tmp_path / "text.txt"), "org/text"]
    assert read[1]["tokenize"]["evaluation_text"] == str(tmp_path / "text.txt")
    assert read[1]["prepare"]["model"] == "org/model"
    with pytest.raises(SourceError, match=r"tokenize\.text: \./gone\.txt does not exist"):
        params_text({"tokenize.text": "./gone.txt"})


def test_what_cannot_be_is_found_before_anything_runs(tmp_path):
    """By what `libprune params` looks for; a table without a column of text is one example."""
    (tmp_path / "text.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ParamsError, match=r"^params: tokenize.text: text .* has no column 'text'; it has a, b"):
        params_text({"prepare.model": "org/model", "tokenize.text": str(tmp_path / "text.csv")})


def test_the_paths_of_several_texts_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "a.txt")
    texts = [{"text": "a.txt", "share": 0.5}, {"text": "self", "share": 0.5}]
    changes = {"prepare.model": "org/model", "tokenize.text": texts, "recover.text": texts}
    content = yaml.safe_load(params_text(changes))
    placed = [{"text": str(tmp_path / "a.txt"), "share": 0.5}, {"text": "self", "share": 0.5}]
    tupled = yaml.safe_load(params_text({**changes, "recover.text": tuple(texts)}))
    assert tupled["recover"]["text"] == placed
    assert content["tokenize"]["text"] == content["recover"]["text"] == placed
    with pytest.raises(SourceError, match=r"^tokenize\.text: .*nowhere\.txt does not exist"):
        params_text({"prepare.model": "org/model", "tokenize.text": [{"text": "nowhere.txt", "share": 1.0}]})


def test_the_path_of_the_text_whose_tokens_stay_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "a.txt")
    given = {"prepare.model": "org/model", "tokenize.text": "org/text", "prepare.vocabulary": {"text": "a.txt"}}
    text = params_text(given)
    assert yaml.safe_load(text)["prepare"]["vocabulary"] == {"text": str(tmp_path / "a.txt")}
    again = changed(text.replace(str(tmp_path / "a.txt"), "org/other"), {"prepare.vocabulary.text": "a.txt"})
    assert yaml.safe_load(again)["prepare"]["vocabulary"] == {"text": str(tmp_path / "a.txt")}
    with pytest.raises(SourceError, match=r"^prepare\.vocabulary: .*nowhere\.txt does not exist"):
        params_text(given | {"prepare.vocabulary": {"text": "nowhere.txt"}})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "prepare.vocabulary.text",
            r"no keys in prepare\.vocabulary, which is None; set it whole, such as prepare",
        ),
        ("tokenize.text.column", r"no keys in tokenize\.text, which is 'package:.*'; set it whole"),
    ],
)
def test_a_key_inside_of_what_has_no_keys_says_what_is_there(key, message):
    with pytest.raises(ParamsError, match=message):
        replaced(REPOSITORY, {key: "x"})
