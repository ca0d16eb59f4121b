"""What pruning costs in quality: losses, perplexity and right labels on the evaluation windows."""

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from transformers import PreTrainedModel

from libprune.models.compute import passes_with_bar, sequence_losses
from libprune.models.sequences import Sequences
from libprune.pipeline.terminal import Bar

Losses = Float[np.ndarray, " windows"]
"""Mean loss of each evaluation window, in nats."""
Hits = Bool[np.ndarray, " windows"]
"""Whether the most likely label of each sequence is the right one."""


def window_losses(model: PreTrainedModel, windows: Sequences, batch_tokens: int, label: str | Bar) -> Losses:
    """Mean negative log-likelihood of the targets of each evaluation window, in nats; ``[windows]``."""
    device = next(model.parameters()).device
    with torch.no_grad():
        losses = [
            sequence_losses(model, batch).double().cpu()
            for batch in passes_with_bar(windows, batch_tokens, device, label)
        ]
    return torch.cat(losses).numpy()


def label_hits(model: PreTrainedModel, windows: Sequences, batch_tokens: int, label: str | Bar) -> Hits:
    """Whether the label that the model finds most likely is the right one, for each sequence; ``[windows]``."""
    device = next(model.parameters()).device
    with torch.no_grad():
        hits = [
            (model(input_ids=batch.ids).logits.argmax(-1) == batch.targets).cpu()
            for batch in passes_with_bar(windows, batch_tokens, device, label)
        ]
    return torch.cat(hits).numpy()


def accuracy(hits: Hits) -> dict[str, float]:
    """Share of right answers with its standard error, as `libprune.results.tasks` gives it."""
    share, number = float(hits.mean()), len(hits)
    return {"n": float(number), "acc": share, "acc_se": math.sqrt(share * (1 - share) / max(1, number - 1))}


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error."""

    value: float
    error: float


def estimate_mean(values: Float[np.ndarray, " windows"]) -> Estimate:
    """The mean over equally long windows, and its standard error.

    The windows are the independent samples, not the tokens in them.
    """
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), error)


def estimate_perplexity(losses: Losses) -> Estimate:
    """exp(mean loss) over equally long windows, and its standard error by the delta method."""
    mean = estimate_mean(losses)
    value = math.exp(mean.value) if mean.value < _LARGEST else math.inf
    return Estimate(value, value * mean.error)


_LARGEST = math.log(sys.float_info.max)


def estimate_ratio(dense: Losses, pruned: Losses) -> Estimate:
    """Pruned perplexity divided by dense on the same windows, with its standard error.

    The pairing by window makes this error far smaller than those of the two perplexities.
    """
    return estimate_perplexity(pruned - dense)
