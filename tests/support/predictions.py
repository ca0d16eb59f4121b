"""Predictions of a model, and how far two of them diverge, by the definition."""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from libprune.engine.describe import describe
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked


def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double()


def kl(dense: Tensor, changed: Tensor) -> np.ndarray:
    """KL(dense | changed) of next tokens by sequence, mean over positions, by the definition."""
    p, log_p, log_q = torch.softmax(dense, -1), torch.log_softmax(dense, -1), torch.log_softmax(changed, -1)
    return (p * (log_p - log_q)).sum(-1).mean(-1).numpy()


def masked_logits(model: PreTrainedModel, plan: Plan, ids: Tensor) -> Tensor:
    """The logits of a model under the mask of a plan."""
    with torch.no_grad(), masked(model, describe(model), plan):
        return model(input_ids=ids, use_cache=False).logits


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Outputs that are equal up to rounding, relative to the largest."""
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
