"""The rows of tokens in a model and its configs."""

import pytest
import torch
from transformers import GenerationConfig

from libprune.engine.describe import describe
from libprune.engine.errors import FamilyError, SourceError
from libprune.vocabulary.rows import named_ids, token_axes, trim_rows
from tests.support.models import FAMILIES, TOWERS, VOCAB

KEPT = [0, 3, 4, 9, 30, 36]
NEW = {old: new for new, old in enumerate(KEPT)} | {40: 6}


def trimmed(name: str, **generation: object) -> torch.nn.Module:
    model = (FAMILIES | TOWERS)[name](0)
    model.generation_config = GenerationConfig(**generation)
    trim_rows(model, describe(model), KEPT, NEW)
    return model


def test_rows_go_from_the_embedding_and_the_head_and_a_tied_pair_stays_one():
    model = FAMILIES["llama"](0)
    whole = model.get_input_embeddings().weight.detach().clone()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    trim_rows(model, describe(model), KEPT, NEW)
    assert torch.equal(model.get_input_embeddings().weight, whole[KEPT])
    assert model.get_output_embeddings().weight.shape == (6, whole.shape[1])
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.vocab_size == 6


def test_biases_of_a_head_lose_their_entries():
    model = trimmed("bert")
    described = describe(model)
    assert described.sizes["vocab"] == 6
    assert any([str(dim) for dim in parameter.dims] == ["vocab"] for parameter in described.parameters)


def test_ids_in_configs_are_the_new_ones_and_those_without_a_row_stay_without():
    told = {"eos_token_id": [3, 36], "pad_token_id": 40, "suppress_tokens": [4, 9], "bad_words_ids": [[30], [3, 4]]}
    found = trimmed("llama", **told, max_length=9, begin_suppress_tokens=[99]).generation_config.to_dict()
    assert (found["eos_token_id"], found["pad_token_id"]) == ([1, 5], 6)
    assert (found["suppress_tokens"], found["bad_words_ids"]) == ([2, 3], [[4], [1, 2]])
    assert (found["begin_suppress_tokens"], found["max_length"]) == ([99], 9)


def test_the_ids_that_configs_name_are_found_nested_ones_too():
    model = TOWERS["qwen3_vl"](0)
    assert named_ids(model) >= {33, 34, 35, VOCAB - 1}
    trim_rows(model, describe(model), KEPT, {**NEW, 33: 7, 34: 8, 35: 9})
    assert named_ids(model) >= {7, 8, 9, 5}
    assert model.config.get_text_config().vocab_size == 6


def test_ids_among_other_numbers_are_refused_by_name():
    model = FAMILIES["llama"](0)
    model.generation_config = GenerationConfig(forced_decoder_ids=[[1, 4]])
    with pytest.raises(SourceError, match="forced_decoder_ids"):
        named_ids(model)


def test_all_axes_of_tokens_lose_the_same_rows():
    model = FAMILIES["gemma4_text"](0)
    described = describe(model)
    assert token_axes(described) == ("vocab", "own_vocab")
    trim_rows(model, described, KEPT, NEW)
    assert {describe(model).sizes[axis] for axis in ("vocab", "own_vocab")} == {6}


def test_axes_of_tokens_that_differ_in_size_are_refused():
    described = describe(FAMILIES["gemma4_text"](0))
    described.sizes["own_vocab"] = 40
    with pytest.raises(FamilyError, match="'own_vocab': 40}, which must be as long as each other"):
        token_axes(described)
