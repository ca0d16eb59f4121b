"""Repair of networks that are not transformers: each consumer's weights and bias, fitted to the inputs that are left.

The fit is that of `libprune.repair.least_squares`; where a map has a bias of its own, this is the weight of a constant
input of 1. One that several maps share stays.
A map whose inputs are all 0, as behind dead rectifiers, stays as it is: any weights would do.

After the fits all weights can be trained together, `libprune.repair.blocks`. A network is described as one layer, so
the block is the whole network: what it is to give are the dense network's outputs.
"""

import copy
from collections import Counter

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from libprune.collection.calibration import held_out
from libprune.collection.module_hooks import watched_inputs
from libprune.engine.architecture import Architecture, Map
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import hooked, masked, oriented
from libprune.models.samples import Samples
from libprune.pipeline.layout import Layout
from libprune.pipeline.shards import GRAM, read_tensor
from libprune.repair.blocks import Epochs, train_layer, trained_fits
from libprune.repair.least_squares import (
    Fit,
    Inputs,
    Moments,
    fit_consumer,
    new_parameters,
    pruned_consumers,
    repair_local,
)
from libprune.repair.repairs import inputs_of

State = dict[str, Tensor]
"""Tensors of a network by name."""

EPOCHS = Epochs(number=30, rate=1e-3, patience=30)
"""How a network is trained if nothing else is asked for. The first epochs are often worse than the fits, and only the
small steps at the end are better."""
_STEP = 32
"""Samples of a step of the training."""

_FLOOR = 1e-2
"""The least mean square of an input in the ridge, as a share of the largest. A unit that hardly ever fires in the dense
network would get any weight, and may fire all the time in the pruned one; a recurrent network then diverges."""


def fitted_state(network: nn.Module) -> State:
    """A network's tensors by name, without biases that several modules share: a fit of one would change the others."""
    owners = Counter(id(parameter) for module in network.modules() for parameter in module.parameters(recurse=False))
    named = network.named_parameters(remove_duplicate=False)
    shared = {name for name, parameter in named if owners[id(parameter)] > 1 and name.endswith("bias")}
    return {name: tensor for name, tensor in network.state_dict().items() if name not in shared}


def repair_modules(
    layout: Layout, architecture: Architecture, plan: Plan, state: State, damping: float | None
) -> list[Fit]:
    """Fit every consumer and its bias to what the dense network gives it, from the cached Gram matrices.

    Args:
        layout: where the activation statistics are.
        plan: what is removed.
        state: the dense network's tensors, of `fitted_state`; a bias that is not among them stays.
        damping: the ridge; None to choose it on held-out samples.
    """
    read = inputs_of(layout, architecture, curvature=False)
    consumers = {consumer.weight: consumer for consumer in architecture.maps}

    def inputs(consumer: Map) -> Inputs:
        own = read(consumer)
        if consumer.bias not in state:
            return own
        mean = read_tensor(layout.activations, 0, f"{consumer.module}{GRAM}.mean", "activations").double()
        return Inputs(_bordered(own.gram.double(), mean), None if own.held_out is None else _with_ones(own.held_out))

    def weight_of(name: str) -> Tensor:
        return _with_bias(consumers[name], state)

    fits = repair_local(architecture, plan, weight_of, inputs, damping, floor=_FLOOR)
    return [_split(fit, state) for fit in fits]


def repair_modules_in_order(
    network: nn.Module, architecture: Architecture, plan: Plan, batches: list[Samples], damping: float | None
) -> list[Fit]:
    """Fit one consumer after the other, in the order in which they run, to what the pruned network hands on there.

    Each is to give what it gives in the dense network. Takes two passes for every consumer.

    Args:
        network: the dense one.
        plan: what is removed.
        batches: calibration samples.
        damping: the ridge; None to choose it on held-out samples.
    """
    current, state = copy.deepcopy(network), fitted_state(network)
    pruned = dict(pruned_consumers(architecture, plan))
    fits = []
    for consumer in _running_order(network, architecture, batches[0]):
        if consumer in pruned:
            kept = pruned[consumer]
            whole = _with_bias(consumer, state)
            if consumer.bias in state:
                kept = torch.cat([kept, torch.ones(1, dtype=torch.bool)])
            moments, kept_out = _moments(network, current, architecture, plan, consumer, whole, kept, batches)
            fit = fit_consumer(consumer, whole, kept, moments, kept_out, damping, refit=True, floor=_FLOOR)
            fits.append(_split(fit, state))
            set_weights(current, fits[-1:])
    return fits


def train_modules(
    network: nn.Module,
    architecture: Architecture,
    plan: Plan,
    samples: Samples,
    fits: list[Fit],
    epochs: Epochs,
) -> list[Fit]:
    """Train all weights of a pruned network together, to give what the dense one gives.

    A sample is to a network what a token is to a layer. Batch norms keep their statistics.

    Args:
        network: the dense one, in evaluation mode.
        plan: what is removed.
        samples: calibration samples on the network's device, at least one of them held out.
        fits: of the consumers, with which the training begins. Without any nothing is trained.
        epochs: how to train.

    Returns:
        The fits with the trained weights.

    Raises:
        LibpruneError: if the outputs are no numbers by samples, or have no gradient by the weights.
    """
    if not fits:
        return fits
    current = copy.deepcopy(network)
    set_weights(current, fits)
    kept_back = held_out(0, len(samples))
    parts = [(batch, out) for out in (False, True) for batch in samples[kept_back == out].passes(_STEP)]
    with torch.no_grad():
        targets = [_outputs(network, batch).cpu() for batch, _ in parts]
    with hooked(current), masked(current, architecture, plan):
        parameters = dict(current.requires_grad_().named_parameters())
        trained = train_layer(
            lambda number: _outputs(current, parts[number][0]), targets, [out for _, out in parts], parameters, epochs
        )
    return trained_fits(fits, trained)


def _outputs(network: nn.Module, batch: Samples) -> Float[Tensor, "samples outputs"]:
    """What a network gives, a row for each sample.

    Raises:
        LibpruneError: if that cannot be trained.
    """
    outputs: Tensor = network(batch.inputs)
    if not outputs.is_floating_point() or outputs.shape[:1] != (len(batch),):
        raise LibpruneError(
            f"the outputs for {len(batch)} samples are {outputs.dtype} of shape {list(outputs.shape)}; repair = "
            "'block' needs real numbers, samples in the first dimension; take 'local'"
        )
    if torch.is_grad_enabled() and not outputs.requires_grad:
        raise LibpruneError(
            "the outputs have no gradient by the weights, so repair = 'block' cannot train; take 'local'"
        )
    return outputs.reshape(len(batch), -1)


def set_weights(network: nn.Module, fits: list[Fit]) -> None:
    """Put the repaired weights and biases into a network of the dense shape."""
    with torch.no_grad():
        for name, tensor in new_parameters(fits).items():
            network.get_parameter(name).copy_(tensor)


def _with_bias(consumer: Map, state: State) -> Float[Tensor, "output inputs"]:
    weight = oriented(consumer, state[consumer.weight])
    return torch.cat([weight, state[consumer.bias][:, None]], 1) if consumer.bias in state else weight


def _split(fit: Fit, state: State) -> Fit:
    """A fit of weight and bias together as one with the weight in its stored shape and the bias by itself."""
    assert fit.weight is not None
    weight, bias = fit.weight, None
    if fit.consumer.bias in state:
        weight, bias = weight[:, :-1].contiguous(), weight[:, -1].contiguous()
    shape = state[fit.consumer.weight].shape
    errors = (fit.damping, fit.before, fit.after, fit.held_out_before, fit.held_out_after)
    return Fit(fit.consumer, weight.view(shape), bias, *errors)


def _with_ones(rows: Float[Tensor, "rows input"]) -> Float[Tensor, "rows inputs"]:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def _bordered(gram: Float[Tensor, "input input"], mean: Float[Tensor, " input"]) -> Float[Tensor, "inputs inputs"]:
    """The second moments of an input and of a constant 1."""
    border = torch.cat([mean, mean.new_ones(1)])
    return torch.cat([torch.cat([gram, mean[None]]), border[:, None]], 1)


def _running_order(network: nn.Module, architecture: Architecture, batch: Samples) -> list[Map]:
    """The maps in the order of their first calls."""
    with watched_inputs(network, architecture.maps, len(batch)) as seen, torch.no_grad():
        network(batch.inputs)
    return list(seen)


def _moments(
    dense: nn.Module,
    current: nn.Module,
    architecture: Architecture,
    plan: Plan,
    consumer: Map,
    whole: Float[Tensor, "output inputs"],
    kept: Bool[Tensor, " inputs"],
    batches: list[Samples],
) -> tuple[Moments, Moments | None]:
    """Moments of a consumer's inputs in the pruned network and its outputs in the dense one.

    Returns:
        Those of the samples of the fit, and those of the held-out samples, if there are any.
    """
    joined: dict[bool, Moments] = {}
    first = 0
    for batch in batches:
        kept_back = held_out(first, len(batch))
        first += len(batch)
        own = _inputs(dense, consumer, batch)
        with masked(current, architecture, plan):
            left = _inputs(current, consumer, batch)
        for is_held_out in (False, True):
            chosen = kept_back == is_held_out
            if chosen.any():
                x, y = left[chosen].flatten(0, 1).double(), own[chosen].flatten(0, 1).double()
                if len(kept) > x.shape[1]:
                    x, y = _with_ones(x), _with_ones(y)
                x, y = x[:, kept], y @ whole.double().T
                new = Moments(x.T @ x / len(x), y.T @ x / len(x), float(y.square().sum() / len(x)), len(x))
                joined[is_held_out] = joined[is_held_out].join(new) if is_held_out in joined else new
    return joined[False], joined.get(True)


def _inputs(network: nn.Module, consumer: Map, batch: Samples) -> Float[Tensor, "samples rows input"]:
    with watched_inputs(network, [consumer], len(batch)) as seen, torch.no_grad():
        network(batch.inputs)
    return torch.cat(seen[consumer], 1)
