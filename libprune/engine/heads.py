"""What a model is for, as transformers says it by the class of its head: the next token, masked tokens, a label.

A model that reads images as well predicts the next token too; its language model can be pruned on text alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from libprune.engine.errors import FamilyError

HeadName = Literal["causal_lm", "image_text_to_text", "masked_lm", "sequence_classification", "network"]
"""`network` stands for the head of a network that is not of transformers, with a loss of its own."""


@dataclass(frozen=True)
class Head:
    """One kind of head.

    Attributes:
        name: as family files and `architecture.json` name it.
        auto_class: transformers' class that loads models with it.
        mapping: transformers' table from config classes to model classes with it.
        ending: how the names of these classes end.
        writes: whether models with it predict the next token, and so can write.
    """

    name: HeadName
    auto_class: str
    mapping: str
    ending: str
    writes: bool = False

    @cached_property
    def loader(self) -> Any:
        """Transformers' auto class."""
        import transformers  # not above: what only reads descriptions needs no torch

        return getattr(transformers, self.auto_class)

    def model_class(self, config: Any) -> str:
        """The name of the stock class for a config of transformers."""
        import transformers

        name: str = getattr(transformers, self.mapping)[type(config)].__name__
        return name


CAUSAL_LM = Head("causal_lm", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING", "", writes=True)
IMAGE_TEXT_TO_TEXT = Head(
    "image_text_to_text",
    "AutoModelForImageTextToText",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "ForConditionalGeneration",
    writes=True,
)
MASKED_LM = Head("masked_lm", "AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING", "ForMaskedLM")
SEQUENCE_CLASSIFICATION = Head(
    "sequence_classification",
    "AutoModelForSequenceClassification",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "ForSequenceClassification",
)
HEADS = {head.name: head for head in (MASKED_LM, SEQUENCE_CLASSIFICATION, IMAGE_TEXT_TO_TEXT, CAUSAL_LM)}


def writes(head: HeadName) -> bool:
    """Whether models with the head predict the next token; networks that are not of transformers do not."""
    return head in HEADS and HEADS[head].writes


def head_of(architectures: object) -> Head:
    """The head that a config's `architectures` names, whatever stands there; a causal one for none or another ending.

    Raises:
        FamilyError: for what is no list of names, or a head of another kind, such as question answering, whose weights
            would be lost.
    """
    given = () if architectures is None else architectures
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise FamilyError(f"config key 'architectures' = {str(architectures)[:40]!r} is no list of names of classes")
    name = next(iter(given), "")
    for head in HEADS.values():
        if head.ending and name.endswith(head.ending):
            return head
    if "For" in name and not name.endswith("ForCausalLM"):
        known = ", ".join(head.ending or "ForCausalLM" for head in HEADS.values())
        raise FamilyError(f"the model is a {name}; libprune knows the heads {known}")
    return CAUSAL_LM


EXPERTS = frozenset({"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"})
"""The keys by which configs say how many experts a layer has."""


def experts_of(config: Mapping[str, Any]) -> int:
    """How many experts a layer of a model has by its config, or that of its text part; 0 in a dense model."""
    texts = [config, *(part for part in (config.get("text_config"),) if isinstance(part, Mapping))]
    counts = (part.get(key) for part in texts for key in sorted(EXPERTS))
    return next((count for count in counts if isinstance(count, int) and count > 1), 0)
