"""How far a changed model's predictions are from the dense model's."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel


class Divergence:
    """KL(dense | changed) of the next-token distributions, for each sequence, mean over its positions, in nats.

    The first call for a pass is taken as the dense model and gives 0; its log-probabilities are kept
    on the host in the model's dtype: tokens x vocabulary.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._dense: dict[int, Tensor] = {}

    def __call__(self, number: int, ids: Int[Tensor, "batch length"]) -> Float[Tensor, " batch"]:
        """Of a pass: its number and its token ids."""
        logits = self._model(input_ids=ids, use_cache=False).logits
        found = nn.functional.log_softmax(logits.float(), -1)
        if number not in self._dense:
            self._dense[number] = found.to(logits.dtype).cpu()
            return found.new_zeros(len(ids))
        dense = self._dense[number].to(found.device).float()
        return (dense.exp() * (dense - found)).sum(-1).mean(-1)


def stored_bytes(tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes of the dense log-probabilities."""
    return tokens * vocabulary * dtype.itemsize
