"""First-order statistics: the mean gradient of every block parameter, and the squared mask gradient of every unit."""

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
from libprune.units import sum_positions, unit_sums

Block = tuple[int, str]


@dataclass
class GradientSums:
    """Running sums over calibration sequences.

    With L_i the mean-token loss of sequence i in nats, n_tok its loss-counted tokens, and s_t(u) =
    sum over the positions p of unit u of x_p dL_i/dx_p at token t of the consumer's input (the
    gradient of L_i by the unit's own mask is the sum of s_t over t):

    Attributes:
        gradients: parameter name to the sum over i of dL_i/dW, float32.
        by_sequence: block to the sum over i of (sum_t s_t)^2; ``[units]``, float64.
        by_token: block to the sum over i and t of (n_tok s_t)^2; ``[units]``, float64.
        sequences: sequences seen.
        tokens: input tokens seen.
        loss: sum over i of L_i.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    by_sequence: dict[Block, Tensor] = field(default_factory=dict)
    by_token: dict[Block, Tensor] = field(default_factory=dict)
    sequences: int = 0
    tokens: int = 0
    loss: float = 0.0

    def mean_gradient(self, name: str) -> Tensor:
        """G = mean over sequences of the gradient of a parameter."""
        return self.gradients[name] / self.sequences

    def unit_fisher(self, block: Block, n_tok: int, over: str) -> Tensor:
        """Half the Fisher information of each unit's mask, per token, in nats; ``[units]``.

        `sequence`: n_tok/2 E_i[(sum_t s_t)^2]; `token`: E_t[(n_tok s_t)^2]/2. The two agree when
        the tokens of a sequence are independent. Second-order term of the loss along the mask
        (Optimal Brain Damage, LeCun et al. 1989, with the Fisher in place of the Hessian).
        """
        if over == "sequence":
            return 0.5 * n_tok * self.by_sequence[block] / self.sequences
        return 0.5 * self.by_token[block] / self.tokens


def collect_gradients(
    model: PreTrainedModel, architecture: Architecture, batches: Iterable[tuple[int, Tensor]]
) -> GradientSums:
    """One forward and backward pass over the batches.

    Each parameter's gradient leaves the model as soon as backward has it, summed in float32, so a
    low-precision model adds no error over batches.

    Raises:
        StatisticsError: naming the first layer, from the output, and the sequence whose loss or
            gradient is not finite.
    """
    sums = GradientSums()
    with _collecting(model, architecture, sums) as state:
        for first, ids in batches:
            state.first, state.n_tok = first, ids.shape[1] - 1
            losses = sequence_losses(model, ids)
            require_finite(losses.detach(), first, "the loss")
            losses.sum().backward()
            sums.sequences += len(ids)
            sums.tokens += ids.numel()
            sums.loss += float(losses.detach().double().sum())
    return sums


@dataclass
class _Batch:
    """What the hooks need to know of the batch in progress."""

    first: int = 0
    n_tok: int = 1


@contextmanager
def _collecting(model: PreTrainedModel, architecture: Architecture, sums: GradientSums) -> Iterator[_Batch]:
    state = _Batch()
    wanted = {p.name for p in architecture.parameters if p.layer is not None}
    with hooked(model) as handles:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
            if name in wanted:
                handles.append(parameter.register_post_accumulate_grad_hook(partial(_take_gradient, name, sums)))
        for layer, part in architecture.blocks():
            for consumer in architecture.consumers(layer, part):
                hook = partial(_watch_input, architecture, consumer, sums, state)
                handles.append(model.get_submodule(consumer.module).register_forward_pre_hook(hook))
        yield state


def _take_gradient(name: str, sums: GradientSums, parameter: Tensor) -> None:
    assert parameter.grad is not None
    if name in sums.gradients:
        sums.gradients[name] += parameter.grad.cpu()
    else:
        sums.gradients[name] = parameter.grad.float().cpu()
    parameter.grad = None


def _watch_input(
    architecture: Architecture, consumer: Map, sums: GradientSums, state: _Batch, module: nn.Module, args: tuple[Tensor]
) -> None:
    """Forward pre-hook: when the gradient of the consumer's input arrives, add up the mask gradients."""
    require_finite(args[0].detach(), state.first, f"the input of {consumer.module}")
    x = args[0].detach()  # holding the tensor itself would tie its graph into a cycle that is never freed

    def on_gradient(gradient: Tensor) -> None:
        axis = architecture.parts[consumer.part].axis
        units = consumer.input.units(axis, architecture.sizes)
        products = x.float() * gradient.float()
        mask = sum_positions(products, units, architecture.units(consumer.part))
        require_finite(mask, state.first, f"the gradient at the input of {consumer.module}")
        block = (consumer.layer, consumer.part)
        _add(sums.by_sequence, block, mask.sum(1).double().square().sum(0))
        _add(sums.by_token, block, (mask * state.n_tok).square().sum((0, 1), dtype=torch.float64))

    args[0].register_hook(on_gradient)


def _add(table: dict[Block, Tensor], block: Block, values: Tensor) -> None:
    values = values.cpu()
    table[block] = table[block] + values if block in table else values


def gradient_columns(
    sums: GradientSums, architecture: Architecture, weights: Mapping[str, Tensor], n_tok: int, layer: int, part: str
) -> dict[str, NDArray[np.float64]]:
    """Per-unit first-order sums of a block: sum |W G|, sum W G, and the unit Fisher both ways."""
    names = [parameter.name for parameter in architecture.parameters_of(layer, part)]
    signed = {name: weights[name].detach().cpu().double() * sums.mean_gradient(name).double() for name in names}
    block = (layer, part)
    return {
        "taylor": unit_sums(architecture, layer, part, {name: tensor.abs() for name, tensor in signed.items()}),
        "taylor_signed": unit_sums(architecture, layer, part, signed),
        "unit_fisher_sequence": sums.unit_fisher(block, n_tok, "sequence").numpy(),
        "unit_fisher_token": sums.unit_fisher(block, n_tok, "token").numpy(),
    }
