"""Fitting the second maps of a mixture's experts, to what the dense mixture gave to the tokens that go through them.

When experts go, their tokens are routed to others. What those give is not what the removed ones gave, and the experts
that are left can be fitted to it, all together. With x_r the input of row r, a token t(r) on its way through expert
e(r) of the pruned mixture, times the router's weight, and y_t what token t is to be given:

    W' = argmin sum_t |y_t - sum_(r of t) W'_e(r) x_r|^2 + lambda sum_e |(W'_e - W_e) D_e^1/2|^2

with D_e the diagonal of sum x_r x_r^T over the rows of the expert. The experts of a token share its error, so that
they are fitted jointly: by conjugate gradients on the rows, preconditioned with each expert's own damped Gram matrix.
Memory: the rows, and in float32 for each expert its weights ten times and its Gram matrix three times.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from libprune.engine.architecture import Map
from libprune.engine.surgery import stacked
from libprune.models.memory import fits_on
from libprune.repair.least_squares import (
    DAMPINGS,
    SILENT,
    Fit,
    Inputs,
    dense_problem,
    fit_consumer,
    mean_of,
    require_choice,
)

STEPS = 12
"""The most steps of conjugate gradients for one ridge."""
CLOSE = 1e-3
"""The residual, relative to that of the old weights, at which they end."""


@dataclass(frozen=True)
class Rows:
    """What a batch shows of a stack that consumes; on the host, or on the device of the fit where it has room.

    Attributes:
        x: the input of each row, times the router's weight, zero where inputs are removed; sorted by expert.
        tokens: the token of each row.
        counts: rows of each expert.
        y: what each token is to be given.
        held_out: whether the fit is not to see these tokens.
    """

    x: Float[Tensor, "rows input"]
    tokens: Int[Tensor, " rows"]
    counts: tuple[int, ...]
    y: Float[Tensor, "tokens output"]
    held_out: bool

    def given(self, weights: Float[Tensor, "copies input output"]) -> Float[Tensor, "tokens output"]:
        """What weights give each token."""
        x, tokens = self.x.to(weights), self.tokens.to(weights.device)
        out = weights.new_zeros(self.y.shape)
        for copy, (rows, of) in enumerate(zip(x.split(self.counts), tokens.split(self.counts), strict=True)):
            if len(rows):
                out.index_add_(0, of, rows @ weights[copy])
        return out

    def pulled(self, missed: Float[Tensor, "tokens output"]) -> Float[Tensor, "copies input output"]:
        """The transpose of `given`: the products of each expert's inputs with what its tokens miss."""
        x, tokens = self.x.to(missed), self.tokens.to(missed.device)
        pairs = zip(x.split(self.counts), tokens.split(self.counts), strict=True)
        return torch.stack([rows.T @ missed[of] for rows, of in pairs])


def fit_experts(
    consumer: Map,
    weight: Float[Tensor, "output input"],
    kept: Bool[Tensor, " input"],
    batches: Sequence[Rows],
    damping: float | None,
    device: torch.device,
    like: Tensor,
) -> Fit:
    """Fit all experts of a layer that are left, together.

    Args:
        consumer: the stack.
        weight: its old weights, the inputs of all experts side by side.
        kept: the input positions that stay.
        batches: rows of the pruned mixture.
        damping: the ridge; None for that of `DAMPINGS` that does best on the held-out tokens.
        device: where to compute.
        like: a tensor in the storage order and shape of the weights.

    Raises:
        LibpruneError: if the damping is to be chosen and nothing is held out.
    """
    if fits_on(device, sum(batch.x.nbytes + batch.y.nbytes for batch in batches)):
        batches = [replace(batch, x=batch.x.to(device), y=batch.y.to(device)) for batch in batches]
    batches = [replace(batch, tokens=batch.tokens.to(device)) for batch in batches]
    copies = len(batches[0].counts)
    places = kept.view(copies, -1, 1).to(device)
    old = weight.unflatten(1, (copies, -1)).movedim(0, -1).to(device, torch.float32) * places
    fitted, kept_out = [b for b in batches if not b.held_out], [b for b in batches if b.held_out]
    require_choice(damping, bool(kept_out))
    normal = _Normal(fitted, old)
    best, new, held_out_after = np.nan, old, np.inf
    for value in _TRIED if damping is None else (damping,):
        solved = normal.solve(value)
        error = _error(kept_out, solved) if kept_out else np.nan
        if not error >= held_out_after:  # the first one, or a better one
            best, new, held_out_after = value, solved, error
        del solved
    after, silent = _error(fitted, new), normal.silent
    if kept_out and not silent:
        del normal, new  # before the normal equations of all rows
        new = _Normal(batches, old).solve(best)
    return Fit(
        consumer=consumer,
        weight=stacked(consumer, new.movedim(-1, 0).flatten(1).to(like.dtype), like).cpu(),
        bias=None,
        damping=np.nan if silent else best,
        before=_error(fitted, old),
        after=after,
        held_out_before=_error(kept_out, old) if kept_out else np.nan,
        held_out_after=held_out_after,
    )


_TRIED = tuple(value for value in DAMPINGS if 1e-3 <= value <= 10)
"""Ridges that are tried; smaller ones than these take many steps and were never the best."""


class _Normal:
    """The normal equations of a fit; `silent` where all inputs are 0, so that the old weights solve them."""

    def __init__(self, batches: Sequence[Rows], old: Float[Tensor, "copies input output"]) -> None:
        self._batches, self._old = batches, old
        self._grams = old.new_zeros(len(old), old.shape[1], old.shape[1])
        self._right = torch.zeros_like(old)
        for batch in batches:
            missed = batch.y.to(old) - batch.given(old)
            self._right += batch.pulled(missed)
            for copy, rows in enumerate(batch.x.to(old).split(batch.counts)):
                self._grams[copy] += rows.T @ rows
        diagonal = self._grams.diagonal(dim1=1, dim2=2)
        self.silent = not diagonal.any()
        self._scale = diagonal.clamp_min(SILENT * (float(diagonal.max()) or 1.0))

    def solve(self, damping: float) -> Float[Tensor, "copies input output"]:
        """The weights for one ridge; each output by conjugate gradients of its own."""
        ridge = damping * self._scale
        damped = self._grams.clone()
        damped.diagonal(dim1=1, dim2=2).add_(ridge)
        factors, info = torch.linalg.cholesky_ex(damped)
        del damped
        if info.any():  # rounding of few rows; the ridge alone is a preconditioner too
            factors[info != 0] = torch.diag_embed(ridge[info != 0].sqrt())
        change = torch.zeros_like(self._old)
        residual = self._right.clone()
        direction = ready = torch.cholesky_solve(residual, factors)
        gain = start = _dot(residual, ready)
        for _ in range(STEPS):
            product = sum((b.pulled(b.given(direction)) for b in self._batches), ridge[..., None] * direction)
            step = gain / _dot(direction, product).clamp_min(torch.finfo(gain.dtype).tiny)
            change += step * direction
            residual -= step * product
            ready = torch.cholesky_solve(residual, factors)
            after = _dot(residual, ready)
            if bool((after <= CLOSE**2 * start).all()):
                break
            direction = ready + after / gain.clamp_min(torch.finfo(gain.dtype).tiny) * direction
            gain = after
        return self._old + change


def _dot(one: Tensor, two: Tensor) -> Float[Tensor, " output"]:
    """The inner product of the weights of each output."""
    return (one * two).sum((0, 1))


def _error(batches: Sequence[Rows], weights: Float[Tensor, "copies input output"]) -> float:
    """The share of what tokens are to be given that weights leave out."""
    missed = sum(float((batch.y.to(weights) - batch.given(weights)).double().square().sum()) for batch in batches)
    whole = sum(float(batch.y.double().square().sum()) for batch in batches)
    return missed / whole if whole else 0.0


def fit_channels(
    consumer: Map,
    weight: Float[Tensor, "output input"],
    kept: Bool[Tensor, " input"],
    inputs: Inputs,
    damping: float | None,
    fisher_share: float,
    like: Tensor,
) -> Fit:
    """Fit each expert that loses channels to what it gave in the dense model, from its own cached Gram matrix.

    Args:
        consumer: the stack.
        weight: its old weights, the inputs of all experts side by side.
        kept: the input positions that stay.
        inputs: what is known of the inputs of each expert; held-out rows are zero where there is none.
        damping: the ridge; None for the best of `DAMPINGS` in each expert, by its held-out rows.
        fisher_share: as in `libprune.repair.least_squares.fisher_weighting`.
        like: a tensor in the storage order and shape of the weights.

    Raises:
        LibpruneError: if the damping is to be chosen and nothing is held out.
    """
    grams, held_out = inputs.gram, inputs.held_out
    copies, each = grams.shape[:2]
    require_choice(damping, held_out is not None)
    whole, fits = weight.cpu() * kept, []
    for copy in range(copies):
        own = slice(copy * each, (copy + 1) * each)
        stays = kept[own]
        if not stays.any() or stays.all() or not grams[copy].any():
            continue
        curvature = None if inputs.curvature is None else inputs.curvature[copy]
        rows = held_out[copy] if held_out is not None and held_out[copy].any() else None
        here = stays.to(weight.device)
        problem, unseen = dense_problem(weight[:, own], Inputs(grams[copy], rows, curvature), here, fisher_share)
        ridge = _RARE if damping is None and unseen is None else damping
        fit = fit_consumer(consumer, weight[:, own], here, problem, unseen, ridge)
        assert fit.weight is not None
        whole[:, own] = fit.weight.T if consumer.transposed else fit.weight
        fits.append(fit)
    return Fit(
        consumer=consumer,
        weight=stacked(consumer, whole, like),
        bias=None,
        damping=mean_of(fits, "damping"),
        before=mean_of(fits, "before"),
        after=mean_of(fits, "after"),
        held_out_before=mean_of(fits, "held_out_before"),
        held_out_after=mean_of(fits, "held_out_after"),
    )


_RARE = 0.1
"""The ridge of an expert that no held-out token goes through, where ridges are chosen by held-out tokens."""
