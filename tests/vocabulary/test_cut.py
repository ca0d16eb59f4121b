"""Rows cut from a model, and the proof that it computes what it did before."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture, Trimmed
from libprune.engine.describe import describe
from libprune.engine.errors import FamilyError, LibpruneError
from libprune.models.folder import load_model
from libprune.vocabulary.choose import Choice
from libprune.vocabulary.cut import Cut, cut, outputs, record
from libprune.vocabulary.tokenizer import rules_of
from tests.support.models import FAMILIES, VOCAB
from tests.support.vocabularies import trained

TOKENS = (0, 1, 3, 4, 9, 30, 36)


def choice(tokens: tuple[int, ...] = TOKENS) -> Choice:
    tokenizer = trained("byte_level")
    proof = ((1, 0, 5, 3), (6, 2))
    return Choice(tokens, tokens, VOCAB, rules_of(tokenizer), len(tokenizer), tokenizer, "some.txt", 3, proof)


def written(name: str, folder: Path, tokens: tuple[int, ...] = TOKENS) -> tuple[Cut, PreTrainedModel, Architecture]:
    """A tiny model cut, and loaded again from a folder, with its description."""
    model = FAMILIES[name](0)
    made = cut(model, describe(model), choice(tokens))
    model.save_pretrained(folder, save_original_format=False)
    loaded = load_model(folder, torch.float32)
    return made, loaded, describe(loaded)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bert_classifier", "bert_embedding", "roberta"])
def test_what_is_loaded_computes_what_the_given_model_does_at_the_rows_that_stay(name, tmp_path):
    made, model, after = written(name, tmp_path)
    gone = made.prove(model, after)
    before = made.before
    assert gone == Trimmed(
        tokens=len(trained("byte_level")),
        rows=VOCAB,
        parameters=before.total_parameters - after.total_parameters,
        macs=before.head_macs - after.head_macs,
    )
    assert after.sizes["vocab"] == len(TOKENS)
    assert gone.parameters >= (VOCAB - len(TOKENS)) * before.sizes["model"]
    given = FAMILIES[name](0)
    rows = list(TOKENS) if made.expected[0].shape[-1] == len(TOKENS) else slice(None)
    for sequence, expected in zip(made.choice.proof, made.expected, strict=True):
        with torch.no_grad():
            whole = given(input_ids=torch.tensor([[TOKENS[index] for index in sequence]]))[0]
        assert torch.allclose(whole[..., rows], expected, atol=1e-6)


def test_a_model_that_computes_something_else_is_refused(tmp_path):
    made, model, after = written("llama", tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 0.01
    with pytest.raises(LibpruneError, match="the model computes something else: its outputs differ by"):
        made.prove(model, after)


@pytest.mark.parametrize("sequence", [0, 1])
def test_a_model_that_computes_no_numbers_is_refused(tmp_path, sequence):
    """Also where other sequences give numbers: NaN is neither larger nor smaller than another number."""
    made, model, after = written("llama", tmp_path)
    expected = list(made.expected)
    expected[sequence] = torch.full_like(expected[sequence], torch.nan)
    with pytest.raises(LibpruneError, match="its outputs differ by nan"):
        replace(made, expected=expected).prove(model, after)


def test_a_text_of_which_nothing_can_be_run_proves_nothing(tmp_path):
    made, model, after = written("llama", tmp_path)
    with pytest.raises(LibpruneError, match=r"cannot be proved; name another prepare\.vocabulary\.text"):
        replace(made, choice=replace(made.choice, proof=()), expected=made.expected[:0]).prove(model, after)


def test_positions_behind_a_token_that_moves_are_refused(tmp_path):
    made, model, after = written("roberta", tmp_path, (1, 2, 3, 4, 9, 30, 36))
    with pytest.raises(FamilyError, match="2 positions were unused before, 1 are now"):
        made.prove(model, after)


def test_logits_are_taken_at_rows(tmp_path):
    model = FAMILIES["llama"](0)
    (whole,), (some,) = outputs(model, [[1, 2]]), outputs(model, [[1, 2]], [4, 7])
    assert torch.equal(some, whole[..., [4, 7]])


def test_the_record_says_what_was_and_what_is(tmp_path):
    made, model, after = written("llama", tmp_path)
    told = record(made.choice, replace(after, trimmed=made.prove(model, after)))
    total = made.before.total_parameters
    assert told["parameters"] == {"before": total, "after": after.total_parameters}
    assert (told["rows"], told["ids"]) == ({"before": VOCAB, "after": 7}, list(TOKENS))
    assert (told["text"], told["documents"]) == ("some.txt", 3)
    assert told["tokenizer"] == rules_of(trained("byte_level"))
