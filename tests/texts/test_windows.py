"""Token windows: cut from documents, drawn, written and read back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from libprune.engine.errors import SourceError
from libprune.models.sequences import NO_TARGET
from libprune.texts import windows
from libprune.texts.windows import (
    MASKED_SHARE,
    Windows,
    cut_windows,
    draw,
    split_documents,
    spread,
    training_rows,
    with_masks,
)
from tests.support.models import FAMILIES, VOCAB
from tests.support.tiny import WORDS, write_encoder, write_model


@given(st.lists(st.integers(0, 9), min_size=2, max_size=60), st.floats(0.01, 0.99))
def test_the_documents_for_evaluation_are_the_last_and_no_others(numbers, share):
    documents = [f"{i} {number}" for i, number in enumerate(numbers)]
    expected = max(1, round(len(documents) * share))
    if expected == len(documents):
        with pytest.raises(SourceError, match="sets all of them apart for evaluation"):
            split_documents(documents, share)
        return
    calibration, evaluation = split_documents(documents, share)
    assert calibration + evaluation == documents
    assert not set(calibration) & set(evaluation)
    assert len(evaluation) == expected


def test_one_document_cannot_be_divided():
    with pytest.raises(SourceError, match=r"the text has 1 document\(s\), and .* or name tokenize\.evaluation_text"):
        split_documents(["all in one line"], 0.3)


IDS = np.arange(60).reshape(20, 3)
AVAILABLE = Windows(IDS, documents=7, skipped=0, tokens=62)


@given(st.integers(1, 20), st.integers(0, 1000))
def test_a_draw_is_seeded_without_replacement_and_in_the_texts_order(count, seed):
    drawn = draw(AVAILABLE, count, seed, "calibration")
    assert drawn.shape == (count,)
    assert (np.diff(drawn) > 0).all()
    assert set(drawn) <= set(range(20))
    np.testing.assert_array_equal(draw(AVAILABLE, count, seed, "calibration"), drawn)


def test_other_seeds_draw_other_windows():
    assert len({tuple(draw(AVAILABLE, 5, seed, "calibration")) for seed in range(20)}) > 15


@given(st.integers(1, 20))
def test_evaluation_windows_are_distinct_and_span_the_text(count):
    rows = spread(AVAILABLE, count, "evaluation")
    assert len(set(rows)) == count
    assert rows[0] == 0
    if count > 1:
        assert rows[-1] == 19
        assert np.ptp(np.diff(rows)) <= 1


CHOICES = [
    lambda windows, n: draw(windows, n, 0, "this"),
    lambda windows, n: spread(windows, n, "this"),
]


@pytest.mark.parametrize("choose", CHOICES)
def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(choose):
    with pytest.raises(SourceError, match=r"this needs 21 windows of 3 tokens, the text gives 20 \(60 tokens\); use"):
        choose(AVAILABLE, 21)


@pytest.mark.parametrize("choose", CHOICES)
def test_too_little_text_says_how_many_documents_were_too_short(choose):
    with pytest.raises(SourceError, match=r"gives 20 .*; 30 of its 40 documents are shorter than a window .*joined"):
        choose(Windows(IDS, documents=40, skipped=30, tokens=62), 21)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60), st.integers(0, 99))
def test_rows_to_train_on_are_drawn_without_the_last_ones_which_stand_behind_them(available, count, held_out, seed):
    if held_out >= available:
        with pytest.raises(SourceError, match=f"'t', gives {available} sequences, of which {held_out} .*; too bad; "):
            training_rows(available, count, held_out, seed, "t", "; too bad")
        return
    rows = training_rows(available, count, held_out, seed, "t")
    trained, last = rows[: len(rows) - held_out], rows[len(rows) - held_out :]
    assert last.tolist() == list(range(available - held_out, available))
    assert len(trained) == min(count, available - held_out)
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(training_rows(available, count, held_out, seed, "t"), rows)


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=40), st.integers(1, 40), st.integers(0, 99))
def test_rows_of_which_least_was_read_are_held_out_and_the_last_of_those(read, count, seed):
    available, held_out = len(read), len(read) // 2
    rows = training_rows(available, count, held_out, seed, "t", read=np.array(read))
    trained, last = rows[: len(rows) - held_out], rows[len(rows) - held_out :]
    assert sorted(last) == sorted(sorted(range(available), key=lambda row: (read[row], -row))[:held_out])
    assert len(trained) == min(count, available - held_out)
    assert len(set(rows.tolist())) == len(rows)
    assert (np.diff(trained) > 0).all()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Whole words, each one token."""
    return AutoTokenizer.from_pretrained(write_model(tmp_path_factory.mktemp("model")))


def ids_of(document: str) -> list[int]:
    return [WORDS.index(word) + 2 for word in document.split()]


texts = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join), min_size=1, max_size=12)


@given(texts, st.integers(1, 9))
def test_windows_of_joined_documents_are_all_tokens_in_order_but_the_last_few(tokenizer, documents, length):
    found = cut_windows(documents, tokenizer, length, "joined")
    expected = [token for document in documents for token in ids_of(document)]
    assert found.ids.dtype == np.int64
    assert found.ids.shape == (len(expected) // length, length)
    assert found.ids.flatten().tolist() == expected[: found.ids.size]
    assert (found.documents, found.skipped) == (len(documents), 0)


@given(texts, st.integers(1, 9))
def test_windows_of_documents_apart_are_those_of_each_document_by_itself(tokenizer, documents, length):
    found = cut_windows(documents, tokenizer, length, "apart")
    alone = [cut_windows([document], tokenizer, length, "joined").ids for document in documents]
    np.testing.assert_array_equal(found.ids, np.concatenate(alone))
    assert found.documents == len(documents)
    assert found.skipped == sum(len(ids_of(document)) < length for document in documents)


@given(texts, st.integers(1, 9), st.integers(8, 60), st.sampled_from(["joined", "apart"]))
def test_windows_do_not_depend_on_the_pieces_that_are_tokenized_at_once(tokenizer, documents, length, size, mode):
    whole = cut_windows(documents, tokenizer, length, mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_PIECE", size)
        cut = list(windows.pieces("\n\n".join(documents)))
        assert "".join(cut) == "\n\n".join(documents)
        assert all(0 < len(piece) <= size for piece in cut)
        np.testing.assert_array_equal(cut_windows(documents, tokenizer, length, mode).ids, whole.ids)


@pytest.fixture(scope="module")
def framing(tmp_path_factory):
    """A tokenizer that frames a text, and has a token for masks."""
    return AutoTokenizer.from_pretrained(write_encoder(tmp_path_factory.mktemp("encoder"), FAMILIES["bert"]))


@given(texts, st.integers(3, 9), st.sampled_from(["joined", "apart"]))
def test_each_window_carries_what_the_tokenizer_puts_around_a_text(framing, documents, length, mode):
    found = cut_windows(documents, framing, length, mode)
    encoded = framing(["\n\n".join(documents)] if mode == "joined" else documents, add_special_tokens=False)[
        "input_ids"
    ]
    width = length - 2
    expected = [
        [framing.cls_token_id, *ids[start : start + width], framing.sep_token_id]
        for ids in encoded
        for start in range(0, len(ids) - width + 1, width)
    ]
    assert found.ids.tolist() == expected
    assert found.tokens == sum(map(len, encoded))


@given(length=st.integers(5, 40), number=st.integers(1, 5), seed=st.integers(0, 9))
def test_masks_hide_what_is_asked_for_and_nothing_else(framing, length, number, seed):
    ids = np.random.default_rng(seed).integers(5, VOCAB, (number, length))
    ids[:, 0], ids[:, -1] = framing.cls_token_id, framing.sep_token_id
    found = with_masks(ids, framing, seed)
    asked = found.targets != NO_TARGET
    assert (asked.sum(1) == found.counted).all()
    assert found.counted == max(1, round(MASKED_SHARE * (length - 2)))
    assert (found.ids[asked] == framing.mask_token_id).all()
    assert (torch.where(asked, found.targets, found.ids) == torch.from_numpy(ids)).all()
    assert not asked[:, [0, -1]].any()
    assert (with_masks(ids, framing, seed).ids == found.ids).all()
