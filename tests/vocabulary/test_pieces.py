"""Which pieces a text needs, by the kind of the tokenizer."""

import json
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from libprune.engine.errors import SourceError
from libprune.vocabulary.pieces import Pieces, pieces_of
from tests.support.vocabularies import BYTES, KINDS, SENTENCES, trained


def rules(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())


def merged(merges: list[tuple[str, str]], **options: object) -> Tokenizer:
    """BPE on characters; the pieces in the order of their characters and merges."""
    vocab: dict[str, int] = {}
    for piece in [*dict.fromkeys("".join(a + b for a, b in merges)), *(a + b for a, b in merges)]:
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def texts(pieces: Pieces, ids: set[int]) -> set[str]:
    return {pieces.texts[index] for index in ids}


def without(tokenizer: Tokenizer, kept: set[int]) -> Tokenizer:
    """The tokenizer with the kept pieces alone."""
    whole = rules(tokenizer)
    new = {old: place for place, old in enumerate(sorted(kept))}
    return Tokenizer.from_str(json.dumps(whole | {"model": pieces_of(whole).trimmed(new)}))


class TestMerged:
    def test_a_piece_needs_those_that_it_is_merged_from_and_no_others(self):
        tokenizer = merged([("c", "d"), ("a", "b"), ("ab", "cd"), ("b", "cd"), ("a", "bcd")])
        pieces = pieces_of(rules(tokenizer))
        (whole,) = tokenizer.encode("abcd").ids
        assert texts(pieces, pieces.closed({whole})) == {"a", "b", "c", "d", "ab", "cd", "abcd"}

    def test_a_whole_word_needs_nothing_where_merges_are_passed_over(self):
        tokenizer = merged([("a", "b"), ("ab", "c")], ignore_merges=True)
        tokenizer.model = models.BPE(
            {**tokenizer.get_vocab(), "xyz": 5, "x": 6, "y": 7, "z": 8}, [("a", "b"), ("ab", "c")], ignore_merges=True
        )
        pieces = pieces_of(rules(tokenizer))
        assert tokenizer.encode("xyz").ids == [5]
        assert 5 in pieces.closed({5})
        assert without(tokenizer, pieces.closed({5})).encode("xyz").tokens == ["xyz"]

    def test_merges_go_with_their_parts_and_the_others_keep_their_order(self):
        tokenizer = merged([("a", "b"), ("c", "d"), ("ab", "c"), ("ab", "cd")])
        pieces = pieces_of(rules(tokenizer))
        ids = pieces.ids
        kept = {ids[piece] for piece in ("a", "b", "c", "d", "ab", "cd", "abcd")}
        assert rules(without(tokenizer, kept))["model"]["merges"] == [["a", "b"], ["c", "d"], ["ab", "cd"]]

    def test_merges_may_be_written_as_text(self):
        whole = rules(merged([("a", "b")]))
        whole["model"]["merges"] = ["a b"]
        assert texts(pieces_of(whole), pieces_of(whole).closed({2})) == {"a", "b", "ab"}

    def test_further_pieces_come_in_the_order_of_merges_then_characters_each_behind_its_parts(self):
        tokenizer = merged([("a", "b"), ("c", "d"), ("ab", "cd")])
        pieces = pieces_of(rules(tokenizer))
        kept = {pieces.ids[one] for one in "abcd"}
        assert [pieces.texts[index] for index in pieces.more(kept)] == ["ab", "cd", "abcd"]
        assert [pieces.texts[index] for index in pieces.more(kept - {pieces.ids["d"]})] == ["ab", "d", "cd", "abcd"]

    def test_marked_parts_of_words_are_refused(self):
        tokenizer = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
        with pytest.raises(SourceError, match="end_of_word_suffix"):
            pieces_of(rules(tokenizer))


class TestLongest:
    def test_a_word_stays_unknown_that_shorter_pieces_could_make(self):
        """`abc` is found first and `##d` is none, though `ab` and `##cd` are pieces."""
        vocab = {piece: i for i, piece in enumerate(["[UNK]", "a", "ab", "abc", "##b", "##c", "##cd", "x", "##cdx"])}
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        pieces = pieces_of(rules(tokenizer))
        used = pieces.base() | {vocab["ab"], vocab["##cd"]}
        assert tokenizer.encode("abcd").tokens == ["[UNK]"]
        assert without(tokenizer, used).encode("abcd").tokens == ["ab", "##cd"]
        assert without(tokenizer, used | pieces.looked_up("abcd")).encode("abcd").tokens == ["[UNK]"]


class TestScored:
    def test_the_lowest_score_stays_since_the_price_of_unknown_characters_hangs_on_it(self):
        vocab = [("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -9.0), ("abb", -3.5)]
        pieces = pieces_of(rules(Tokenizer(models.Unigram(vocab, unk_id=0))))
        assert texts(pieces, pieces.base()) == {"<unk>", "a", "b", "ab"}
        trimmed = pieces.trimmed({1: 0, 0: 1, 4: 2} | {0: 0, 1: 1})
        assert [piece for piece, _ in trimmed["vocab"]] == ["<unk>", "a", "abb"]
        assert trimmed["unk_id"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_whatever_the_text_is_writes_all_that_could_be_written(kind):
    tokenizer = trained(kind).backend_tokenizer
    pieces = pieces_of(rules(tokenizer))
    assert pieces.whole == (kind in BYTES)
    added = {token["id"] for token in rules(tokenizer)["added_tokens"]}
    least = without(tokenizer, {index for index in pieces.base() | added if index in pieces.texts})
    for sentence in SENTENCES:
        before = tokenizer.decode(tokenizer.encode(sentence, add_special_tokens=False).ids)
        assert least.decode(least.encode(sentence, add_special_tokens=False).ids) == before


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_any_pieces_more_cut_a_text_as_before(kind, data):
    """What a text uses, closed, and any number of further pieces."""
    tokenizer = trained(kind).backend_tokenizer
    pieces = pieces_of(rules(tokenizer))
    text = " ".join(
        data.draw(st.lists(st.sampled_from([*" ".join(SENTENCES).split(), "qθ", "brid", "\n"]), min_size=1))
    )
    before = tokenizer.encode(text, add_special_tokens=False)
    kept = pieces.closed(pieces.base() | {index for index in before.ids if index in pieces.texts})
    kept |= {index for word in text.split() for index in pieces.looked_up(word.lower())}
    kept |= set(islice(pieces.more(frozenset(kept)), data.draw(st.integers(0, 50))))
    assert without(tokenizer, kept).encode(text, add_special_tokens=False).tokens == before.tokens


def test_whole_words_are_refused():
    with pytest.raises(SourceError, match="of the kind WordLevel; rows can go from those of the kinds BPE, WordPiece"):
        pieces_of(rules(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))))
