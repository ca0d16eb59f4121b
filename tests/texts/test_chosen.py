"""Which texts the params choose; what is evaluated on is never calibrated on."""

from dataclasses import replace
from pathlib import Path

import pytest

from libprune.engine.errors import ParamsError, SourceError
from libprune.pipeline.sections import Tokenize, Vocabulary
from libprune.texts.chosen import (
    TextSource,
    calibration_source,
    evaluation_source,
    require_other_text,
    vocabulary_source,
)


def source(text: object, **keys: object) -> TextSource:
    return calibration_source(Tokenize(text=str(text), **keys))


def other(text: str, **keys: object) -> TextSource | None:
    return evaluation_source(Tokenize(text=text, **keys))


def test_without_an_evaluation_text_the_held_out_split_is_it(tmp_path):
    assert other("wikitext2") == replace(source("wikitext2"), split="test")
    assert other("wikitext2", evaluation_split="validation").split == "validation"
    assert other("owner/data", config="a", evaluation_split="dev") == replace(
        source("owner/data", config="a"), split="dev"
    )


def test_without_a_held_out_split_documents_are_set_apart(tmp_path):
    (tmp_path / "t.txt").write_text("a\n")
    assert other(str(tmp_path / "t.txt"), evaluation_split="test") is None
    assert other("owner/data") is None
    assert other("fineweb-edu") is None


def test_another_evaluation_text_has_keys_of_its_own():
    found = other("c4", evaluation_text="ptb", split="train", column="body", revision="b")
    assert found == replace(source("ptb"), split="test")
    assert other("c4", evaluation_text="fineweb-edu") == source("fineweb-edu")
    found = other("owner/one", config="a", column="body", evaluation_text="owner/two", evaluation_config="b")
    assert found == replace(source("owner/two", config="b", column="body"), split="test")
    assert other("ptb", evaluation_text="owner/two").column == "text"
    assert other("ptb", evaluation_text="owner/two", evaluation_column="body").column == "body"


def test_the_text_to_calibrate_on_is_refused_for_evaluation(tmp_path):
    one, two = str(tmp_path / "one.txt"), str(tmp_path / "two.txt")
    for path in (one, two):
        Path(path).write_text("a\n")
    require_other_text(source(one), source(two))
    for same in (one, f"{tmp_path}/../{tmp_path.name}/one.txt"):
        with pytest.raises(SourceError, match="is the text to calibrate on"):
            require_other_text(source(one), source(same, split="test"))


@pytest.mark.parametrize(
    ("split", "held_out", "apart"),
    [
        ("train", "test", True),
        ("train[:10%]", "test", True),
        ("train", "train", False),
        ("train", "train[90%:]", False),
        ("train[:9]+validation", "test + validation[5:]", False),
        ("all", "test", False),
    ],
)
def test_splits_of_a_data_set_that_may_overlap_are_refused(split, held_out, apart):
    pair = source("owner/data", split=split), source("owner/data", split=held_out)
    require_other_text(pair[0], replace(pair[1], config="other"))
    if apart:
        require_other_text(*pair)
        return
    with pytest.raises(SourceError, match=r"'owner/data', split .*; name another .*tokenize\.evaluation_split"):
        require_other_text(*pair)


def test_texts_without_an_end_or_by_the_model_are_refused():
    with pytest.raises(ParamsError, match=r"c4 has no end; set prepare\.vocabulary\.documents"):
        vocabulary_source(Vocabulary(text="c4"))
    with pytest.raises(ParamsError, match="self is written by the model"):
        vocabulary_source(Vocabulary(text="self"))
    source = vocabulary_source(Vocabulary(text="c4", documents=9, config="de"))
    assert (source.data_set, source.config, source.split) == ("allenai/c4", "de", "train")
