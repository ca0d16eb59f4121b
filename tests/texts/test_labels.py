"""Labelled documents: drawn from disjoint texts, cut off where too long, and recorded as they were drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, BertConfig

from libprune.engine.errors import SourceError
from libprune.pipeline.sections import Tokenize
from libprune.texts.draw import Drawn
from libprune.texts.labels import draw_examples
from tests.support import tiny
from tests.support.caches import private_cache
from tests.support.models import FAMILIES

__all__ = ["private_cache"]

NAMES = ("bad", "fair", "good")
CONFIG = BertConfig(id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
LENGTH = 9


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny.write_encoder(tmp_path_factory.mktemp("model"), FAMILIES["bert"]))


def document(number: int) -> str:
    """A document of 1 to 12 words that no other number has."""
    rng = np.random.default_rng(number)
    return " ".join([*rng.choice(tiny.WORDS, rng.integers(1, 12)), tiny.WORDS[number % 17], tiny.WORDS[number // 17]])


DOCUMENTS = [document(number) for number in range(60)]


def write(path: Path, labels: list[object], first: int = 0) -> str:
    rows = ({"text": DOCUMENTS[first + i], "label": label} for i, label in enumerate(labels))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def draw(tokenizer, text: str, **changes: object) -> tuple[Drawn, Drawn]:
    sizes = {"calibration_sequences": 8, "evaluation_windows": 5}
    lengths = {"calibration_length": LENGTH, "evaluation_length": LENGTH}
    return draw_examples(Tokenize(text=text, **(sizes | lengths | changes)), tokenizer, CONFIG)


def test_sequences_are_the_documents_that_the_provenance_names_with_their_labels(tokenizer, tmp_path):
    text = write(tmp_path / "t.jsonl", [number % 3 for number in range(60)])
    for drawn in draw(tokenizer, text):
        sequences, how = drawn.sequences, drawn.provenance
        assert how["documents"] == how["available"] == len(drawn.documents)
        for row, number in enumerate(how["windows"]):
            ids = tokenizer(drawn.documents[number])["input_ids"]
            length = int(sequences.lengths[row])
            assert length == min(len(ids), LENGTH)
            assert sequences.ids[row, : length - 1].tolist() == ids[: length - 1]
            assert sequences.ids[row, length - 1] == tokenizer.sep_token_id
            assert sequences.targets[row] == DOCUMENTS.index(drawn.documents[number]) % 3
        assert how["cut"] == int((sequences.lengths == LENGTH).sum())
        assert f"{len(sequences)} labelled documents of up to " in drawn.sentence("this")


def test_documents_at_even_distances_are_held_out_of_a_text_in_the_order_of_its_labels(tokenizer, tmp_path):
    text = write(tmp_path / "t.jsonl", [number // 20 for number in range(60)])
    calibration, evaluation = draw(tokenizer, text, evaluation_share=0.2)
    assert not set(calibration.documents) & set(evaluation.documents)
    assert sorted(calibration.documents + evaluation.documents) == sorted(DOCUMENTS)
    places = [DOCUMENTS.index(document) for document in evaluation.documents]
    assert (len(places), places[0], places[-1]) == (12, 0, 59)
    assert np.ptp(np.diff(places)) <= 1
    assert set(evaluation.sequences.targets.tolist()) == {0, 1, 2}
    assert calibration.provenance["part"] == "48 documents"
    assert evaluation.provenance["part"] == "12 documents at even distances"


def test_the_seed_draws_the_calibration_documents_alone(tokenizer, tmp_path):
    text = write(tmp_path / "t.jsonl", [number % 3 for number in range(60)])
    (one, held_out), (two, again) = draw(tokenizer, text, seed=0), draw(tokenizer, text, seed=1)
    assert one.provenance["windows"] != two.provenance["windows"]
    assert held_out.provenance == again.provenance
    assert draw(tokenizer, text, seed=0)[0].provenance == one.provenance


def test_another_text_is_evaluated_on_as_a_whole(tokenizer, tmp_path):
    text = write(tmp_path / "t.jsonl", [0] * 40)
    other = write(tmp_path / "other.jsonl", [1] * 20, first=40)
    calibration, evaluation = draw(tokenizer, text, evaluation_text=other)
    assert (calibration.documents, evaluation.documents) == (DOCUMENTS[:40], DOCUMENTS[40:])
    assert evaluation.provenance["source"] == other
    copy = write(tmp_path / "copy.jsonl", [2] * 20)
    with pytest.raises(SourceError, match="100 % of the text to evaluate on"):
        draw(tokenizer, text, evaluation_text=copy)


@pytest.mark.parametrize("labels", [["bad", "good", "fair"], ["0", "2", "1"], [0.0, 2.0, 1.0]])
def test_a_label_is_a_number_of_any_type_or_a_name_of_the_config(tokenizer, tmp_path, labels):
    text = write(tmp_path / "t.jsonl", [labels[number % 3] for number in range(60)])
    for drawn in draw(tokenizer, text):
        expected = [(0, 2, 1)[DOCUMENTS.index(drawn.documents[i]) % 3] for i in drawn.provenance["windows"]]
        assert drawn.sequences.targets.tolist() == expected


@pytest.mark.parametrize("label", [3, -1, 0.5, "bland"])
def test_what_is_no_label_of_the_model_is_refused(tokenizer, tmp_path, label):
    text = write(tmp_path / "t.jsonl", [label] * 60)
    with pytest.raises(SourceError, match=r"holds .*, no label of the model \(0 to 2 or bad, fair, good\)"):
        draw(tokenizer, text)


def test_too_few_documents_and_texts_without_labels_are_refused(tokenizer, tmp_path):
    text = write(tmp_path / "t.jsonl", [0] * 10)
    with pytest.raises(SourceError, match=r"calibration needs 10 labelled documents, the text gives \d; use fewer"):
        draw(tokenizer, text, calibration_sequences=10)
    with pytest.raises(SourceError, match=r"evaluation needs 9 labelled documents, the text gives \d; use fewer"):
        draw(tokenizer, text, calibration_sequences=2, evaluation_windows=9)
    with pytest.raises(SourceError, match="'self' has no labels"):
        draw(tokenizer, "self")
    with pytest.raises(SourceError, match="is streamed; a model that tells classes apart needs a labelled text"):
        draw(tokenizer, text, streaming=True)
