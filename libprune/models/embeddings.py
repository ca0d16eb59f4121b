"""The embedding of a text that a model without a head gives, how far it is from another one, and losses of it.

An embedding e is the pooled last hidden state, divided by its norm. The distance of two is one minus their cosine,
D = 1 - cos = |e - e'|²/2. Between a changed model and the dense one, D is 0 where nothing is changed, and its gradient
is 0 there too. Only its second derivative says what a change costs: D is |J dm|²/2 for a small change dm of weights or
masks, where J is the Jacobian of the embedding. So gradients are taken of

    L = -s·(e - e_dense),    s of independent random signs, drawn for each text.

The gradient of L is -Jᵀs. Its mean over s is 0, and the mean of its square is the diagonal of JᵀJ, the second
derivative of D (Hutchinson 1990). This is also the Fisher information of a model that says y = e + noise of variance
1, if targets y are drawn from the dense model itself (Kunstner et al. 2019, arXiv 1905.12558; Martens 2020, arXiv
1412.1193). Half the mean of squared mask gradients, `unit_fisher`, is then an unbiased estimate of the second-order
term of D without a unit. Losses that are measured, and Hessians by probes, are those of D itself.
"""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor, nn

from libprune.engine.heads import Pooling
from libprune.models.sequences import Sequences

FEWEST = 4
"""Texts from which a correlation of the similarities of pairs has an error."""


def pooled(states: Float[Tensor, "batch length width"], pooling: Pooling) -> Float[Tensor, "batch width"]:
    """The embeddings of sequences without padding, of length 1, in float32, from their last hidden states."""
    states = states.float()
    return nn.functional.normalize(states[:, 0] if pooling == "cls" else states.mean(1), dim=-1)


def embed(model: nn.Module, sequences: Sequences) -> Float[Tensor, "batch width"]:
    """The embeddings that a model gives to sequences of one length, of length 1, in float32."""
    assert sequences.pooling is not None, "only asked for where the model gives embeddings"
    return pooled(model(input_ids=sequences.ids, use_cache=False)[0], sequences.pooling)


def distances(found: Float[Tensor, "batch width"], wanted: Float[Tensor, "batch width"]) -> Float[Tensor, " batch"]:
    """One minus the cosine of each two embeddings of length 1, as half of their squared distance."""
    return 0.5 * (found - wanted).square().sum(-1)


def projected_losses(model: nn.Module, sequences: Sequences) -> Float[Tensor, " batch"]:
    """The loss L of each sequence, see above, with the model as the dense one: 0, with the gradient -Jᵀs."""
    found = embed(model, sequences)
    signs = torch.stack([_signs(ids, found.shape[-1]) for ids in sequences.ids.cpu()]).to(found)
    return -(signs * (found - found.detach())).sum(-1)


def own_distances(model: nn.Module, sequences: Sequences) -> Float[Tensor, " batch"]:
    """The distance D of each sequence from the model itself: 0, without a gradient, but with the second one of D."""
    found = embed(model, sequences)
    return distances(found, found.detach())


def _signs(ids: Tensor, width: int) -> Tensor:
    """Random signs ``[width]`` that the tokens of a text fix, on every device and in any batch."""
    seed = hashlib.sha256(ids.contiguous().numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little") >> 1)
    return 2 * torch.randint(2, (width,), generator=generator) - 1
