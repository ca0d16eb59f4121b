"""The rows of unused tokens cut from a model, and the proof that it computes what it did before."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture, Trimmed
from libprune.engine.errors import FamilyError, LibpruneError
from libprune.vocabulary.choose import Choice
from libprune.vocabulary.rows import trim_rows

_READS = ("sequence_classification", "embedding")
"""Heads whose outputs are not of tokens."""
_ROUNDING = 32
"""Steps of the number type by which outputs may differ, of the largest: products of other sizes are rounded in another
order."""


@dataclass(frozen=True)
class Cut:
    """A model from which rows are cut.

    Attributes:
        choice: the tokens that stay.
        before: the description of the model with all rows.
        expected: what it gives for the sequences of the choice, at the rows that stay.
    """

    choice: Choice
    before: Architecture
    expected: list[Tensor]

    def prove(self, model: PreTrainedModel, after: Architecture) -> Trimmed:
        """Compare a model that was loaded without the rows with the given one; what has gone.

        Args:
            model: in evaluation mode, on the CPU.
            after: its description.

        Raises:
            LibpruneError: if it computes something else, or its positions have moved.
        """
        if after.unused_positions != self.before.unused_positions:
            raise FamilyError(
                f"prepare.vocabulary: the positions of a {after.family} model begin behind the id of a token, which "
                f"has changed ({self.before.unused_positions} positions were unused before, {after.unused_positions} "
                "are now); set it to null"
            )
        pairs = list(zip(outputs(model, self.choice.proof), self.expected, strict=True))
        if not pairs:
            raise LibpruneError(
                "prepare.vocabulary: no document of the text begins with tokens that the model can be run on, so that "
                "the smaller vocabulary cannot be proved; name another prepare.vocabulary.text"
            )
        difference = float(torch.stack([(found - other).abs().max() for found, other in pairs]).max())
        scale = float(torch.stack([other.abs().max() for _, other in pairs]).max())
        if not difference <= _ROUNDING * torch.finfo(model.dtype).eps * scale:  # also where it is no number
            raise LibpruneError(
                f"without the rows of unused tokens the model computes something else: its outputs differ by "
                f"{difference:.3g} of {scale:.3g}. This is a defect of libprune; please report the model, and set "
                "prepare.vocabulary to null"
            )
        return Trimmed(
            tokens=self.choice.known,
            rows=self.choice.before,
            parameters=self.before.total_parameters - after.total_parameters,
            macs=self.before.head_macs - after.head_macs,
        )


def cut(model: PreTrainedModel, architecture: Architecture, choice: Choice) -> Cut:
    """Remove the rows of all other tokens from a model, which is then to be saved and loaded again.

    Args:
        model: in evaluation mode; is changed.
        architecture: its description.
        choice: the tokens that stay.
    """
    old = [[choice.tokens[index] for index in sequence] for sequence in choice.proof]
    expected = outputs(model, old, None if architecture.head in _READS else choice.rows)
    trim_rows(model, architecture, choice.rows, choice.new)
    return Cut(choice, architecture, expected)


def outputs(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], rows: Sequence[int] | None = None
) -> list[Float[Tensor, "..."]]:
    """What a model gives for each sequence of token ids, in float32: logits or last hidden states.

    Args:
        model: in evaluation mode.
        sequences: token ids.
        rows: the tokens whose logits are taken; None for all of them.
    """
    found = []
    with torch.inference_mode():
        for sequence in sequences:
            given: Tensor = model(input_ids=torch.tensor([list(sequence)]))[0].float()
            found.append(given if rows is None else given[..., list(rows)])
    return found


def record(choice: Choice, architecture: Architecture) -> dict[str, Any]:
    """What the artifact holds of a vocabulary, beside the tokenizer that was given.

    Args:
        choice: the tokens that stay.
        architecture: the description of the model without the rows, with what has gone.
    """
    gone = architecture.trimmed
    assert gone is not None
    total = architecture.total_parameters
    return {
        "text": choice.text,
        "documents": choice.documents,
        "tokens": {"before": gone.tokens, "after": len(choice.tokenizer)},
        "rows": {"before": gone.rows, "after": len(choice.rows)},
        "parameters": {"before": total + gone.parameters, "after": total},
        "ids": list(choice.tokens),
        "tokenizer": choice.given,
    }
