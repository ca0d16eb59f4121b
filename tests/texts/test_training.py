"""The text to train on: drawn in the shares asked for, and never from the documents that judge."""

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig

from libprune.engine.errors import SourceError
from libprune.models.sequences import NO_TARGET, Sequences
from libprune.pipeline.sections import Recover, Share, Tokenize
from libprune.texts import training
from libprune.texts.draw import draw_texts
from libprune.texts.labels import draw_examples
from libprune.texts.training import TrainingText, draw_training, originals, require_unseen, seen_documents, seen_share
from libprune.texts.windows import MASKED_SHARE, cut_windows
from tests.support import tiny
from tests.support.caches import private_cache
from tests.support.models import FAMILIES

__all__ = ["private_cache"]

LENGTH, TRAINED, HELD_OUT = 16, 20, 4
SIZES = {"calibration_sequences": 8, "calibration_length": 12, "evaluation_windows": 4, "evaluation_length": 20}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Whole words, each one token."""
    return AutoTokenizer.from_pretrained(tiny.write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def framing(tmp_path_factory):
    """A tokenizer that frames a text, and has a token for masks."""
    folder = tmp_path_factory.mktemp("encoder")
    return AutoTokenizer.from_pretrained(tiny.write_encoder(folder, FAMILIES["bert"]))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """400 documents of 24 words."""
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt", documents=400)


def no_sample(count: int, length: int, seed: int | None) -> Any:
    raise AssertionError("no text is to be written")


def draw(
    tokenizer: Any,
    tokenize: Tokenize,
    head: str = "causal_lm",
    sample: Callable[..., Any] = no_sample,
    read: Sequence[np.ndarray] = (),
    **recover: Any,
) -> TrainingText:
    usual = {"method": "full", "length": LENGTH, "tokens": LENGTH * TRAINED, "held_out": HELD_OUT}
    return draw_training(tokenize, Recover(**(usual | recover)), tokenizer, LABELS, head, sample, read)


def settings(text: Path | str, **changes: Any) -> Tokenize:
    return Tokenize(text=str(text), **(SIZES | changes))


def tokens_of(tokenizer: Any, documents: Sequence[str]) -> list[np.ndarray]:
    return [np.array(tokenizer(document, add_special_tokens=False)["input_ids"]) for document in documents]


def is_part(row: Sequence[int], documents: Sequence[np.ndarray]) -> bool:
    """Whether a row of tokens stands in one of the documents."""
    words = f" {' '.join(map(str, row))} "
    return any(words in f" {' '.join(map(str, document))} " for document in documents)


# The documents of the calibration text


WAYS: dict[str, dict[str, Any]] = {
    "joined": {},
    "apart": {"documents": "apart"},
    "a larger share": {"evaluation_share": 0.7},
    "another text": {"evaluation_text": "other.txt"},
    "a stream": {"streaming": True, "documents": "apart"},
    "a stream, joined": {"streaming": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_text_that_is_not_named_is_what_calibration_windows_are_drawn_from(tokenizer, text, tmp_path, way):
    keys = dict(WAYS[way])
    if "evaluation_text" in keys:
        other = tmp_path / keys["evaluation_text"]
        other.write_text("\n".join(reversed(tiny.WORDS)) + "\n" + "".join(random.Random(9).choices("ab \n", k=900)))
        keys["evaluation_text"] = str(other)
    tokenize = settings(text, **keys)
    calibration, evaluation = draw_texts(tokenize, tokenizer, no_sample)
    found = draw(tokenizer, tokenize)
    (how,) = found.sources
    assert (how["part"], how["share"], how["seed"]) == (calibration.provenance["part"], 1, 0)
    assert (len(found.sequences), found.held_out, found.sequences.length) == (TRAINED + HELD_OUT, HELD_OUT, LENGTH)
    assert seen_share(found.rows, tokens_of(tokenizer, evaluation.documents)) == 0
    if "stream" not in way:
        allowed = tokens_of(tokenizer, calibration.documents)
        allowed = [np.concatenate(allowed)] if keys.get("documents") != "apart" else allowed
        assert all(is_part(row, allowed) for row in found.sequences.ids.tolist())
    require_unseen(found, evaluation.sequences, tokenizer)


def test_the_name_of_the_calibration_text_means_its_documents_too(tokenizer, text):
    tokenize = settings(text)
    expected = draw(tokenizer, tokenize)
    listed = (Share(text=str(text), share=1.0, column="text"),)
    column = tokenize.model_copy(update={"column": "text"})
    for found in (draw(tokenizer, tokenize, text=str(text)), draw(tokenizer, column, text=listed)):
        assert torch.equal(found.sequences.ids, expected.sequences.ids)
        assert found.sources[0]["part"] == expected.sources[0]["part"] == "the first 280 documents"


def test_the_seed_chooses_the_windows_and_nothing_else_does(tokenizer, text):
    tokenize = settings(text)
    first, again, other = (draw(tokenizer, tokenize, seed=seed).sequences.ids for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first[:-HELD_OUT], other[:-HELD_OUT])
    assert torch.equal(first[-HELD_OUT:], other[-HELD_OUT:])
    changed = settings(text, seed=5, calibration_sequences=3, calibration_length=30)
    assert torch.equal(draw(tokenizer, changed).sequences.ids, first)


@pytest.mark.parametrize("documents", ["joined", "apart"])
def test_the_last_windows_are_held_out_and_none_of_them_is_trained_on(tokenizer, text, documents):
    found = draw(tokenizer, settings(text, documents=documents))
    available = cut_windows(text.read_text().splitlines()[:280], tokenizer, LENGTH, documents)
    windows = found.sources[0]["windows"]
    number = found.sources[0]["available"]
    assert number == len(available.ids)
    assert windows[-HELD_OUT:] == list(range(number - HELD_OUT, number))
    assert len(set(windows)) == TRAINED + HELD_OUT
    np.testing.assert_array_equal(found.sequences.ids, available.ids[windows])


@pytest.mark.parametrize("documents", ["joined", "apart"])
@pytest.mark.parametrize("seed", range(3))
def test_windows_that_the_repair_has_not_read_are_held_out(tokenizer, text, documents, seed):
    """The windows that were read are of another length, so that they cover others in part."""
    tokenize = settings(text, documents=documents, calibration_length=20, calibration_sequences=150, seed=seed)
    calibration, _ = draw_texts(tokenize, tokenizer, no_sample)
    read = originals(calibration.sequences)
    found = draw(tokenizer, tokenize, read=read)
    held_out = [row.numpy() for row in found.sequences.ids[-HELD_OUT:]]
    assert seen_share(read, held_out) == found.read_before == 0
    assert "too low" not in found.sentence()
    assert len(set(found.sources[0]["windows"])) == TRAINED + HELD_OUT


def test_the_last_windows_of_which_least_was_read_are_held_out(tokenizer, text):
    last = draw(tokenizer, settings(text))
    read = originals(last.sequences[-HELD_OUT:])
    found = draw(tokenizer, settings(text), read=read)
    windows = [draws.sources[0]["windows"][-HELD_OUT:] for draws in (last, found)]
    assert windows == [[416, 417, 418, 419], [412, 413, 414, 415]]


def test_where_all_was_read_the_last_windows_are_held_out_and_it_is_said(tokenizer, text):
    tokenize = settings(text)
    everything = [np.array(row) for row in cut_windows(text.read_text().splitlines(), tokenizer, 24, "joined").ids]
    found, plain = draw(tokenizer, tokenize, read=everything), draw(tokenizer, tokenize)
    assert found.read_before > 0.9
    assert f"have read {100 * found.read_before:.0f} % of the held-out tokens" in found.sentence()
    assert len(found.sequences) == len(plain.sequences)


def test_a_framing_tokenizer_and_masks_hide_nothing_that_was_read(framing, text):
    tokenize = settings(text, calibration_sequences=200)
    calibration, _ = draw_texts(tokenize, framing, no_sample, "masked_lm")
    read = originals(calibration.sequences)
    found = draw(framing, tokenize, "masked_lm", read=read)
    assert seen_share(read, originals(found.sequences[-HELD_OUT:])) == found.read_before == 0


def test_a_text_that_gives_fewer_windows_gives_all_it_has(tokenizer, text):
    found = draw(tokenizer, settings(text), tokens=10**6)
    assert len(found.sequences) == found.sources[0]["available"] == 420
    assert "416 sequences of 16 tokens to train on and 4 held out" in found.sentence()


def test_a_stream_is_read_far_enough_for_those_that_are_held_out(tokenizer, text):
    found = draw(tokenizer, settings(text, streaming=True), tokens=LENGTH, held_out=30)
    assert len(found.sequences) == 31


# Another text, and several


def write_of(path: Path, words: Sequence[str], documents: int = 40) -> str:
    """A text of some words alone, by which its windows are known."""
    rng = random.Random(len(words[0]))
    path.write_text("".join(" ".join(rng.choices(words, k=24)) + "\n" for _ in range(documents)))
    return str(path)


@pytest.fixture
def three(tmp_path) -> list[str]:
    return [write_of(tmp_path / f"{number}.txt", tiny.WORDS[5 * number : 5 * number + 5]) for number in range(3)]


def of_texts(rows: torch.Tensor) -> list[int]:
    """The number of the text that each row is of."""
    assert ((rows - 2) // 5 == ((rows - 2) // 5)[:, :1]).all()
    return ((rows[:, 0] - 2) // 5).tolist()


@pytest.mark.parametrize("shares", [(0.5, 0.25, 0.25), (0.34, 0.33, 0.33), (0.05, 0.05, 0.9), (1 / 3, 1 / 3, 1 / 3)])
@pytest.mark.parametrize(("wanted", "held_out"), [(20, 4), (41, 10), (7, 3)])
def test_shares_of_several_texts_are_exact_to_rounding(tokenizer, text, three, shares, wanted, held_out):
    texts = tuple(Share(text=name, share=share) for name, share in zip(three, shares, strict=True))
    found = draw(tokenizer, settings(text), text=texts, tokens=LENGTH * wanted, held_out=held_out)
    trained, last = found.sequences.ids[: -found.held_out], found.sequences.ids[-found.held_out :]
    for rows, number in ((trained, wanted), (last, held_out)):
        counts = [of_texts(rows).count(text) for text in range(3)]
        assert all(count == 1 or abs(count - share * number) < 1 for count, share in zip(counts, shares, strict=True))
        assert sum(counts) == number or 1 in counts
    assert [how["source"] for how in found.sources] == three
    assert [how["share"] for how in found.sources] == list(shares)
    assert found.sources[0]["part"] == "all documents"


def test_several_texts_are_named_with_their_shares(tokenizer, text, three):
    texts = tuple(Share(text=name, share=share) for name, share in zip(three, (0.125, 0.5, 0.375), strict=True))
    found = draw(tokenizer, settings(text), text=texts)
    assert found.names == f"12.5 % {three[0]}, 50 % {three[1]}, 37.5 % {three[2]}"
    assert f"from {found.names}; read were " in found.sentence()
    assert found.sentence().count("read were") == 3
    assert draw(tokenizer, settings(text)).names == str(text)


def test_a_small_text_is_repeated_so_that_its_share_holds(tokenizer, text, three, tmp_path):
    small = write_of(tmp_path / "small.txt", tiny.WORDS[:5], documents=4)  # six windows
    texts = (Share(text=small, share=0.5), Share(text=three[1], share=0.5))
    found = draw(tokenizer, settings(text), text=texts, tokens=LENGTH * 40)
    numbers = of_texts(found.sequences.ids)
    assert [numbers[:40].count(number) for number in (0, 1)] == [20, 20]
    assert numbers[40:] == [0, 0, 1, 1]
    first = {row.numpy().tobytes() for row in found.sequences.ids[:20]}
    assert len(first) == 4
    assert not first & {row.numpy().tobytes() for row in found.sequences.ids[40:]}


def test_a_text_has_keys_of_its_own(tokenizer, text, tmp_path):
    rows = [{"body": line} for line in text.read_text().splitlines()[:50]]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibration = settings(text, split="none", config="none", revision="none", streaming=True)
    named = (Share(text=str(tmp_path / "t.jsonl"), share=1.0, column="body"),)
    found = draw(tokenizer, calibration, text=named)
    assert (found.sources[0]["column"], found.sources[0]["streaming"]) == ("body", False)
    with pytest.raises(SourceError, match="has no column 'text'; it has body"):
        draw(tokenizer, calibration, text=str(tmp_path / "t.jsonl"))


def test_the_part_of_the_calibration_text_goes_together_with_others(tokenizer, text, three):
    texts = (Share(text=str(text), share=0.5), Share(text=three[0], share=0.5))
    found = draw(tokenizer, settings(text), text=texts)
    assert [how["part"] for how in found.sources] == ["the first 280 documents", "all documents"]


def test_a_text_of_the_hub_that_cannot_be_reached_is_named(tokenizer, text):
    with pytest.raises(SourceError, match="text 'wikitext2' cannot be loaded: "):
        draw(tokenizer, settings(text), text="wikitext2")


def test_without_a_text_the_documents_of_all_calibration_texts_are_trained_on(tokenizer, text, three):
    texts = tuple(Share(text=name, share=share) for name, share in zip(three, (0.5, 0.25, 0.25), strict=True))
    tokenize = Tokenize(text=texts, **(SIZES | {"calibration_sequences": 12}))
    _, evaluation = draw_texts(tokenize, tokenizer, no_sample)
    for found in (draw(tokenizer, tokenize), draw(tokenizer, tokenize, text=texts)):
        assert [how["part"] for how in found.sources] == ["the first 28 documents"] * 3
        assert [how["share"] for how in found.sources] == [0.5, 0.25, 0.25]
        assert [of_texts(found.sequences.ids[:TRAINED]).count(text) for text in range(3)] == [10, 5, 5]
        require_unseen(found, evaluation.sequences, tokenizer)
    one = draw(tokenizer, tokenize, text=three[1])
    assert [how["part"] for how in one.sources] == ["the first 28 documents"], "its last documents judge"
    other = draw(tokenizer, tokenize, text=str(text))
    assert [how["part"] for how in other.sources] == ["all documents"]


def test_columns_of_one_file_are_texts_of_their_own(tokenizer, text, tmp_path):
    """Each is known by all of its keys, those that are null among them."""
    rows = [{"text": line, "body": line.upper()} for line in text.read_text().splitlines()]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = tuple(Share(text=str(tmp_path / "t.jsonl"), share=0.5, column=column) for column in ("body", None))
    for order in (texts, texts[::-1]):
        tokenize = Tokenize(text=order, **SIZES)
        for found in (draw(tokenizer, tokenize), draw(tokenizer, tokenize, text=order)):
            assert [how["column"] for how in found.sources] == [one.column or "text" for one in order]


def test_a_stream_among_several_calibration_texts_keeps_its_evaluation_documents(tokenizer, three):
    texts = (Share(text=three[0], share=0.5, streaming=True), Share(text=three[1], share=0.5))
    tokenize = Tokenize(text=texts, **SIZES)
    calibration, evaluation = draw_texts(tokenize, tokenizer, no_sample)
    found = draw(tokenizer, tokenize)
    assert found.sources[0]["part"] == calibration.parts[0].provenance["part"] == "documents after the first 4"
    require_unseen(found, evaluation.sequences, tokenizer)


# Text that the model writes


def counting(count: int, length: int, seed: int | None) -> tuple[np.ndarray, dict[str, Any]]:
    return np.arange(count * length).reshape(count, length) % 17 + 2, {"temperature": 1.0, "seed given": seed}


def test_the_model_writes_what_is_asked_for_and_what_is_held_out(tokenizer):
    written, _ = counting(TRAINED + HELD_OUT, LENGTH, 3)
    for tokenize, named in ((settings("self"), None), (settings("nowhere.txt"), "self")):
        found = draw(tokenizer, tokenize, sample=counting, text=named, seed=3)
        np.testing.assert_array_equal(found.sequences.ids, written)
        (how,) = found.sources
        assert (how["source"], how["mode"], how["seed"], how["seed given"]) == ("self", "sampled", 3, 3)


def test_written_and_read_text_go_together(tokenizer, text, three):
    texts = (Share(text="self", share=0.5), Share(text=three[2], share=0.5))
    found = draw(tokenizer, settings(text), sample=counting, text=texts)
    assert found.sequences.ids.shape == (TRAINED + HELD_OUT, LENGTH)
    assert [how["mode"] for how in found.sources] == ["sampled", "joined"]
    assert set(of_texts(found.sequences.ids[10:20])) == {2}


# Conversations


def write_conversations(path: Path, lines: Sequence[str]) -> str:
    """A conversation a line: its first half asks, its second half answers."""
    chats = [
        [{"role": "user", "content": line[: len(line) // 2]}, {"role": "assistant", "content": line[len(line) // 2 :]}]
        for line in lines
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_are_written_by_the_template_of_the_tokenizer(tokenizer, text, tmp_path, streaming):
    """The template of the tiny model puts the contents one behind the other."""
    lines = text.read_text().splitlines()[:60]
    name = write_conversations(tmp_path / "chat.jsonl", lines)
    share = Share(text=name, share=1.0, column="messages", streaming=streaming)
    found = draw(tokenizer, settings(text, documents="apart"), text=(share,))
    allowed = tokens_of(tokenizer, lines)
    assert all(is_part(row, allowed) for row in found.sequences.ids.tolist())
    if not streaming:
        np.testing.assert_array_equal(found.rows[0], cut_windows(lines, tokenizer, LENGTH, "apart").ids.flatten())


# Masked tokens and labels


LABELS = BertConfig(num_labels=2)


def test_windows_of_a_model_of_masked_tokens_are_framed_and_masked(framing, text):
    found = draw(framing, settings(text), head="masked_lm")
    sequences = found.sequences
    assert (sequences.ids[:, 0] == framing.cls_token_id).all()
    assert (sequences.ids[:, -1] == framing.sep_token_id).all()
    assert sequences.targets is not None
    masked = sequences.targets != NO_TARGET
    assert (masked.sum(1) == round(MASKED_SHARE * (LENGTH - 2))).all()
    assert (sequences.ids[masked] == framing.mask_token_id).all()
    available = cut_windows(text.read_text().splitlines()[:280], framing, LENGTH, "joined")
    np.testing.assert_array_equal(np.stack(originals(sequences)), available.ids[found.sources[0]["windows"]])


def test_several_texts_of_a_model_of_masked_tokens_keep_their_targets(framing, text, three):
    texts = tuple(Share(text=name, share=0.5) for name in three[:2])
    sequences = draw(framing, settings(text), head="masked_lm", text=texts).sequences
    assert sequences.targets is not None
    assert sequences.targets.shape == sequences.ids.shape == (TRAINED + HELD_OUT, LENGTH)
    inner = torch.from_numpy(np.stack(originals(sequences)))[:, 1:-1] - len(framing.all_special_tokens)
    assert (inner // 5)[:, 0].tolist() == [0] * 10 + [1] * 10 + [0] * 2 + [1] * 2
    assert (inner // 5 == (inner // 5)[:, :1]).all()


def write_labelled(path: Path, documents: Sequence[str]) -> str:
    rows = ({"text": document, "label": number % 2} for number, document in enumerate(documents))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def labelled(text, tmp_path) -> str:
    """120 documents of 2 to 24 words, no two alike."""
    words = [line.split() for line in text.read_text().splitlines()[:120]]
    documents = [" ".join([*line[: number % 23 + 1], f"{number}"]) for number, line in enumerate(words)]
    return write_labelled(tmp_path / "labelled.jsonl", documents)


CLASSES = "sequence_classification"


def test_labelled_documents_are_those_that_judge_nothing(framing, labelled):
    tokenize = settings(labelled, evaluation_length=10)
    _, evaluation = draw_examples(tokenize, framing, LABELS)
    found = draw(framing, tokenize, head=CLASSES)
    assert (len(found.sequences), found.held_out) == (TRAINED + HELD_OUT, HELD_OUT)
    assert found.sequences.lengths is not None
    assert found.sources[0]["part"] == "84 documents"
    assert len(found.rows) == 84
    assert "of up to 16 tokens" in found.sentence()
    windows = found.sources[0]["windows"]
    assert len(set(windows)) == TRAINED + HELD_OUT
    assert sorted(windows) != windows, "not the first and last ones: a text may be in the order of its labels"
    assert set(found.sequences.targets[-HELD_OUT:].tolist()) <= {0, 1}
    whole = draw(framing, tokenize, head=CLASSES, text=shutil.copyfile(labelled, f"{labelled}.copy.jsonl"))
    assert (whole.sources[0]["part"], len(whole.rows)) == ("all documents", 120)
    with pytest.raises(SourceError, match="100 % of the text that the models are evaluated on"):
        require_unseen(whole, evaluation.sequences, framing)


def test_documents_of_a_labelled_text_are_all_trained_on_if_another_one_judges(framing, labelled):
    found = draw(framing, settings(labelled, evaluation_text="elsewhere.jsonl"), head=CLASSES)
    assert found.sources[0]["part"] == "all documents"


def test_short_labelled_documents_that_begin_alike_are_not_the_same(framing, labelled, tmp_path):
    """Documents of one or two words hold runs that any text holds; they count only as a whole."""
    tokenize = settings(labelled, evaluation_length=10)
    judged = draw_examples(tokenize, framing, LABELS)[1].sequences
    found = draw(framing, tokenize, head=CLASSES)
    words = [[word, other] for word in tiny.WORDS[:9] for other in tiny.WORDS[9:]]
    short = Sequences(
        torch.tensor([framing(" ".join(pair))["input_ids"] for pair in words]),
        torch.zeros(len(words), dtype=torch.long),
        torch.full((len(words),), 4),
    )
    require_unseen(found, short, framing)
    require_unseen(found, judged, framing)


def test_labelled_documents_that_were_read_are_not_held_out(framing, labelled):
    tokenize = settings(labelled, calibration_sequences=50)
    read = originals(draw_examples(tokenize, framing, LABELS)[0].sequences)
    found = draw(framing, tokenize, CLASSES, read=read, length=16)
    kept = max(map(len, read))
    begun = {row[:-1].tobytes() for row in read}  # the last token stands behind every text
    assert not any(row[: kept - 1].tobytes() in begun for row in originals(found.sequences[-HELD_OUT:]))
    assert found.read_before == 0
    more = draw(framing, tokenize, CLASSES, read=read, length=16, held_out=60)
    assert more.read_before == pytest.approx(26 / 60)  # 34 of 84 documents were not read


def test_a_model_that_tells_classes_apart_takes_one_text(framing, labelled):
    one = Share(text=labelled, share=0.5)
    with pytest.raises(SourceError, match=r"recover\.text lists several texts, but .* takes one; name one"):
        draw(framing, settings(labelled), head=CLASSES, text=(one, Share(text="another", share=0.5)))
    with pytest.raises(SourceError, match="'self' has no labels"):
        draw(framing, settings(labelled), head=CLASSES, text="self")


# Too little


def test_too_little_text_says_whose_and_how_much(tokenizer, framing, text, labelled, tmp_path):
    with pytest.raises(SourceError, match=r"train on, '.*text\.txt', gives 420 sequences, of which 420 are held out"):
        draw(tokenizer, settings(text), held_out=420)
    with pytest.raises(SourceError, match=r"gives 0 sequences, .*; 280 of its 280 documents are shorter than a window"):
        draw(tokenizer, settings(text, documents="apart"), length=30)
    with pytest.raises(SourceError, match=r"labelled\.jsonl', gives 84 sequences, of which 90 are held out"):
        draw(framing, settings(labelled), head=CLASSES, held_out=90)
    one = write_of(tmp_path / "one.txt", tiny.WORDS[:3], documents=1)
    with pytest.raises(SourceError, match=r"the text has 1 document\(s\)"):
        draw(tokenizer, settings(one))
    with pytest.raises(SourceError, match=r"windows of 2 tokens have no room .*recover\.length"):
        draw(framing, settings(text), head="masked_lm", length=2)


# What judges is not trained on


def evaluated(tokenizer: Any, tokenize: Tokenize, head: str = "causal_lm") -> Sequences:
    return draw_texts(tokenize, tokenizer, no_sample, head)[1].sequences


@pytest.mark.parametrize("head", ["causal_lm", "masked_lm"])
def test_a_copy_is_refused_even_if_few_of_its_windows_are_drawn(tokenizer, framing, text, tmp_path, head):
    reader = tokenizer if head == "causal_lm" else framing
    copy = shutil.copyfile(text, tmp_path / "copy.txt")
    judged = evaluated(reader, settings(text, evaluation_windows=100), head)
    found = draw(reader, settings(text), head=head, text=str(copy), tokens=LENGTH, held_out=1)
    assert len(found.sequences) == 2
    with pytest.raises(SourceError, match=r"(99|100) % of the text .* in the text to train on \(.*copy\.txt\); name"):
        require_unseen(found, judged, reader)


def test_the_text_that_judges_is_refused_by_any_path_and_among_several(tokenizer, text, three, tmp_path):
    tokenize = settings(three[0], evaluation_text=str(text))
    judged = evaluated(tokenizer, tokenize)
    path = f"{text.parent}/../{text.parent.name}/{text.name}"
    for named in (path, (Share(text=three[1], share=0.9), Share(text=path, share=0.1))):
        with pytest.raises(SourceError, match="100 % of the text that the models are evaluated on"):
            require_unseen(draw(tokenizer, tokenize, text=named), judged, tokenizer)
    require_unseen(draw(tokenizer, tokenize, text=three[1]), judged, tokenizer)


def test_a_few_shared_documents_do_no_harm(tokenizer, text, tmp_path):
    lines = text.read_text().splitlines()
    (tmp_path / "t.txt").write_text("\n".join([*lines[:200], *lines[-4:]]))
    judged = evaluated(tokenizer, settings(text, evaluation_windows=72))
    require_unseen(draw(tokenizer, settings(text), text=str(tmp_path / "t.txt")), judged, tokenizer)


# How texts are compared


rows_of = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=90).map(np.array), min_size=1, max_size=4)


@given(rows_of)
def test_a_text_is_wholly_in_itself(rows):
    assert seen_share(rows, rows) == 1
    assert seen_documents(rows, rows) == 1


def by_hand(rows: Sequence[np.ndarray], judged: Sequence[np.ndarray], run: int) -> float:
    """The share of `seen_share`, by comparing runs themselves."""

    def runs(row: np.ndarray) -> list[tuple[int, ...]]:
        return [tuple(row[start : start + run].tolist()) for start in range(len(row) - run + 1)]

    known, all_runs = {one for row in rows for one in runs(row)}, [one for row in judged for one in runs(row)]
    once = {one for one in all_runs if all_runs.count(one) == 1} or set(all_runs)
    counts = []
    for chosen in (once & known, once):
        inside = [{at + i for at, one in enumerate(runs(row)) if one in chosen for i in range(run)} for row in judged]
        counts.append(sum(map(len, inside)))
    return counts[0] / counts[1]


@given(rows_of, rows_of, st.integers(1, 6))
def test_the_share_is_what_comparing_the_runs_themselves_gives(rows, judged, run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "RUN", run)
        length = min(run, max(map(len, rows)), max(map(len, judged)))
        assert seen_share(rows, judged) == pytest.approx(by_hand(rows, judged, length))


@given(st.integers(0, 99), st.integers(0, 900), st.integers(32, 100))
def test_a_part_of_a_text_is_found_wherever_it_begins(seed, start, length):
    text = np.random.default_rng(seed).integers(0, 5000, 1000)
    other = np.random.default_rng(seed + 1000).integers(0, 5000, 1000)
    assert seen_share([text], [text[start : start + length]]) == 1
    assert seen_share([other], [text]) == 0


@given(st.integers(0, 99), st.integers(50, 450))
def test_a_partial_overlap_gives_about_its_share(seed, shared):
    text, mine = np.random.default_rng(seed).integers(0, 5000, (2, 500))
    mixed = np.concatenate([text[:shared], mine[shared:]])
    assert seen_share([text], [mixed]) == pytest.approx(shared / 500, abs=0.01)
    assert seen_share([text], [text[:shared], mine]) == pytest.approx(shared / (shared + 500), abs=0.01)


PATTERNS = [
    np.resize(pattern, 300)
    for pattern in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 0, 1], [0, 1, 1], [0, 1, 2], [2, 1, 0], range(40), [256])
]


def test_simple_patterns_are_told_apart():
    """Constant and periodic texts, whose hashes would be alike if the hash were a plain sum."""
    for number, pattern in enumerate(PATTERNS):
        others = [other for index, other in enumerate(PATTERNS) if index != number]
        assert seen_share(others, [pattern]) == 0
        assert seen_share([pattern[7:200]], [pattern]) == 1
    tokens = np.arange(50_000)
    assert len(np.unique(training._runs(np.repeat(tokens, 32), 32)[::32])) == len(tokens)


def test_what_stands_before_every_conversation_makes_no_two_texts_the_same():
    rng = np.random.default_rng(0)
    instruction = rng.integers(0, 5000, 60)

    def conversations() -> np.ndarray:
        return np.concatenate([np.concatenate([instruction, rng.integers(0, 5000, 100)]) for _ in range(64)])

    text, judged = conversations(), list(conversations().reshape(20, 512))
    assert seen_share([text], judged) < 0.01, "windows cut a few of the instructions"
    assert seen_share([text, *judged], judged) == 1


def test_sequences_shorter_than_a_run_are_compared_as_they_are():
    text = np.random.default_rng(0).integers(0, 5000, 1000)
    assert seen_share([text], [text[5:13], text[100:108]]) == 1
    assert seen_share([text[5:13], text[100:108]], [text]) == pytest.approx(0.016)
    assert seen_share([text], [text[5:13] + 5000]) == 0
    assert seen_share([text], [text[:0]]) == 0


def test_a_million_tokens_are_compared_in_seconds():
    text = np.random.default_rng(0).integers(0, 50_000, 1_000_000)
    start = time.process_time()
    assert seen_share([text], list(text[1000:9192].reshape(16, 512))) == 1
    assert time.process_time() - start < 10
