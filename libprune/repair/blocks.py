"""Training the weights of one layer of the pruned model to give what the dense layer gave.

Least squares refits one map at a time. Here all weights of a layer are fitted together, norms among them, by gradient
steps, and the layers one after the other:

    theta' = argmin E w |F(h^; theta) - h'|^2,   w = min(1, m / |h'|)^2

F is the layer, h^ the residual stream that the pruned and fitted layers before it hand on, h' the dense model's stream
behind the layer, and m the median length of h' over all tokens. So a layer corrects what the layers before it have lost
as well. A few tokens have states hundreds of times longer than others, and w keeps them from being all that is fitted.

Held-out sequences judge after every epoch. The weights with the lowest error are kept, those before the first step
among them, since fits of this kind easily learn the text by heart (Shin et al. 2024, arXiv 2406.15524). The weights
half way between those before the first step and those after the epoch are judged too: where an epoch goes too far, they
often are the better ones. Fitting a block to its dense output is known from quantization: Li et al. 2021, BRECQ, arXiv
2102.05426. The steps are those of Adam (Kingma & Ba 2015) on float32 copies of the weights.

With a look ahead, F is the layer and the next one behind it, h' the dense model's streams behind both, side by side,
and theta still the weights of the first layer alone. The next layer has the weights of its own fits meanwhile. So a
layer is fitted to what the next one makes of its output as well.

A network that is not a transformer is described as one layer; `libprune.repair.of_modules` trains it whole.

Memory: of one layer the weights seven times in float32, and what backward needs for the tokens of a step; on the host
the states of the whole text before and behind the layer, and with a look ahead also behind the next one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR

from libprune.engine.errors import LibpruneError
from libprune.repair.least_squares import Fit

STEP_TOKENS = 1024
"""Tokens of one step, rounded down to whole sequences, at least one."""
_BETAS = (0.9, 0.98)
_WARMUP = 5
"""Steps in which the learning rate rises to its largest value."""
_SHARES = (1.0, 0.5)
"""Where weights that are judged lie between those before the first step, 0, and those after the epoch, 1."""
_LAST = 0.1
"""The share of the learning rate that is left in the last step; it falls linearly."""


@dataclass(frozen=True)
class Epochs:
    """How a layer is trained.

    Attributes:
        number: how often the text is gone through, at most.
        rate: the largest learning rate.
        patience: after so many epochs in a row of which none was better, the training ends.

    Raises:
        LibpruneError: if one of them is not above 0.
    """

    number: int
    rate: float
    patience: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise LibpruneError(f"{name} = {value} of the epochs is no number above 0")


@dataclass(frozen=True)
class Trained:
    """What the training of a layer came to.

    Attributes:
        tensors: the weights that changed by parameter name, float32 or finer; none where no epoch was better than
            before.
        before: the held-out error before training, as a share of the weighted squared length of the dense stream.
        after: that of the weights that were kept.
    """

    tensors: dict[str, Tensor]
    before: float
    after: float


def train_layer(
    run: Callable[[int], Float[Tensor, "... width"]],
    targets: Sequence[Float[Tensor, "... width"]],
    held_out: Sequence[bool],
    parameters: Mapping[str, nn.Parameter],
    epochs: Epochs,
) -> Trained:
    """Train the weights of a layer; the parameters hold the best ones afterwards.

    Args:
        run: the output of the layer for a batch, of which gradients can be taken where they are enabled.
        targets: what the layer is to give, by batch, on the host.
        held_out: whether a batch is held out; at least one is, and one is not.
        parameters: the weights to train, by name.
        epochs: how they are trained.
    """
    errors = _Errors(run, targets, next(iter(parameters.values())).device)
    judged, fitted = ([number for number, out in enumerate(held_out) if out is flag] for flag in (True, False))
    before = least = errors.mean(judged)
    kept: dict[str, Tensor] = {}
    if not before:
        return Trained(kept, before, before)
    old = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    steps = _Steps(parameters, epochs, len(fitted))
    generator = torch.Generator().manual_seed(0)
    worse = 0
    for _ in range(epochs.number):
        for place in torch.randperm(len(fitted), generator=generator).tolist():
            steps.take(lambda: errors.of(fitted[place]) / before)  # noqa: B023 - called at once
        worse += 1
        for share in _SHARES:
            weights = steps.weights(old, share)
            _copy(weights, parameters)
            if (now := errors.mean(judged)) < least:
                kept, least, worse = weights, now, 0
        if worse == epochs.patience:
            break
        steps.go_on()
    _copy(kept or old, parameters)
    changed = {name: tensor for name, tensor in kept.items() if not torch.equal(tensor, old[name].to(tensor))}
    return Trained(changed, before, least)


def trained_fits(fits: Sequence[Fit], trained: Trained) -> list[Fit]:
    """Fits of a layer, at least one, with trained weights in their place and the errors of the whole layer.

    What is not the weight of a fitted map goes to the first of them.
    """
    new = {name: tensor.cpu() for name, tensor in trained.tensors.items()}
    first, *rest = (
        replace(
            fit,
            weight=new.pop(fit.consumer.weight, fit.weight),
            bias=fit.bias if fit.bias is None else new.pop(fit.consumer.bias, fit.bias),
            layer_before=trained.before,
            layer_after=trained.after,
        )
        for fit in fits
    )
    return [replace(first, others={**first.others, **new}), *rest]


class _Errors:
    """Weighted squared errors of a layer, as shares of the weighted squared length of what it is to give."""

    def __init__(self, run: Callable[[int], Tensor], targets: Sequence[Tensor], device: torch.device) -> None:
        self._run, self._targets, self._device = run, targets, device
        lengths = [target.float().norm(dim=-1) for target in targets]
        median, least = torch.cat([length.flatten() for length in lengths]).median(), torch.finfo(torch.float32).tiny
        self._roots = [(median / length.clamp(min=least)).clamp(max=1)[..., None] for length in lengths]
        self._squares = [
            float((length[..., None] * w).square().sum()) for length, w in zip(lengths, self._roots, strict=True)
        ]

    def of(self, number: int) -> Tensor:
        """The share that a batch misses; zero where it is to give nothing."""
        target, root = (kind[number].to(self._device) for kind in (self._targets, self._roots))
        return (root * (self._run(number).float() - target.float())).square().sum() / (self._squares[number] or 1.0)

    @torch.no_grad()
    def mean(self, numbers: Sequence[int]) -> float:
        """The share that some batches miss together."""
        squares = [self._squares[number] for number in numbers]
        missed = sum(float(self.of(number)) * square for number, square in zip(numbers, squares, strict=True))
        return missed / (sum(squares) or 1.0)


class _Steps:
    """Steps of Adam on copies of some parameters, float32 or finer."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], epochs: Epochs, batches: int) -> None:
        self._parameters, number = parameters, epochs.number * batches
        self._copies = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in parameters.items()
        }
        self._adam = Adam(self._copies.values(), lr=epochs.rate, betas=_BETAS)

        def share(step: int) -> float:
            return min(1.0, (step + 1) / _WARMUP) * (1 - (1 - _LAST) * step / number)

        self._rate = LambdaLR(self._adam, share)

    def take(self, loss: Callable[[], Tensor]) -> None:
        """Take a step against the gradient of a loss, which is computed with the parameters."""
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), list(self._parameters.values()), allow_unused=True)
        for copy, gradient in zip(self._copies.values(), gradients, strict=True):
            copy.grad = None if gradient is None else gradient.to(copy)
        self._adam.step()
        self._rate.step()
        self.go_on()

    def weights(self, first: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """The weights that lie so far between the first ones, 0, and those of now, 1; float32 or finer."""
        return {name: first[name].to(copy).lerp(copy, share) for name, copy in self._copies.items()}

    def go_on(self) -> None:
        """Give the parameters the weights of now."""
        _copy(self._copies, self._parameters)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
