"""Repair: each consumer's weights fitted to the inputs that are left.

With K the kept input positions of a consumer, x their values and y what the consumer is to give:

    W' = argmin E|y - W' x|^2 + lambda |(W' - W_K) D^1/2|^2 = (E[y x^T] + lambda W_K D) (E[x x^T] + lambda D)^-1

D, the diagonal of E[x x^T], makes the ridge the same whatever the scale of each input: channels of an MLP
differ in it a thousandfold.

`local` takes x and y = W x from the dense model, in closed form from a cached Gram matrix. Kept weights then
miss no more than what the removed inputs x_P gave, and W' = W_K + W_P E[x_P x^T] (E[x x^T] + lambda D)^-1.
`libprune.repair.sequential` takes x from the model that is already pruned and repaired up to there.
Structured optimal brain compression, with the ridge pulled towards the old weights rather than zero
(Frantar & Alistarh 2022, "Optimal Brain Compression").
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from libprune.engine.architecture import Architecture, Map
from libprune.engine.errors import LibpruneError, StatisticsError
from libprune.engine.plan import Plan
from libprune.engine.surgery import input_mask, oriented
from libprune.engine.tables import Columns
from libprune.models.memory import Keep, fits_on, in_memory
from libprune.repair.cholesky import cholesky

CPU = torch.device("cpu")
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Ridges, relative to each input's mean square, that `slice.damping: auto` chooses from."""
_FIRST = 4
"""The place in `DAMPINGS` of the ridge that is tried first; most maps of language models end there or beside it."""
_LARGEST = 100.0
SILENT = 1e-12
"""The least mean square of an input in the ridge, as a share of the largest."""


@dataclass(frozen=True)
class Moments:
    """Second moments per token of a consumer's kept inputs x and of what it is to give, y; float64.

    Attributes:
        gram: E[x x^T], ``[kept, kept]``.
        cross: E[y x^T], ``[output, kept]``.
        square: E|y|^2.
        tokens: how many tokens the means are over.
    """

    gram: Float[Tensor, "kept kept"]
    cross: Float[Tensor, "output kept"]
    square: float
    tokens: int

    @staticmethod
    def of_dense(
        weight: Float[Tensor, "output input"],
        gram: Float[Tensor, "input input"],
        kept: Bool[Tensor, " input"],
        tokens: int = 1,
    ) -> "Moments":
        """Moments with the dense model's inputs as x and its outputs W x as y, from the Gram matrix of all inputs."""
        w, c = weight.double(), gram.double()
        product = w @ c
        return Moments(c[kept][:, kept], product[:, kept], float((product * w).sum()), tokens)

    def join(self, other: "Moments") -> "Moments":
        """The moments over the tokens of both."""
        tokens = self.tokens + other.tokens
        one, two = self.tokens / tokens, other.tokens / tokens
        return Moments(
            one * self.gram + two * other.gram,
            one * self.cross + two * other.cross,
            one * self.square + two * other.square,
            tokens,
        )

    def error(self, weight: Float[Tensor, "output kept"]) -> float:
        """E|y - W' x|^2 / E|y|^2: the share of the output that is lost; 0 if there is no output."""
        w = weight.double()
        lost = float(((w @ self.gram - 2 * self.cross) * w).sum()) + self.square
        return max(lost, 0.0) / self.square if self.square > 0 else 0.0

    def solution(
        self, factor: Float[Tensor, "kept kept"], weight: Float[Tensor, "output kept"], ridge: Float[Tensor, " kept"]
    ) -> Float[Tensor, "output kept"]:
        """The weights for a ridge, float64.

        Args:
            factor: of Cholesky, of the Gram matrix with the ridge on its diagonal.
            weight: the old weights of the kept inputs.
            ridge: what was added to the diagonal.
        """
        right = self.cross + weight.double() * ridge
        return torch.cholesky_solve(right.T, factor).T


@dataclass(frozen=True)
class DenseTarget:
    """The problem of a consumer that is to give what the dense model's own weights and inputs give.

    It takes fewer products than `Moments`: what is missing is known by the removed inputs alone, which are few.

    Attributes:
        gram: E[x x^T] of the kept inputs x, ``[kept, kept]``.
        weight: the old weights of the kept inputs, float64, ``[output, kept]``.
        removed: those of the removed inputs x_P, float64, ``[output, removed]``.
        across: E[x_P x^T], float64, ``[removed, kept]``.
        lost: E|W_P x_P|^2, what is lost if the kept weights stay as they are.
        square: E|y|^2.
    """

    gram: Float[Tensor, "kept kept"]
    weight: Float[Tensor, "output kept"]
    removed: Float[Tensor, "output removed"]
    across: Float[Tensor, "removed kept"]
    lost: float
    square: float

    @staticmethod
    def of(
        weight: Float[Tensor, "output input"], gram: Float[Tensor, "input input"], kept: Bool[Tensor, " input"]
    ) -> "DenseTarget":
        """The problem of the kept inputs, from the dense weights and the Gram matrix of all inputs."""
        gram = gram.to(_computed(gram, weight))
        square = _energy(weight.to(gram.dtype), gram)
        removed, rows = weight[:, ~kept].double(), gram[~kept].double()
        lost = _energy(removed, rows[:, ~kept])
        return DenseTarget(gram[kept][:, kept], weight[:, kept].double(), removed, rows[:, kept], lost, square)

    def error(self, weight: Float[Tensor, "output kept"]) -> float:
        """The share of the output that is lost; 0 if there is no output. The old weights take no product."""
        change, lost = weight.double() - self.weight, self.lost
        if change.any():
            own = change.to(self.gram.dtype)
            lost += _energy(own, self.gram) - 2 * float(((change @ self.across.T) * self.removed).sum())
        return max(lost, 0.0) / self.square if self.square > 0 else 0.0

    def solution(
        self, factor: Float[Tensor, "kept kept"], weight: Float[Tensor, "output kept"], ridge: Float[Tensor, " kept"]
    ) -> Float[Tensor, "output kept"]:
        """The weights for a ridge, float64; the arguments are those of `Moments.solution`.

        It takes as many right sides as there are removed inputs or outputs, whichever are fewer.
        """
        if len(self.across) < len(self.removed):
            return self.weight + self.removed @ torch.cholesky_solve(self.across.T, factor).T
        return self.weight + torch.cholesky_solve((self.removed @ self.across).T, factor).T


def _computed(one: Tensor, other: Tensor) -> torch.dtype:
    """The type that products of two tensors are computed in: float32 or finer."""
    return torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32)


def _energy(weight: Float[Tensor, "output input"], gram: Float[Tensor, "input input"]) -> float:
    """E|W x|^2 from E[x x^T]."""
    return float(((weight @ gram) * weight).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Unseen:
    """Inputs and outputs of the dense model at tokens that a fit does not see, to judge it by.

    Attributes:
        x: the kept inputs, ``[tokens, kept]``.
        y: what the consumer is to give, ``[tokens, output]``.
    """

    x: Float[Tensor, "tokens kept"]
    y: Float[Tensor, "tokens output"]

    @staticmethod
    def of(
        weight: Float[Tensor, "output input"], rows: Float[Tensor, "tokens input"], kept: Bool[Tensor, " input"]
    ) -> "Unseen":
        """The kept inputs of each row and what the dense weights give there, computed in float32 or finer."""
        rows = rows.to(_computed(rows, weight))
        return Unseen(rows[:, kept], rows @ weight.to(rows.dtype).T)

    def error(self, weight: Float[Tensor, "output kept"]) -> float:
        """The share of the output that is lost over these tokens; 0 if there is no output."""
        square = float(self.y.square().sum(dtype=torch.float64))
        missed = self.y - self.x @ weight.to(self.x.dtype).T
        return float(missed.square().sum(dtype=torch.float64)) / square if square > 0 else 0.0


def dense_problem(
    weight: Float[Tensor, "output input"], inputs: "Inputs", kept: Bool[Tensor, " input"], fisher_share: float
) -> tuple[DenseTarget, Unseen | Moments | None]:
    """What a consumer is to be fitted to in a local repair, and what the fit is judged by.

    Args:
        weight: its old weights, ``[output, input]``.
        inputs: what is known of its inputs.
        kept: the input positions that stay.
        fisher_share: as in `fisher_weighting`.

    Returns:
        The problem, and what is held out; None where nothing is.
    """
    factors, rows = fisher_weighting(inputs.gram, inputs.curvature, fisher_share), inputs.held_out
    problem = DenseTarget.of(weight, inputs.gram * factors, kept)
    if rows is None:
        return problem, None
    if isinstance(factors, float):
        return problem, Unseen.of(weight, rows, kept)
    rows = rows.double()
    return problem, Moments.of_dense(weight, rows.T @ rows / len(rows) * factors, kept)


def solve(
    moments: Moments | DenseTarget, weight: Float[Tensor, "output kept"], damping: float, floor: float = SILENT
) -> tuple[Float[Tensor, "output kept"], float]:
    """Solve the damped least-squares problem for the weights of the kept inputs.

    Where the damped Gram matrix is not positive definite beyond rounding, because the calibration text has fewer
    tokens than inputs or sums were rounded, the damping grows by tens until it is.

    Args:
        moments: of the kept inputs and the target.
        weight: W_K, the old weights of the kept inputs.
        damping: lambda, above 0.
        floor: the least of D, as a share of its largest.

    Returns:
        W' in float64, and the damping that was used.

    Raises:
        StatisticsError: if no damping up to 100 makes the matrix positive definite.
    """
    diagonal = moments.gram.diagonal().double()
    scale = diagonal.clamp_min(floor * float(diagonal.max()))
    while True:
        damped = moments.gram.to(torch.float64, copy=True)
        damped.diagonal().add_(damping * scale)
        if (factor := cholesky(damped)) is not None:
            return moments.solution(factor, weight, damping * scale), damping
        if not damping < _LARGEST:
            raise StatisticsError(
                f"a Gram matrix is not positive definite with slice.damping = {damping:g}; use more calibration text"
            )
        damping = min(10 * damping, _LARGEST)


@dataclass(frozen=True)
class Fit:
    """The repaired weights of one consumer, and how well they do.

    Attributes:
        consumer: the map.
        weight: new weights in storage order and dense shape, zero where inputs are removed; None for
            a repair of the bias alone.
        bias: the new bias, if that changes.
        damping: the ridge that was used; NaN where all inputs that stay are 0 on the text of the fit, so that there is
            nothing to fit and the old weights stay.
        before: share of the output lost by the old weights on the kept inputs, on the text of the fit.
        after: share lost by the new weights there.
        held_out_before: as `before`, on calibration sequences that the fit did not see; NaN without any.
        held_out_after: as `after`, of the fit without those sequences.
        others: new weights beside its own by parameter name, in storage order and dense shape: of the maps that compute
            its inputs, or of the whole layer.
        layer_before: where the whole layer was trained, what it missed of the dense layer's output on held-out
            sequences, as a share of that; with a look ahead of its output and the next layer's together; else NaN.
        layer_after: what it misses after the training.
    """

    consumer: Map
    weight: Tensor | None
    bias: Tensor | None
    damping: float
    before: float
    after: float
    held_out_before: float
    held_out_after: float
    others: Mapping[str, Tensor] = field(default_factory=dict)
    layer_before: float = math.nan
    layer_after: float = math.nan


def require_choice(damping: float | None, held_out: bool) -> None:
    """Stop at a ridge that is none, or where it is to be chosen and nothing is held out to choose it by.

    Raises:
        LibpruneError: saying what to change.
    """
    if damping is not None and not 0 < damping < math.inf:
        raise LibpruneError(f"damping = {damping} is no ridge; give a number above 0, such as 0.001")
    if damping is None and not held_out:
        raise LibpruneError(
            "slice.damping: auto chooses by every eighth calibration sequence, and there are fewer than 8; "
            "use more calibration sequences, or set slice.damping to a number such as 0.001"
        )


def fit_consumer(
    consumer: Map,
    weight: Float[Tensor, "output input"],
    kept: Bool[Tensor, " input"],
    moments: Moments | DenseTarget,
    held_out: Moments | Unseen | None,
    damping: float | None,
    refit: bool = False,
    floor: float = SILENT,
) -> Fit:
    """Fit one consumer, whose weights stay as they are if all inputs that stay are 0: any weights would do there.

    Args:
        consumer: the map.
        weight: its old weights, ``[output, input]``.
        kept: the input positions that stay.
        moments: what the fit is to.
        held_out: the same over sequences that the fit is not to see, or what is there at their tokens.
        damping: the ridge; None for that of `DAMPINGS` that does better on the held-out sequences than those beside it.
        refit: with the ridge settled, fit once more to both sets of sequences together, given as `Moments`.
        floor: as in `solve`.

    Raises:
        LibpruneError: if the damping is not above 0, or is to be chosen and nothing is held out.
    """
    old = weight[:, kept].double()
    require_choice(damping, held_out is not None)
    silent = not moments.gram.any()
    if silent:
        new, used, error = old, math.nan, held_out.error(old) if held_out else math.nan
    elif damping is None:
        assert held_out is not None
        new, used, error = _choose(moments, held_out, old, floor)
    else:
        new, used = solve(moments, old, damping, floor)
        error = held_out.error(new) if held_out else math.nan
    after = moments.error(new)
    if refit and held_out and not silent:
        assert isinstance(moments, Moments) and isinstance(held_out, Moments)
        new, used = solve(moments.join(held_out), old, used, floor)
    whole = weight.new_zeros(weight.shape)
    whole[:, kept] = new.to(weight.dtype)
    stored = (whole.T if consumer.transposed else whole).contiguous().cpu()
    before = held_out.error(old) if held_out else math.nan
    return Fit(consumer, stored, None, used, moments.error(old), after, before, error)


def _choose(
    moments: Moments | DenseTarget, held_out: Moments | Unseen, old: Float[Tensor, "output kept"], floor: float
) -> tuple[Float[Tensor, "output kept"], float, float]:
    """Walk along `DAMPINGS` to the least error on held-out sequences; the weights, their ridge and the error there.

    The error falls and then rises with the ridge, so that three of the eight solutions mostly do.
    """
    tried: dict[int, tuple[float, Tensor, float]] = {}
    best, known = _FIRST, -1
    while best != known:
        known = best
        for place in range(max(0, known - 1), min(len(DAMPINGS), known + 2)):
            if place not in tried:
                new, used = solve(moments, old, DAMPINGS[place], floor)
                tried[place] = held_out.error(new), new, used
        best = min(tried, key=lambda place: (tried[place][0], place))
    error, new, used = tried[best]
    return new, used, error


def pruned_consumers(architecture: Architecture, plan: Plan) -> Iterator[tuple[Map, Bool[Tensor, " input"]]]:
    """Every consumer that loses some of its inputs, but not all, with the positions that stay."""
    for consumer in architecture.maps:
        kept = input_mask(architecture, plan, consumer)
        if kept.any() and not kept.all():
            yield consumer, torch.from_numpy(kept)


@dataclass(frozen=True)
class Inputs:
    """What is known of a consumer's inputs in the dense model; of a stack for each of its copies.

    Attributes:
        gram: E[x x^T] over the sequences of the fit, ``[input, input]``.
        held_out: inputs at some tokens of the held-out sequences, ``[rows, input]``; None without any.
        curvature: E[delta^2], delta the gradient at each input, ``[input]``; for the Fisher weighting.
    """

    gram: Float[Tensor, "*copies input input"]
    held_out: Float[Tensor, "*copies rows input"] | None = None
    curvature: Float[Tensor, "*copies input"] | None = None

    def on(self, device: torch.device) -> "Inputs":
        """The tensors on a device."""
        held_out, curvature = (
            None if tensor is None else tensor.to(device) for tensor in (self.held_out, self.curvature)
        )
        return Inputs(self.gram.to(device), held_out, curvature)


def repair_local(
    architecture: Architecture,
    plan: Plan,
    weight_of: Callable[[str], Tensor],
    inputs_of: Callable[[Map], Inputs],
    damping: float | None,
    fisher_share: float = 0.0,
    floor: float = SILENT,
    keep: Keep = in_memory,
    device: torch.device = CPU,
) -> list[Fit]:
    """Closed-form repair of every pruned consumer, against the dense model's own inputs.

    Mixtures that lose whole experts are left out: their tokens take other ways in the pruned model, which no Gram
    matrix of the dense one knows.

    Args:
        plan: what is removed.
        weight_of: a parameter of the dense model by its name; columns behind those of the consumer's inputs, such as a
            bias, always stay.
        inputs_of: what is known of a consumer's inputs, and of further columns.
        damping: as in `fit_consumer`.
        fisher_share: as in `fisher_weighting`.
        floor: as in `solve`.
        keep: where the new weights wait.
        device: where to compute, if the matrices of a consumer fit there; new weights are on the CPU.
    """
    fits = []
    for consumer, own in pruned_consumers(architecture, plan):
        rerouted = consumer.stack is not None and architecture.parts[consumer.part].router != ""
        if rerouted:
            continue
        inputs = inputs_of(consumer)
        like = weight_of(consumer.weight)
        place = fit_place(device, inputs.gram)
        weight, inputs = oriented(consumer, like).to(place), inputs.on(place)
        if consumer.stack:
            from libprune.repair.experts import fit_channels  # which fits by functions of this module

            fits.append(waiting(fit_channels(consumer, weight, own, inputs, damping, fisher_share, like), keep))
            continue
        kept = torch.cat([own, own.new_ones(weight.shape[1] - len(own))]).to(place)
        problem, held_out = dense_problem(weight, inputs, kept, fisher_share)
        fits.append(waiting(fit_consumer(consumer, weight, kept, problem, held_out, damping, floor=floor), keep))
    return fits


def waiting(fit: Fit, keep: Keep) -> Fit:
    """A fit whose tensors wait elsewhere."""
    weight, bias = (None if tensor is None else keep(tensor) for tensor in (fit.weight, fit.bias))
    return replace(fit, weight=weight, bias=bias, others={name: keep(one) for name, one in fit.others.items()})


def fit_place(device: torch.device, gram: Tensor) -> torch.device:
    """The device for a fit if its matrices have room there, or else the CPU.

    A fit holds six float64 matrices of the size of the Gram matrix at once.
    """
    return device if fits_on(device, 2 * torch.float64.itemsize * gram.numel()) else CPU


def fisher_weighting(
    gram: Float[Tensor, "input input"], curvature: Float[Tensor, " input"] | None, share: float
) -> Float[Tensor, "input input"] | float:
    """Factors on the elements of a Gram matrix that let inputs count by what they do to the loss.

    C_eff = (1 - share) C + share D^1/2 C D^1/2 tr(C) / tr(D^1/2 C D^1/2),  D = diag E[delta^2],
    with delta the gradient at that input. The trace is matched so that the share means the same for
    every consumer.

    Args:
        gram: C, which sets the factor between the traces.
        curvature: E[delta^2] of every input; not needed with a share of 0.
        share: 0 for C itself, 1 for the weighted matrix alone.

    Returns:
        C_eff / C, in float64.
    """
    if share == 0 or curvature is None:
        return 1.0
    root = curvature.double().sqrt()
    diagonal = gram.diagonal().double()
    trace = float((diagonal * root.square()).sum())
    if trace == 0:  # nothing to weight by
        return 1.0
    factor = share * float(diagonal.sum()) / trace
    return (1 - share) + factor * torch.outer(root, root)


def repair_bias(
    architecture: Architecture,
    plan: Plan,
    weight_of: Callable[[str], Tensor],
    bias_of: Callable[[Map], Tensor | None],
    mean_of: Callable[[Map], Tensor],
    inputs_of: Callable[[Map], Inputs],
) -> list[Fit]:
    """Give every consumer back what its removed inputs contributed on average: b' = b + W_P E[x_P].

    An et al. 2024 (FLAP).

    Args:
        plan: what is removed.
        weight_of: a parameter of the dense model by its name.
        bias_of: a consumer's bias, zeros where the config can add one, None where it cannot.
        mean_of: E[x] of a consumer's inputs over the sequences of the fit.
        inputs_of: what is known of a consumer's inputs.

    Raises:
        LibpruneError: naming a consumer that can have no bias.
    """
    fits = []
    for consumer, kept in pruned_consumers(architecture, plan):
        bias = None if consumer.stack else bias_of(consumer)
        if bias is None:
            raise LibpruneError(
                f"slice.repair: bias needs a bias on {consumer.module}, and the config of this model cannot say one; "
                "choose slice.repair: local or sequential"
            )
        inputs = inputs_of(consumer)
        weight, mean = oriented(consumer, weight_of(consumer.weight)).double(), mean_of(consumer).double()
        old, shift = weight * kept, weight[:, ~kept] @ mean[~kept]
        fitted = Moments.of_dense(weight, inputs.gram, torch.ones_like(kept))
        before = fitted.error(old)
        after = before - float(shift.square().sum()) / fitted.square if fitted.square > 0 else 0.0
        held_out = [np.nan, np.nan]
        if inputs.held_out is not None:
            lost = inputs.held_out.double() @ (weight - old).T
            total = float((inputs.held_out.double() @ weight.T).square().sum())
            if total > 0:
                held_out = [float((lost - by).square().sum()) / total for by in (torch.zeros_like(shift), shift)]
        new = (bias.double() + shift).to(bias.dtype)
        fits.append(Fit(consumer, None, new, 0.0, before, after, held_out[0], held_out[1]))
    return fits


def new_parameters(fits: Iterable[Fit]) -> dict[str, Tensor]:
    """The repaired weights and biases by parameter name, in storage order and dense shape."""
    parameters = {}
    for fit in fits:
        if fit.weight is not None:
            parameters[fit.consumer.weight] = fit.weight
        if fit.bias is not None:
            parameters[fit.consumer.bias] = fit.bias
        parameters |= fit.others
    return parameters


def mean_errors(fits: Sequence[Fit]) -> dict[str, float]:
    """Shares of the output lost, means over the repaired consumers and over the trained layers that have the figure.

    A figure that none has, such as those of held-out sequences where nothing is held out, is left out.
    """
    layers = {fit.consumer.layer: fit for fit in fits}.values()  # all fits of a layer agree in what it misses
    lost = {f"lost_{name}": mean_of(fits, name) for name in ("before", "after", "held_out_before", "held_out_after")}
    found = lost | {name: mean_of(layers, name) for name in ("layer_before", "layer_after")}
    return {name: mean for name, mean in found.items() if not math.isnan(mean)}


def mean_of(fits: Iterable[Fit], name: str) -> float:
    """The mean of a figure over the fits that have it; NaN if none has."""
    known = [value for fit in fits if not math.isnan(value := getattr(fit, name))]
    return float(np.mean(known)) if known else math.nan


FIGURES = ("damping", "before", "after", "held_out_before", "held_out_after", "layer_before", "layer_after")
"""The figures of a fit."""


def fit_table(fits: list[Fit]) -> Columns:
    """One row a repaired consumer."""
    return {
        "layer_idx": np.array([fit.consumer.layer for fit in fits], dtype=np.int64),
        "group_type": np.array([fit.consumer.part for fit in fits], dtype=np.str_),
        "module": np.array([fit.consumer.module for fit in fits], dtype=np.str_),
        **{name: np.array([getattr(fit, name) for fit in fits], dtype=np.float64) for name in FIGURES},
        "others": np.array([bool(fit.others) for fit in fits], dtype=np.bool_),
    }
