"""The pruned model as a draft for speculative decoding by the dense one: how much is accepted, and what that gains.

A draft model writes some tokens one by one. The dense model then looks at all of them in one pass and keeps so many
that what is written follows the dense model's own distribution. Leviathan et al. 2023, Fast Inference from Transformers
via Speculative Decoding, arXiv 2211.17192.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from libprune.models.compute import passes_with_bar
from libprune.models.sequences import Sequences
from libprune.pipeline.terminal import Bar
from libprune.results.perplexity import estimate_mean

LONGEST = 16
"""The most tokens of a draft that are looked at."""
_PART = 1 << 24
"""Largest number of probabilities of each model that are in memory at once."""


@dataclass(frozen=True)
class Overlap:
    """How far the predictions of a draft model are those of the dense model, as means over each window's positions.

    Attributes:
        accepted: the probability that the dense model accepts a token that the draft model samples, ``[windows]``.
        agreed: the share of positions at which both find the same token most likely, ``[windows]``.
    """

    accepted: Float[np.ndarray, " windows"]
    agreed: Float[np.ndarray, " windows"]


def window_overlaps(
    dense: PreTrainedModel, draft: PreTrainedModel, windows: Sequences, batch_tokens: int, label: str | Bar
) -> Overlap:
    """Compare the predictions of two models at each position of the windows; each runs once over all of them.

    Args:
        dense: the dense model.
        draft: a model with the same vocabulary, on the same device.
        windows: the evaluation windows.
        batch_tokens: the most tokens in a pass.
        label: text of the progress bar, or a bar of more than these passes.
    """
    accepted, agreed, device = list[Tensor](), list[Tensor](), next(dense.parameters()).device
    with torch.no_grad():
        for batch in passes_with_bar(windows, batch_tokens, device, label):
            logits = [model(input_ids=batch.ids, use_cache=False).logits.flatten(0, 1) for model in (dense, draft)]
            parts = zip(*(one.split(max(1, _PART // one.shape[-1])) for one in logits), strict=True)
            chances, same = zip(*(predictions_overlap(*part) for part in parts), strict=True)
            accepted.append(torch.cat(chances).double().view(len(batch), -1).mean(1).cpu())
            agreed.append(torch.cat(same).double().view(len(batch), -1).mean(1).cpu())
    return Overlap(torch.cat(accepted).numpy(), torch.cat(agreed).numpy())


def predictions_overlap(
    dense: Float[Tensor, "rows vocab"], draft: Float[Tensor, "rows vocab"]
) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """The chance that a draft token is accepted, and whether the most likely tokens are the same, row by row.

    The chance is the sum over all tokens v of min(p(v), q(v)) for the probabilities p and q of both models (Theorem 3.5
    of the paper); its mean is the acceptance rate (Corollary 3.6). It is the same whichever of the models is the draft.

    Args:
        dense: logits of the dense model.
        draft: logits of the draft model.
    """
    chance = torch.minimum(dense.float().softmax(-1), draft.float().softmax(-1)).sum(-1)
    return chance, dense.argmax(-1) == draft.argmax(-1)


def expected_speedup(acceptance: float, step: float, tokens: int) -> float:
    """How many times as fast as the dense model alone speculative decoding is expected to write.

    It is (1 - a^(n + 1)) / ((1 - a) (n c + 1)), Theorem 3.8 of the paper. The dense model's look at a whole draft is
    taken to last as long as one of its steps.

    Args:
        acceptance: a, the chance that the next token of a draft is accepted, 0 to 1.
        step: c, the time of one decode step of the draft model over that of the dense model.
        tokens: n, the tokens of a draft.
    """
    return sum(acceptance**power for power in range(tokens + 1)) / (tokens * step + 1)


def draft_figures(overlap: Overlap, step: float) -> dict[str, Any]:
    """What a model is worth as a draft, as `artifacts/evaluation.json` has it; for the best length up to `LONGEST`.

    Args:
        overlap: of its predictions with the dense model's.
        step: time of one of its decode steps over that of the dense model.
    """
    accepted, agreed = estimate_mean(overlap.accepted), estimate_mean(overlap.agreed)
    gains = {tokens: expected_speedup(accepted.value, step, tokens) for tokens in range(1, LONGEST + 1)}
    best = max(gains, key=gains.__getitem__)
    return {
        "acceptance": accepted.value,
        "acceptance_se": accepted.error,
        "agreement": agreed.value,
        "agreement_se": agreed.error,
        "step_ratio": step,
        "tokens": best,
        "speedup": gains[best],
    }
