"""The diagonal of the Hessian, estimated by squared per-sequence gradients."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.architecture import Architecture, Map
from libprune.compute import hooked, require_finite, sequence_losses
from libprune.errors import StatisticsError
from libprune.units import unit_sums


@dataclass
class SquaredGradients:
    """Running sums over calibration sequences.

    Attributes:
        squares: parameter name to the sum over i of (dL_i/dW)^2, L_i the mean-token loss; float32.
        sequences: sequences seen.
    """

    squares: dict[str, Tensor] = field(default_factory=dict)
    sequences: int = 0

    def diagonal(self, name: str, n_tok: int, estimator: str) -> Tensor:
        """The estimate of the Hessian diagonal of the mean-token loss, for one parameter.

        `fisher_sample` is mean_i g_i^2, as often written; `fisher` multiplies it by the n_tok
        loss-counted tokens of a sequence, over which the mean in L_i shrinks independent token
        gradients (empirical Fisher: Kunstner et al. 2019, "Limitations of the empirical Fisher
        approximation", which also says when it is not the Hessian).
        """
        assert estimator in {"fisher", "fisher_sample"}
        return self.squares[name] * ((n_tok if estimator == "fisher" else 1) / self.sequences)


def collect_squared_gradients(
    model: PreTrainedModel, architecture: Architecture, batches: Iterable[tuple[int, Tensor]]
) -> SquaredGradients:
    """Squared gradients of every sequence at the cost of one batched backward pass.

    The gradient of a linear map for one sequence is the product of its output gradients and its
    inputs over that sequence's tokens, so autograd only computes the former.

    Raises:
        StatisticsError: naming the module and sequence whose gradient is not finite.
    """
    sums = SquaredGradients()
    with _collecting(model, architecture, sums) as state:
        for first, ids in batches:
            state["first"] = first
            sequence_losses(model, ids).sum().backward()
            sums.sequences += len(ids)
    for name, squares in sums.squares.items():
        if not torch.isfinite(squares).all():
            raise StatisticsError(f"a squared gradient of {name} overflows; try compute.dtype: float32")
    return sums


@contextmanager
def _collecting(model: PreTrainedModel, architecture: Architecture, sums: SquaredGradients) -> Iterator[dict[str, int]]:
    state = {"first": 0}
    with hooked(model) as handles:
        model.requires_grad_(False)
        embedding = model.get_input_embeddings()
        handles.append(embedding.register_forward_hook(lambda module, args, output: output.requires_grad_(True)))
        for entry in architecture.maps:
            hook = partial(_watch_output, entry, sums, state)
            handles.append(model.get_submodule(entry.module).register_forward_hook(hook))
        yield state


def _watch_output(
    entry: Map, sums: SquaredGradients, state: dict[str, int], module: nn.Module, args: tuple[Tensor], output: Tensor
) -> None:
    x = args[0].detach()
    has_bias = getattr(module, "bias", None) is not None

    def on_gradient(gradient: Tensor) -> None:
        require_finite(gradient, state["first"], f"the gradient at the output of {entry.module}")
        for inputs, deltas in zip(x, gradient, strict=True):
            weight = inputs.T @ deltas if entry.transposed else deltas.T @ inputs
            _add_square(sums, entry.weight, weight)
            if has_bias:
                _add_square(sums, f"{entry.module}.bias", deltas.sum(0, dtype=torch.float32))

    output.register_hook(on_gradient)


def _add_square(sums: SquaredGradients, name: str, gradient: Tensor) -> None:
    values = gradient.float()
    if name in sums.squares:
        sums.squares[name].addcmul_(values, values)
    else:
        sums.squares[name] = values.square()


def hessian_columns(
    sums: SquaredGradients,
    architecture: Architecture,
    weights: Mapping[str, Tensor],
    n_tok: int,
    estimator: str,
    layer: int,
    part: str,
) -> dict[str, NDArray[np.float64]]:
    """Per-unit second-order sum of a block: half the sum of |W^2 H|, in nats."""
    names = {parameter.name for parameter, _, _ in architecture.carriers(layer, part)}
    terms = {
        name: 0.5 * (weights[name].detach().cpu().double().square() * sums.diagonal(name, n_tok, estimator).cpu()).abs()
        for name in names
    }
    return {"fisher": unit_sums(architecture, layer, part, terms)}
