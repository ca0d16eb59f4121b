"""Which wholly masked units of a network can go, and what is left of it without them.

A unit that only masked units read, or that only masked ones feed, sends nothing that depends on the input either. So
what can go is taken out, its constants folded, until nothing more can.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float64, Shaped
from torch import Tensor, nn

from libprune.engine.architecture import Architecture, Block, Map
from libprune.engine.plan import Plan
from libprune.engine.surgery import CONVOLUTIONS, entries_kept, input_mask
from libprune.masks.contributions import Reach, matrix, reach_of, under_noise
from libprune.masks.decision import fold
from libprune.masks.files import ties

Units = dict[Block, Bool[np.ndarray, " units"]]

_SAMPLES = 4


@dataclass(frozen=True)
class Settled:
    """What is left of a masked network.

    Attributes:
        plan: which units stay.
        stays: by part, why wholly masked units of it stay; without the parts where none does.
        wholly: units that are wholly masked.
        folded: those of which a constant has gone into a bias.
        biases: the biases that hold these.
        network: of the dense shape, what can go zeroed and the constants in the biases.
    """

    plan: Plan
    stays: Mapping[Block, str]
    wholly: Units
    folded: Units
    biases: tuple[str, ...]
    network: nn.Module


def settle(masked: nn.Module, architecture: Architecture, inputs: Shaped[Tensor, "samples ..."]) -> Settled:
    """Take out all that can go without a change of the network's outputs.

    Args:
        masked: on the CPU, in evaluation mode, its masks multiplied into the weights; it stays as it is.
        architecture: its description.
        inputs: of a few samples.
    """
    network, left = copy.deepcopy(masked), Plan.dense(architecture)
    generator = torch.Generator().manual_seed(0)
    probes = _probes(network, inputs, generator)
    folded: Units = {block: np.zeros_like(keep) for block, keep in left.keep.items()}
    biases: set[str] = set()
    while True:
        reach = _reaches(network, architecture, probes, generator)
        found = {block: _removable(network, architecture, block, sent) for block, sent in reach.items()}
        after = Plan({block: ~gone for block, (gone, _) in found.items()})
        if after.digest == left.digest:
            break
        for block, (gone, _) in found.items():
            folded[block] |= gone & ~reach[block].silent
        biases |= _take_out(network, architecture, after, reach)
        left = after
    stays = {block: why for block, (_, why) in found.items() if why}
    wholly = {block: sent.still | sent.drifts for block, sent in reach.items()}
    return Settled(_with_one_each(left, stays), stays, wholly, folded, tuple(sorted(biases)), network)


def _with_one_each(left: Plan, stays: dict[Block, str]) -> Plan:
    """The plan with a unit of every part, of which nothing but zeros is left where all of the part could go."""
    keep = {block: units.copy() for block, units in left.keep.items()}
    for block, units in keep.items():
        if left.gone(*block):
            units[0], stays[block] = True, f"a network cannot lose all of {block[1]}, so one unit stays"
    return Plan(keep)


def like(inputs: Shaped[Tensor, "samples ..."], samples: int, generator: torch.Generator) -> Shaped[Tensor, "..."]:
    """Inputs without any order: every entry is drawn from all entries of the given ones."""
    shape = (samples, *inputs.shape[1:])
    return inputs.flatten()[torch.randint(inputs.numel(), shape, generator=generator)]


def _probes(network: nn.Module, inputs: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Inputs as they are given, and shorter where the network takes these: what changes with size or time, shows."""
    given = torch.cat([inputs[:_SAMPLES], like(inputs, _SAMPLES, generator)])
    shorter = [
        given.narrow(dim, 0, size)
        for dim in range(1, given.ndim)
        for size in sorted({1, given.shape[dim] // 2} - {0, given.shape[dim]})
    ]
    return [given, *(probe for probe in shorter if _takes(network, probe))]


def _takes(network: nn.Module, probe: Tensor) -> bool:
    try:
        with torch.no_grad():
            network(probe)
    except Exception:  # the network's own code raises what it likes
        return False
    return True


def _reaches(
    network: nn.Module, architecture: Architecture, probes: Sequence[Tensor], generator: torch.Generator
) -> dict[Block, Reach]:
    """What the units of every part send, with noise in the place of what depends on the input.

    The weights say which outputs of maps and embeddings do; of what else has weights, such as norms and depthwise
    convolutions, those that move.
    """
    fixed: dict[str, Bool[Tensor, " output"] | None] = {
        stored.name.rpartition(".")[0]: None for stored in (*architecture.parameters, *architecture.buffers)
    }
    fixed |= {entry.module: (matrix(network, entry) == 0).all(dim=1) for entry in architecture.maps}
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding):
            fixed[name] = (module.weight == 0).all(dim=0)
    consumers = [entry.module for entry in architecture.maps]
    seen = under_noise(network, fixed, consumers, [partial(network, probe) for probe in probes], generator, far=True)
    return {block: reach_of(network, architecture, block, seen) for block in architecture.blocks()}


def _removable(
    network: nn.Module, architecture: Architecture, block: Block, sent: Reach
) -> tuple[Bool[np.ndarray, " units"], str]:
    """The units of a part that can go, and why the other wholly masked ones stay."""
    axis, gone, why = architecture.parts[block[1]].axis, sent.still.copy(), []
    for consumer in architecture.consumers(*block):
        units = consumer.input.units(axis, architecture.sizes)
        adds = np.zeros_like(gone)
        adds[units[(units >= 0) & (sent.constants[consumer.module] != 0)]] = True
        if (sent.still & adds).any() and (obstacle := _obstacle(network, consumer)):
            gone &= ~adds
            why.append(obstacle)
    if sent.drifts.any():
        why.append("what they send depends on no input, but changes with time, place or the input's size")
    return gone, "; ".join(why)


def _obstacle(network: nn.Module, consumer: Map) -> str:
    """Why a constant at the input of a map cannot go into its bias; empty if it can."""
    module, name = network.get_submodule(consumer.module), consumer.module
    if consumer.bias not in dict(network.named_parameters(remove_duplicate=False)):
        return f"they send a constant to {name}, which has no bias to hold it"
    if any(consumer.bias in names for names in ties(network)):
        return f"they send a constant to {name}, whose bias is that of another module, too"
    if _pads_zeros(module):
        return f"they send a constant to {name}, whose zero padding it does not reach, so that no bias can stand for it"
    return ""


def _pads_zeros(module: nn.Module) -> bool:
    return (
        isinstance(module, CONVOLUTIONS)
        and module.padding_mode == "zeros"
        and any(module._reversed_padding_repeated_twice)
    )


def _take_out(network: nn.Module, architecture: Architecture, plan: Plan, reach: Mapping[Block, Reach]) -> set[str]:
    """Fold the constants of what goes into biases, which are named, and zero all of it."""
    constants: dict[str, Float64[np.ndarray, " input"]] = {}
    for sent in reach.values():
        constants.update(sent.constants)
    changed = set()
    with torch.no_grad():
        for consumer in architecture.maps:
            removed = ~input_mask(architecture, plan, consumer)
            if removed.any() and (sends := fold(network, consumer, constants[consumer.module], removed)).any():
                bias = network.get_parameter(consumer.bias)
                bias.copy_(bias.double() + torch.from_numpy(sends))
                changed.add(consumer.bias)
        for parameter in architecture.parameters:
            network.get_parameter(parameter.name).mul_(entries_kept(architecture, plan, parameter))
    return changed
