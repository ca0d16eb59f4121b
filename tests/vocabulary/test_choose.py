"""Which tokens stay, by a text, and the tokenizer that has no others."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from libprune.engine.describe import describe, without_weights
from libprune.engine.errors import LibpruneError, SourceError
from libprune.pipeline.sections import Vocabulary
from libprune.vocabulary.choose import Choice, choose
from tests.support.vocabularies import BYTES, ENGLISH, GREEK, KINDS, OTHERS, SENTENCES, trained

WORDS = " ".join(SENTENCES).split()


def model_for(tokenizer: PreTrainedTokenizerBase, rows: int | None = None, **options: object) -> LlamaForCausalLM:
    """A model without weights that has a row for each token, or so many rows."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return without_weights(LlamaConfig(vocab_size=rows or len(tokenizer), **sizes, **ids | options))


def chosen(kind: str, text: Path, rows: int | None = None, **options: object) -> Choice:
    tokenizer = trained(kind)
    model = model_for(tokenizer, rows)
    asked = {"text": str(text), "multiple": 1} | options
    return choose(model, tokenizer, describe(model), Vocabulary.model_validate(asked))


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(ENGLISH) + "\n")
    return path


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.lists(st.sampled_from([*WORDS, "θq", "œuf", "☂"]), min_size=1, max_size=30), min_size=1, max_size=5
    ),
    any_text=st.text(max_size=20),
)
def test_the_text_is_cut_as_before_and_any_text_reads_back_as_before(kind, tmp_path, lines, any_text):
    path, documents = tmp_path / "text.txt", [" ".join(line) for line in lines]
    path.write_text("\n".join(documents))
    given_one, choice = trained(kind), chosen(kind, path)
    for document in [*documents, "\n\n".join(documents)]:
        assert tokens(choice.tokenizer, document) == tokens(given_one, document)
    if kind in BYTES:
        assert choice.tokenizer.decode(choice.tokenizer(any_text)["input_ids"]) == given_one.decode(
            given_one(any_text)["input_ids"]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_go_that_the_text_never_needs(kind, text):
    choice, tokenizer = chosen(kind, text), trained(kind)
    assert len(choice.tokenizer) == len(choice.tokens) < 0.85 * len(tokenizer)
    assert choice.known == choice.before == len(tokenizer)
    assert list(choice.tokens) == sorted(choice.tokens)
    kept = choice.tokenizer.get_vocab()
    assert {text: choice.tokens[new] for text, new in kept.items()}.items() <= tokenizer.get_vocab().items()
    unseen = [piece for piece in tokenizer.get_vocab() if any(letter in piece for letter in "δθπ") and len(piece) > 3]
    assert not set(unseen) & kept.keys()
    assert (choice.text, choice.documents) == (str(text), len(ENGLISH))


@pytest.mark.parametrize("kind", KINDS)
def test_no_character_becomes_unknown(kind, text):
    choice, tokenizer = chosen(kind, text), trained(kind)
    for sentence in [*GREEK, *OTHERS]:
        assert choice.tokenizer.decode(choice.tokenizer(sentence)["input_ids"]) == tokenizer.decode(
            tokenizer(sentence)["input_ids"]
        )
        assert len(choice.tokenizer(sentence)["input_ids"]) >= len(tokenizer(sentence)["input_ids"])


def test_special_tokens_and_the_words_of_the_chat_template_stay(text):
    choice, tokenizer = chosen("byte_level", text), trained("byte_level")
    assert "<|image|>" in choice.tokenizer.get_vocab()
    conversation = [{"role": role, "content": "The river"} for role in ("system", "user", "assistant")]
    written = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert written == choice.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert tokens(choice.tokenizer, written) == tokens(tokenizer, written)


def test_a_tokenizer_that_cuts_and_fills_texts_up_counts_all_of_their_tokens(text):
    """Those of sentence-transformers do so; and what stands around a text need not be in one."""
    given_one = trained("byte_level")
    whole, asked = chosen("byte_level", text), Vocabulary(text=str(text), multiple=1)
    tokenizer = copy.deepcopy(given_one)
    backend, frame = tokenizer.backend_tokenizer, len(given_one) - 2
    assert frame not in whole.tokens
    piece = given_one.convert_ids_to_tokens(frame)
    backend.post_processor = processors.TemplateProcessing(single=[piece, "$A"], special_tokens=[(piece, frame)])
    backend.enable_truncation(4)
    backend.enable_padding(length=4, pad_id=1, pad_token="</s>")
    model = model_for(tokenizer)
    choice = choose(model, tokenizer, describe(model), asked)
    assert {*whole.tokens, frame} <= set(choice.tokens)
    assert len(choice.tokens) < len(given_one)
    assert tokens(choice.tokenizer, ENGLISH[0]) == tokens(tokenizer, ENGLISH[0])


def test_tokens_that_are_used_too_seldom_go_but_not_those_that_are_asked_for(text):
    one, few = chosen("byte_level", text), chosen("byte_level", text, minimum=4)
    more = chosen("byte_level", text, minimum=4, keep=[GREEK[0]])
    assert set(few.tokens) < set(one.tokens)
    assert set(few.tokens) < set(more.tokens)
    assert tokens(more.tokenizer, GREEK[0]) == tokens(trained("byte_level"), GREEK[0])
    assert tokens(few.tokenizer, ENGLISH[0]) != tokens(trained("byte_level"), ENGLISH[0])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_a_multiple_as_far_as_there_are_tokens(kind, text):
    assert len(chosen(kind, text, multiple=16).rows) % 16 == 0
    assert len(chosen(kind, text, multiple=4096).rows) == len(trained(kind))


def test_rows_without_a_token_go_but_those_that_the_config_names(text):
    tokenizer = trained("byte_level")
    model = model_for(tokenizer, rows=len(tokenizer) + 9, pad_token_id=len(tokenizer) + 3)
    choice = choose(model, tokenizer, describe(model), Vocabulary(text=str(text), multiple=1))
    assert choice.rows[-1] == len(tokenizer) + 3
    assert choice.before == len(tokenizer) + 9


def test_tokens_without_a_row_stay_without(text):
    choice = chosen("byte_level", text, rows=len(trained("byte_level")) - 1)
    assert len(choice.rows) == len(choice.tokens) - 1
    assert choice.tokenizer.convert_tokens_to_ids("<|image|>") == len(choice.rows)


def test_only_so_many_documents_are_read(text):
    assert chosen("byte_level", text, documents=2).documents == 2


def test_conversations_are_read_as_the_template_writes_them(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": [{"role": "bridge", "content": "The river"}]}))
    choice, tokenizer = chosen("byte_level", path), trained("byte_level")
    assert tokens(choice.tokenizer, "<s>bridge\nThe river</s>") == tokens(tokenizer, "<s>bridge\nThe river</s>")


def test_what_the_tests_of_a_text_find_is_said(text, monkeypatch):
    monkeypatch.setattr("libprune.vocabulary.choose._needed", lambda given, pieces, *rest: pieces.base())
    with pytest.raises(LibpruneError, match=r"cuts the text 'The river .* into other tokens than before"):
        chosen("byte_level", text)


def test_a_text_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        chosen("byte_level", tmp_path / "none.txt")
