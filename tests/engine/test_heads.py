"""Heads: named by the class of a model, and the classes of transformers that load them."""

import pytest
import transformers

from libprune.engine.errors import FamilyError
from libprune.engine.heads import (
    CAUSAL_LM,
    HEADS,
    IMAGE_TEXT_TO_TEXT,
    MASKED_LM,
    SEQUENCE_CLASSIFICATION,
    head_of,
    writes,
)


@pytest.mark.parametrize(
    ("names", "head"),
    [
        (["LlamaForCausalLM"], CAUSAL_LM),
        (["GPT2LMHeadModel"], CAUSAL_LM),
        (["Gemma3ForConditionalGeneration"], IMAGE_TEXT_TO_TEXT),
        (["BertForMaskedLM"], MASKED_LM),
        (["BertForSequenceClassification", "BertForMaskedLM"], SEQUENCE_CLASSIFICATION),
        ([], CAUSAL_LM),
        (None, CAUSAL_LM),
    ],
)
def test_the_first_class_of_a_config_names_the_head(names, head):
    assert head_of(names) is head


def test_a_head_whose_weights_would_be_lost_is_refused():
    with pytest.raises(FamilyError, match="is a BertForQuestionAnswering; libprune knows the heads ForMaskedLM"):
        head_of(["BertForQuestionAnswering"])


@pytest.mark.parametrize("name", HEADS)
def test_the_stock_class_of_a_config_has_the_ending_of_its_head(name):
    head = HEADS[name]
    assert head.loader is getattr(transformers, head.auto_class)
    config = transformers.Gemma3Config() if head is IMAGE_TEXT_TO_TEXT else transformers.BertConfig(is_decoder=True)
    assert head_of([head.model_class(config)]) in (head, CAUSAL_LM)


def test_models_that_predict_the_next_token_write():
    assert {name for name in (*HEADS, "network") if writes(name)} == {"causal_lm", "image_text_to_text"}


@pytest.mark.parametrize("architectures", [3, "LlamaForCausalLM", [3], {"a": 1}, True])
def test_what_is_no_list_of_names_is_refused(architectures):
    with pytest.raises(FamilyError, match="is no list of names of classes"):
        head_of(architectures)
