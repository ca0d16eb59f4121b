"""How far a changed model's predictions are from the dense model's."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.models.sequences import NO_TARGET, Sequences


class Divergence:
    """KL(dense | changed) of the predicted distributions, for each sequence, mean over where it has targets, in nats.

    Where the targets are the next tokens, the last position counts too: its target is only not known.

    The first call for a pass is taken as the dense model and gives 0; its log-probabilities are kept
    on the host in the model's dtype: tokens x vocabulary.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._dense: dict[int, Tensor] = {}

    def __call__(self, number: int, sequences: Sequences) -> Float[Tensor, " batch"]:
        """Of a pass: its number and its sequences."""
        logits, targets = self._model(input_ids=sequences.ids, use_cache=False).logits, sequences.targets
        if targets is not None:
            logits = logits[targets != NO_TARGET].unflatten(0, (len(sequences), -1))
        found = nn.functional.log_softmax(logits.float(), -1)
        if number not in self._dense:
            self._dense[number] = found.to(logits.dtype).cpu()
            return found.new_zeros(len(sequences))
        dense = self._dense[number].to(found.device).float()
        return (dense.exp() * (dense - found)).sum(-1).mean(-1)


def stored_bytes(tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes of the dense log-probabilities."""
    return tokens * vocabulary * dtype.itemsize
