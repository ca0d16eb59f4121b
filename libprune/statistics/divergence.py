"""How far a changed model's predictions are from the dense model's."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.models.embeddings import distances, embed
from libprune.models.sequences import NO_TARGET, Sequences


class Divergence:
    """KL(dense | changed) between predictions of the dense and the changed model, by sequence, in nats.

    It is the mean over the positions of a sequence that have targets. Where the targets are the next tokens, the last
    position counts too, although its target is not known.

    The first call for a pass is taken as the dense model and gives 0. Its log-probabilities, tokens x vocabulary, are
    kept on the host in the model's dtype. What this rounding alone gives is taken off later, so that an unchanged model
    gives 0 again. Between embeddings it is the distance of `libprune.models.embeddings`, one minus the cosine.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._dense: dict[int, Tensor] = {}
        self._rounding: dict[int, Tensor] = {}

    def __call__(self, number: int, sequences: Sequences) -> Float[Tensor, " batch"]:
        """The divergence of each sequence of a pass, ``[batch]``, given the number of the pass and its sequences."""
        if sequences.pooling is not None:
            found = embed(self._model, sequences)
            return distances(found, self._dense.setdefault(number, found.cpu()).to(found.device))
        logits, targets = self._model(input_ids=sequences.ids, use_cache=False).logits, sequences.targets
        if targets is not None:
            logits = logits[targets != NO_TARGET].unflatten(0, (len(sequences), -1))
        changed = nn.functional.log_softmax(logits.float(), -1)
        if number not in self._dense:
            self._dense[number] = changed.to(logits.dtype).cpu()
        dense = self._dense[number].to(changed.device).float()
        found = (dense.exp() * (dense - changed)).sum(-1).mean(-1)
        return found - self._rounding.setdefault(number, found)


def stored_bytes(tokens: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Bytes of the dense model's log-probabilities that a `Divergence` keeps."""
    return tokens * vocabulary * dtype.itemsize
