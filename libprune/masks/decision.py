"""Which wholly masked units can go, and why others of them stay.

What can go is taken out, its constants folded into biases, until nothing more can: a unit of a network that only masked
units read, or that only masked ones feed, sends nothing that depends on the input either. The parts of a language model
meet in the residual stream alone, so that what one loses changes no other, and the first step is the last.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import nn

from libprune.engine.architecture import Architecture, Block, Map
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import entries_kept, input_mask
from libprune.masks.contributions import Contribution, matrix

Units = dict[Block, Bool[np.ndarray, " units"]]
Folds = dict[str, Float64[np.ndarray, " output"]]
"""By bias what it has to hold, ``[output]``; only where that is not zero."""


def of_dense(architecture: Architecture) -> Architecture:
    """The description of a dense model, as it is.

    Raises:
        LibpruneError: for a mixture of experts.
    """
    if architecture.experts:
        raise LibpruneError(
            f"this {architecture.family} model is a mixture of experts; a mask in one of its weights does not say that "
            "the router chooses an expert no more, so masks are only made and read of dense models"
        )
    return architecture


@dataclass(frozen=True)
class Decision:
    """What becomes of wholly masked units.

    Attributes:
        plan: which units stay.
        stays: for each block that keeps a wholly masked unit, the reason.
        wholly: units that are wholly masked.
        folded: units that send a constant, which goes into a bias.
        folds: by bias of a consumer, what the removed units send through it to every place.
        added: parts whose maps have no bias yet and need one for that.
        model: the dense shape; of a network a copy without what the removed units did, their constants in the biases.
    """

    plan: Plan
    stays: Mapping[Block, str]
    wholly: Units
    folded: Units
    folds: Folds
    added: tuple[str, ...]
    model: nn.Module


def settle(
    masked: nn.Module,
    architecture: Architecture,
    contributions: Callable[[nn.Module], Mapping[Block, Contribution]],
    obstacle: Callable[[nn.Module, Map], str],
) -> Decision:
    """Remove every wholly masked unit that can go without a change of the model's outputs.

    Args:
        masked: on the CPU, in evaluation mode, its masks multiplied into the weights; it stays as it is.
        contributions: what the units of every block send.
        obstacle: why a constant at the input of a map cannot go into its bias; empty if it can.

    Raises:
        LibpruneError: if no layer is left.
    """
    model = masked if architecture.layered else copy.deepcopy(masked)
    left, folds = Plan.dense(architecture), Folds()
    folded: Units = {block: np.zeros_like(keep) for block, keep in left.keep.items()}
    while True:
        sent = contributions(model)
        plan, stays = _step(model, architecture, sent, obstacle)
        if plan.digest == left.digest:
            break
        left = plan
        for block, keep in plan.keep.items():
            folded[block] |= ~keep & ~sent[block].silent
        constants = _constants(model, architecture, plan, sent)
        folds |= {name: folds.get(name, 0) + sends for name, sends in constants.items()}
        if architecture.layered:
            break
        _take_out(model, architecture, plan, constants)
    if not architecture.layered:
        plan = _with_one_each(plan, stays)
    elif not plan.layers:
        raise LibpruneError("every unit of every layer is wholly masked: the layers compute nothing, so none is left")
    names = {parameter.name for parameter in architecture.parameters}
    added = {entry.part for entry in architecture.maps if entry.bias in folds.keys() - names}
    wholly = {block: units.still | units.drifts for block, units in sent.items()}
    return Decision(plan, stays, wholly, folded, folds, tuple(sorted(added)), model)


def _step(
    model: nn.Module,
    architecture: Architecture,
    sent: Mapping[Block, Contribution],
    obstacle: Callable[[nn.Module, Map], str],
) -> tuple[Plan, dict[Block, str]]:
    """The plan without the units that can go now, and by block why other wholly masked ones stay."""
    gone: Units = {}
    stays: dict[Block, str] = {}
    for block, units in sent.items():
        gone[block], why = _removable(model, architecture, block, units, obstacle)
        if why:
            stays[block] = why
    if architecture.layers_stay:
        _leave_layers(architecture, gone, stays)
    return Plan({block: ~units for block, units in gone.items()}), stays


def _removable(
    model: nn.Module,
    architecture: Architecture,
    block: Block,
    sent: Contribution,
    obstacle: Callable[[nn.Module, Map], str],
) -> tuple[Bool[np.ndarray, " units"], str]:
    """The units of a block that can go, and why the other wholly masked ones stay."""
    shape, consumers, gone, why = architecture.parts[block[1]], architecture.consumers(*block), sent.still.copy(), []
    for consumer in consumers:
        units, adds = consumer.input.units(shape.axis, architecture.sizes), np.zeros_like(gone)
        adds[units[(units >= 0) & (sent.constants[consumer.module] != 0)]] = True
        if (sent.still & adds).any() and (reason := obstacle(model, consumer)):
            gone &= ~adds
            why.append(reason)
    if sent.drifts.any():
        why.append("what they send depends on no input, but changes with time, place or the input's size")
    if shape.norms and gone.any() and not gone.all():
        gone[:], why = False, [f"all units are coupled by {' and '.join(shape.norms)}, and can only go together"]
    if architecture.layered and gone.all() and any(_adds(model, architecture, c, sent) for c in consumers):
        gone[: len(gone) if shape.norms else 1] = False
        why = ["the part adds the same vector to every token, and one unit stays to carry its bias"]
    return gone, "; ".join(why)


def _adds(model: nn.Module, architecture: Architecture, consumer: Map, sent: Contribution) -> bool:
    """Whether a consumer adds something to every token once all its units have gone."""
    axis, sends = architecture.parts[consumer.part].axis, np.zeros(1)
    if any(parameter.name == consumer.bias for parameter in architecture.parameters_of(*architecture.home(consumer))):
        sends = model.get_parameter(consumer.bias).detach().double().numpy()
    removed = consumer.input.units(axis, architecture.sizes) >= 0
    return bool((sends + _sent(model, consumer, sent.constants[consumer.module], removed)).any())


def _leave_layers(architecture: Architecture, gone: Units, stays: dict[Block, str]) -> None:
    """Leave a unit in every layer, where no layer can be deleted."""
    for layer in range(architecture.layers):
        last = architecture.parts_of(layer)[-1]
        if all(gone[layer, part].all() for part in architecture.parts_of(layer)):
            gone[layer, last][: None if architecture.parts[last].norms else 1] = False
            stays[layer, last] = f"{architecture.layers_stay}; something of a layer must stay"


def _with_one_each(left: Plan, stays: dict[Block, str]) -> Plan:
    """The plan with a unit of every part, which is all zeros where all of the part could go."""
    keep = {block: units.copy() for block, units in left.keep.items()}
    for block, units in keep.items():
        if left.gone(*block):
            units[0], stays[block] = True, f"a network cannot lose all of {block[1]}, so one unit stays"
    return Plan(keep)


def _constants(model: nn.Module, architecture: Architecture, plan: Plan, sent: Mapping[Block, Contribution]) -> Folds:
    """What the removed units send to every place, by the bias of the consumer, where one of its inputs is left."""
    constants = {module: values for units in sent.values() for module, values in units.constants.items()}
    folds: Folds = {}
    for consumer in architecture.maps:
        removed = ~input_mask(architecture, plan, consumer)
        if removed.any() and not (architecture.layered and plan.gone(*architecture.home(consumer))):
            sends = _sent(model, consumer, constants[consumer.module], removed)
            folds |= {consumer.bias: sends} if sends.any() else {}
    return folds


def _sent(
    model: nn.Module, consumer: Map, constants: Float64[np.ndarray, " input"], removed: Bool[np.ndarray, " input"]
) -> Float64[np.ndarray, " output"]:
    """What the removed positions of a consumer's input send through it, to every place alike."""
    columns = matrix(model, consumer).double().numpy()[:, removed]
    sends: Float64[np.ndarray, " output"] = columns @ constants[removed]
    return sends


def _take_out(network: nn.Module, architecture: Architecture, plan: Plan, constants: Folds) -> None:
    """Add the constants of what goes to biases, and zero all of it."""
    with torch.no_grad():
        for name, sends in constants.items():
            bias = network.get_parameter(name)
            bias.copy_(bias.double() + torch.from_numpy(sends))
        for parameter in architecture.parameters:
            network.get_parameter(parameter.name).mul_(entries_kept(architecture, plan, parameter))
