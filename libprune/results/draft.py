"""The pruned model as a draft for speculative decoding by the dense one: how much is accepted, and what that gains.

A draft model writes some tokens one by one. The dense model then looks at all of them in one pass and keeps so many
that what is written follows the dense model's own distribution. Leviathan et al. 2023, Fast Inference from Transformers
via Speculative Decoding, arXiv 2211.17192.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from libprune.models.compute import KEPT, KeptLogits, logits_losses, passes_with_bar, rows_at_once
from libprune.models.sequences import Sequences
from libprune.pipeline.terminal import Bar
from libprune.results.perplexity import Losses, estimate_mean

LONGEST = 16
"""The most tokens of a draft that are looked at."""


@dataclass(frozen=True)
class Overlap:
    """How far the predictions of a draft model are those of the dense model, as means over each window's positions.

    Attributes:
        accepted: the probability that the dense model accepts a token that the draft model samples, ``[windows]``.
        agreed: the share of positions at which both find the same token most likely, ``[windows]``.
    """

    accepted: Float[np.ndarray, " windows"]
    agreed: Float[np.ndarray, " windows"]


class Beside:
    """The dense model and the windows on which other models are read beside it.

    Args:
        dense: the dense model.
        windows: the evaluation windows.
        batch_tokens: the most tokens in a pass.
        most: bytes of the dense model's logits that may be kept.
    """

    def __init__(self, dense: PreTrainedModel, windows: Sequences, batch_tokens: int, most: int = KEPT) -> None:
        self._dense, self._windows, self._batch_tokens, self._kept = dense, windows, batch_tokens, KeptLogits(most)

    def read(self, model: PreTrainedModel, label: str | Bar) -> tuple[Losses, Overlap | None]:
        """Run a model once over the windows: its losses, and how far its predictions are the dense model's.

        The dense model runs for that only where its logits are not kept.

        Args:
            model: the dense model itself, or one with the same vocabulary on the same device.
            label: text of the progress bar, or a bar of more than these passes.

        Returns:
            The losses by window, as `window_losses` gives them, and the overlap; None of the dense model with itself.
        """
        losses, accepted, agreed = list[Tensor](), list[Tensor](), list[Tensor]()
        passes = passes_with_bar(self._windows, self._batch_tokens, model.device, label)
        with torch.no_grad():
            for number, batch in enumerate(passes):
                dense = self._kept.of(number, partial(_logits, self._dense, batch))
                logits = dense if model is self._dense else _logits(model, batch)
                losses.append(logits_losses(logits, batch).double().cpu())
                if model is not self._dense:
                    parts = (one.flatten(0, 1).split(rows_at_once(one)) for one in (dense, logits))
                    chances, same = zip(*(predictions_overlap(*part) for part in zip(*parts, strict=True)), strict=True)
                    accepted.append(torch.cat(chances).double().view(len(batch), -1).mean(1).cpu())
                    agreed.append(torch.cat(same).double().view(len(batch), -1).mean(1).cpu())
        overlap = Overlap(torch.cat(accepted).numpy(), torch.cat(agreed).numpy()) if accepted else None
        return torch.cat(losses).numpy(), overlap


def _logits(model: PreTrainedModel, batch: Sequences) -> Tensor:
    logits: Tensor = model(input_ids=batch.ids, use_cache=False).logits
    return logits


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
