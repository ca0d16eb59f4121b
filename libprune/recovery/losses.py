"""How far a model's predictions are from a teacher's: divergence, cross-entropy and distance of hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from libprune.models.compute import rows_at_once
from libprune.models.sequences import NO_TARGET

_LEAST = 1e-6
"""Probability below which what is left beside the largest predictions counts as so much."""


@dataclass(frozen=True)
class TopPredictions:
    """The largest predictions of a model at each position.

    Attributes:
        log_probabilities: ``[..., k]``, nats.
        ids: the tokens or labels that they are of, ``[..., k]``.
    """

    log_probabilities: Float[Tensor, "... k"]
    ids: Int[Tensor, "... k"]


@dataclass(frozen=True)
class Taught:
    """What the dense model says of a batch.

    Attributes:
        predictions: its logits ``[..., vocab]``, or the largest predictions alone; the last hidden states of a model
            that gives embeddings.
        hidden: its hidden states ``[batch, length, width]``, before each layer and after the last; empty if nothing
            compares them.
    """

    predictions: Float[Tensor, "... vocab"] | TopPredictions
    hidden: tuple[Tensor, ...] = ()


def divergence(
    student: Float[Tensor, "rows vocab"], teacher: Float[Tensor, "rows others"], temperature: float
) -> Float[Tensor, " rows"]:
    """Kullback-Leibler divergence of each row's predictions from the teacher's, nats, times the squared temperature.

    The factor keeps the size of the gradient as the temperature rises (Hinton et al. 2015, Distilling the Knowledge in
    a Neural Network, arXiv 1503.02531). Rows of a vocabulary that only one of both models has stand for no token, and
    are left out.
    """
    known = min(student.shape[-1], teacher.shape[-1])
    ours, theirs = ((logits[..., :known].float() / temperature).log_softmax(-1) for logits in (student, teacher))
    return kl_div(ours, theirs, log_target=True, reduction="none").sum(-1) * temperature**2


def top_divergence(
    student: Float[Tensor, "rows vocab"], teacher: TopPredictions, temperature: float
) -> Float[Tensor, " rows"]:
    """Divergence as `divergence` has it, where all but the teacher's largest predictions count as one.

    It is at most the divergence of all predictions, and 0 where those agree, but for the rounding of stored
    log-probabilities to float16: some 0.001 nats of a position.
    """
    ours = (student.float() / temperature).log_softmax(-1).gather(-1, teacher.ids.long())
    theirs = teacher.log_probabilities.float()
    rest, other = ((1 - one.exp().sum(-1)).clamp(min=_LEAST) for one in (theirs, ours))
    return ((theirs.exp() * (theirs - ours)).sum(-1) + rest * (rest.log() - other.log())) * temperature**2


def prediction_loss(
    logits: Float[Tensor, "... vocab"],
    targets: Int[Tensor, "..."],
    taught: Taught,
    temperature: float,
    share: float,
) -> Float[Tensor, ""]:
    """The mean loss over all positions with a target, nats: ``(1 - share)`` divergence and ``share`` cross-entropy.

    The positions are worked through in parts. The gradient of a part is computed at once and kept instead of its
    probabilities, so that memory holds two tensors of the size of the logits and not five.

    Args:
        logits: of the trained model, ``[batch, length, vocab]`` or ``[batch, labels]``.
        targets: the target of each position, `NO_TARGET` where there is none; ``[batch, length]`` or ``[batch]``.
        taught: what the dense model says of the batch.
        temperature: divides the logits of both models before they are compared.
        share: share of the cross-entropy.
    """
    rows, wanted = logits.flatten(0, -2), targets.flatten()
    theirs = _flat(taught.predictions)
    counted = wanted != NO_TARGET
    if 2 * int(counted.sum()) < len(wanted):  # of masked tokens few positions count; of next tokens nearly all
        chosen = counted.nonzero()[:, 0]
        rows, wanted, theirs, counted = rows[chosen], wanted[chosen], _rows(theirs, chosen), counted[chosen]
    total: Tensor = _InParts.apply(rows, theirs, wanted, counted, temperature, share)
    return total / counted.sum()


class _InParts(torch.autograd.Function):
    """The sum of `_part_loss` over parts of the rows, which keeps the gradient of each part and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, theirs: Tensor | TopPredictions, wanted: Tensor, counted: Tensor, *given: float
    ) -> Tensor:
        size, total, gradient = rows_at_once(rows), torch.zeros((), device=rows.device), None
        if ctx.needs_input_grad[0]:
            gradient = torch.empty_like(rows, dtype=_kept(rows.dtype), requires_grad=False)
        for first in range(0, len(rows), size):
            here = slice(first, first + size)
            with torch.enable_grad():
                part = rows[here].detach().float().requires_grad_(ctx.needs_input_grad[0])
                loss = _part_loss(part, _rows(theirs, here), wanted[here], counted[here], *given)
            if gradient is not None:
                gradient[here] = torch.autograd.grad(loss, part)[0]
            total = total + loss.detach()
        ctx.gradient, ctx.dtype = gradient, rows.dtype
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return (outer * ctx.gradient).to(ctx.dtype), None, None, None, None, None


def _kept(dtype: torch.dtype) -> torch.dtype:
    """The type that a gradient is kept in: float16 would lose it before the loss is scaled up."""
    return torch.float32 if dtype == torch.float16 else dtype


def _part_loss(
    student: Float[Tensor, "rows vocab"],
    teacher: Float[Tensor, "rows others"] | TopPredictions,
    targets: Int[Tensor, " rows"],
    counted: Bool[Tensor, " rows"],
    temperature: float,
    share: float,
) -> Float[Tensor, ""]:
    losses = torch.zeros(len(student), device=student.device)
    if share < 1:
        if isinstance(teacher, TopPredictions):
            losses = losses + (1 - share) * top_divergence(student, teacher, temperature)
        else:
            losses = losses + (1 - share) * divergence(student, teacher, temperature)
    if share:
        losses = losses + share * cross_entropy(student.float(), targets, ignore_index=NO_TARGET, reduction="none")
    return losses.where(counted, 0).sum()


def _flat(given: Tensor | TopPredictions) -> Tensor | TopPredictions:
    if isinstance(given, TopPredictions):
        return TopPredictions(given.log_probabilities.flatten(0, -2), given.ids.flatten(0, -2))
    return given.flatten(0, -2)


def _rows(given: Tensor | TopPredictions, chosen: slice | Tensor) -> Tensor | TopPredictions:
    if isinstance(given, TopPredictions):
        return TopPredictions(given.log_probabilities[chosen], given.ids[chosen])
    return given[chosen]


def hidden_loss(
    hidden: Sequence[Tensor], dense: Sequence[Tensor], layers: Sequence[int], counted: Bool[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """The mean squared distance of hidden states from the dense model's, relative to the square of these.

    Every token counts alike, since the states of a few tokens are hundreds of times larger than those of all others.
    What a layer hands on is compared with what the next layer that is left got in the dense model.

    Args:
        hidden: states of the trained model before each layer and after the last, ``[batch, length, width]``.
        dense: those of the dense model.
        layers: index in the dense model of each layer of the trained one.
        counted: whether a token counts, ``[batch, length]``; False behind the end of a sequence.
    """
    wanted = [*layers[1:], len(dense) - 1]
    distances = [
        ((ours.float() - dense[index].float()).square().sum(-1) / dense[index].float().square().sum(-1))[counted].mean()
        for ours, index in zip(hidden[1:], wanted, strict=True)
    ]
    return torch.stack(distances).mean()
