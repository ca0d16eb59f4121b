"""The windows of a layout as one call: what is written, what is said, and what is refused before anything is drawn."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from libprune.engine.errors import LibpruneError
from libprune.models.folder import fingerprint
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, read_table, write_architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Tokenize
from libprune.texts.tokenize import tokenize_layout
from tests.support.measured import write_project
from tests.support.models import FAMILIES, VOCAB
from tests.support.tiny import write_encoder, write_model, write_text

SIZES = {"calibration_sequences": 4, "calibration_length": 8, "evaluation_windows": 3, "evaluation_length": 6}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A described GPT-2, whose positions end, with the tokenizer of the tiny Llama."""
    layout = Layout(write_project(FAMILIES["gpt2"](0), tmp_path) / "artifacts")
    write_model(tmp_path / "other")
    for path in (tmp_path / "other").glob("tokenizer*"):
        path.rename(layout.model / path.name)
    return described(layout)


def described(layout: Layout) -> Layout:
    """A layout whose description is of the files that its model has now."""
    write_architecture(layout, replace(read_architecture(layout), fingerprint=fingerprint(layout.model)))
    return layout


def test_both_texts_are_written_for_the_model_and_described(layout, tmp_path):
    text = str(write_text(tmp_path / "text.txt"))
    said = tokenize_layout(layout, Tokenize(text=text, **SIZES), "cpu", "float32")
    model = read_architecture(layout).fingerprint
    for path, shape in ((layout.calibration_tokens, (4, 8)), (layout.evaluation_tokens, (3, 6))):
        sequences, meta = read_tokens(path, model)
        assert tuple(sequences.ids.shape) == shape
        assert meta["model"] == model
    assert said[0].startswith("calibration")
    assert said[1].startswith("evaluation")


@pytest.mark.parametrize("sizes", [{}, {"repair_sequences": 4, "repair_length": 8}])
def test_the_repair_is_fitted_to_the_calibration_text_unless_asked_otherwise(layout, tmp_path, sizes):
    text = str(write_text(tmp_path / "text.txt"))
    said = tokenize_layout(layout, Tokenize(text=text, **SIZES | sizes), "cpu", "float32")
    calibration, fitted = (
        read_table(path, "tokenize")[1] for path in (layout.calibration_tokens, layout.repair_tokens)
    )
    assert fitted == calibration | {"calibration": calibration["tokens"]}
    assert len(said) == 2


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [({"repair_sequences": 7}, (7, 8)), ({"repair_length": 12}, (4, 12)), ({"repair_length": 6}, (4, 6))],
)
@pytest.mark.parametrize("text", ["read", "self"])
def test_the_repair_has_as_much_text_as_asked_and_the_other_texts_stay(layout, tmp_path, sizes, shape, text):
    """From the documents that calibration windows are drawn from, never from those of the evaluation text."""
    text = text if text == "self" else str(write_text(tmp_path / "text.txt"))
    others = (layout.calibration_tokens, layout.evaluation_tokens)
    tokenize_layout(layout, Tokenize(text=text, **SIZES), "cpu", "float32")
    before = [path.read_bytes() for path in others]
    said = tokenize_layout(layout, Tokenize(text=text, **SIZES | sizes), "cpu", "float32")
    assert [path.read_bytes() for path in others] == before
    sequences, meta = read_tokens(layout.repair_tokens, read_architecture(layout).fingerprint)
    known = read_table(layout.calibration_tokens, "tokenize")[1]
    assert tuple(sequences.ids.shape) == shape
    assert [meta[key] for key in ("calibration", "part", "seed")] == [known[key] for key in ("tokens", "part", "seed")]
    assert said[2].startswith(f"repair: {shape[0]} windows of {shape[1]} tokens")


def test_a_text_that_is_too_short_for_the_repair_is_told_by_what_asks_for_it(layout, tmp_path):
    layout.calibration_tokens.unlink()
    text = str(write_text(tmp_path / "text.txt"))
    asked = r"repair_sequences and tokenize\.repair_length ask for 99999 sequences of 8 tokens"
    with pytest.raises(LibpruneError, match=asked):
        tokenize_layout(layout, Tokenize(text=text, **SIZES | {"repair_sequences": 99_999}), "cpu", "float32")
    assert not layout.calibration_tokens.exists()


def test_windows_longer_than_the_models_positions_are_refused_and_nothing_is_written(layout, tmp_path):
    layout.calibration_tokens.unlink()
    text = str(write_text(tmp_path / "text.txt"))
    for key in ("evaluation_length", "repair_length"):
        with pytest.raises(LibpruneError, match=rf"tokenize\.{key} = 51"):
            tokenize_layout(layout, Tokenize(text=text, **SIZES | {key: 51}), "cpu", "float32")
    assert not layout.calibration_tokens.exists()


def test_each_sequence_begins_as_the_tokenizer_begins_a_text(layout, tmp_path):
    """Those that are read, and those that the model writes."""
    tokenizer = AutoTokenizer.from_pretrained(layout.model)
    tokenizer.bos_token, tokenizer.add_bos_token = "<eos>", True
    tokenizer.save_pretrained(layout.model)
    described(layout)
    model = read_architecture(layout).fingerprint
    for text in (str(write_text(tmp_path / "text.txt")), "self"):
        lengths = {"calibration_length": 24, "evaluation_length": 20}
        tokenize_layout(layout, Tokenize(text=text, **SIZES | lengths), "cpu", "float32")
        for path, length in ((layout.calibration_tokens, 24), (layout.evaluation_tokens, 20)):
            sequences, meta = read_tokens(path, model)
            assert meta["frame"] == {"before": ["<eos>"], "after": []}
            assert sequences.ids.shape[1] == length
            assert (sequences.ids == tokenizer.eos_token_id).tolist() == [[True] + [False] * (length - 1)] * len(
                sequences
            )


def test_a_token_without_an_embedding_stops_the_stage(layout, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(layout.model)
    tokenizer.add_tokens([f"new{number}" for number in range(VOCAB)])
    tokenizer.save_pretrained(layout.model)
    described(layout)
    layout.calibration_tokens.unlink()
    text = tmp_path / "text.txt"
    text.write_text(f"the cat new{VOCAB - 1}\n" * 3 + write_text(tmp_path / "usual.txt").read_text())
    sizes = SIZES | {"calibration_sequences": 100}
    with pytest.raises(
        LibpruneError, match=rf"has the token 'new{VOCAB - 1}' with the id \d+, but the model has .* 0 to 36 alone"
    ):
        tokenize_layout(layout, Tokenize(text=str(text), **sizes), "cpu", "float32")
    assert not layout.calibration_tokens.exists()


def test_a_model_that_tells_classes_apart_takes_one_text(tmp_path):
    layout = Layout(write_project(FAMILIES["bert_classifier"](0), tmp_path) / "artifacts")
    write_encoder(tmp_path / "other", FAMILIES["bert"])
    for path in (tmp_path / "other").glob("tokenizer*"):
        path.rename(layout.model / path.name)
    texts = [{"text": name, "share": 0.5} for name in ("a.csv", "b.csv")]
    params = Tokenize.model_validate({"text": texts, **SIZES})
    with pytest.raises(LibpruneError, match=r"tokenize\.text lists several texts, but .* takes one; name one"):
        tokenize_layout(described(layout), params, "cpu", "float32")
