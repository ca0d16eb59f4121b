"""The file of a tokenizer with fewer tokens, and counts of tokens."""

import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from libprune.engine.errors import SourceError
from libprune.vocabulary.pieces import pieces_of
from libprune.vocabulary.tokenizer import count_tokens, differing, encoded, reloaded, rules_of, with_ids
from tests.support.vocabularies import ENGLISH, KINDS, OTHERS, trained


def trimmed(tokenizer: PreTrainedTokenizerBase, gone: int = 5) -> tuple[PreTrainedTokenizerBase, dict[int, int]]:
    """A tokenizer without some pieces that nothing else needs, and the new ids."""
    rules = rules_of(tokenizer)
    pieces = pieces_of(rules)
    kept = pieces.base() | {token["id"] for token in rules["added_tokens"]}
    more = list(pieces.more(frozenset(kept)))
    new = {old: place for place, old in enumerate(sorted(kept | set(more[:-gone])))}
    return reloaded(tokenizer, with_ids(rules, pieces, new)), new


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_dense_special_tokens_keep_their_place_around_a_text_and_settings_stay(kind):
    tokenizer = trained(kind)
    made, new = trimmed(tokenizer)
    assert sorted(made.get_vocab().values()) == list(range(len(tokenizer) - 5))
    assert made.get_vocab() == {text: new[index] for text, index in tokenizer.get_vocab().items() if index in new}
    assert made.special_tokens_map == tokenizer.special_tokens_map
    assert made.chat_template == tokenizer.chat_template
    text = ENGLISH[1]
    assert made(text)["input_ids"][0] == new[tokenizer(text)["input_ids"][0]]
    assert made(text)["input_ids"][-1] == new[tokenizer(text)["input_ids"][-1]]
    assert made.decode(made(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"])
def test_classes_that_build_their_tokenizer_themselves_are_loaded_with_fewer_tokens(name, tmp_path):
    trained("byte_fallback" if name == "LlamaTokenizer" else "byte_level").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__ == name
    made, new = trimmed(tokenizer)
    assert type(made).__name__ == name
    assert len(made) == len(new)


def test_a_post_processor_that_may_hold_ids_is_refused_by_name():
    rules = rules_of(trained("byte_level"))
    rules["post_processor"] = {"type": "Sequence", "processors": [{"type": "Novel"}]}
    with pytest.raises(SourceError, match="post-processor Novel"):
        with_ids(rules, pieces_of(rules), {index: index for index in range(600)})


def test_the_frame_of_roberta_and_padding_get_new_ids():
    rules = rules_of(trained("word_piece"))
    rules["post_processor"] |= {"type": "RobertaProcessing", "trim_offsets": True, "add_prefix_space": False}
    rules["padding"] = {"pad_id": 0}
    new = {index: index + 7 for index in range(500)}
    made = with_ids(rules, pieces_of(rules), new)
    assert (made["post_processor"]["sep"], made["post_processor"]["cls"]) == (["[SEP]", 10], ["[CLS]", 9])
    assert made["padding"] == {"pad_id": 7}


def test_a_tokenizer_without_a_file_is_refused():
    with pytest.raises(SourceError, match=r"has no tokenizer\.json"):
        rules_of(object.__new__(PreTrainedTokenizerBase))


def test_tokens_are_counted_and_unknown_words_noted_as_they_are_looked_up():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    counts = count_tokens(tokenizer, ["AB a", "aC"], "[UNK]")
    assert counts.of.tolist() == [1, 2, 1]
    assert counts.unknown == {"ac"}


def test_long_texts_are_cut_in_parts_with_nothing_lost(monkeypatch):
    tokenizer = trained("byte_level").backend_tokenizer
    monkeypatch.setattr("libprune.vocabulary.tokenizer._AT_ONCE", 50)
    texts = [*ENGLISH, *OTHERS, ""]
    assert [text for text, _ in encoded(tokenizer, texts)] == texts
    assert [one.ids for _, one in encoded(tokenizer, texts)] == [one.ids for one in tokenizer.encode_batch(texts)]


def test_a_text_that_is_cut_otherwise_is_found():
    tokenizer = trained("byte_level")
    made, new = trimmed(tokenizer, gone=200)
    given, now = tokenizer.backend_tokenizer, made.backend_tokenizer
    assert differing(given, given, {index: index for index in range(600)}, ENGLISH) is None
    assert differing(given, now, new, ["aa", *ENGLISH]) in ENGLISH
