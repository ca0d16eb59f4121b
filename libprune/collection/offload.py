"""Where the weights of a model are while a stage runs it, in memory, on the host or on disk, and what a pass holds.

With weights on disk a process holds the libraries, what one layer computes for one batch, the states in front of all
layers of that batch where backward needs them, the logits, and what is made of one map or part at a time.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from libprune.engine.architecture import Architecture
from libprune.models.memory import free_memory, free_on
from libprune.models.parallel import World
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute
from libprune.pipeline.terminal import gigabytes, note

LIBRARIES = 350_000_000
"""Measured: bytes that Python and the libraries hold."""


_COPIES = 4
"""Measured: copies of a part while the rank of its units' vectors is taken."""
_SUMMED = 18
"""Measured: bytes of each weight of a map while its gradient is added to the sums."""


@dataclass(frozen=True)
class PassBytes:
    """Bytes that a pass over a batch of tokens holds.

    Attributes:
        weights: all parameters.
        layer: what one layer computes.
        states: the inputs of all layers.
        kept: what backward keeps of all layers, where these are not computed again.
        logits: the logits, in float32.
        described: the vectors of the units of the largest part, while their rank is taken.
        summed: the gradient of the largest map, in the types that it takes on its way to the sums.
        grams: the Gram matrices of a layer while they are written, the largest one twice.
    """

    weights: int
    layer: int
    states: int
    kept: int
    logits: int
    described: int
    summed: int
    grams: int


def consumer_inputs(architecture: Architecture, layer: int | None = None) -> list[tuple[int, int, int]]:
    """By map that reads prunable units: its inputs, how often a token meets it, and how many copies it has.

    Only a stack of experts has several copies; inputs are then those of one expert.

    Args:
        layer: the layer of the maps; None for all layers.
    """
    blocks = [block for block in architecture.blocks() if layer in {None, block[0]}]
    consumers = (one for block in blocks for one in architecture.consumers(*block))
    return [
        (
            one.each_input(architecture.sizes),
            min(one.active, one.copies(architecture.sizes)),
            one.copies(architecture.sizes),
        )
        if one.stack
        else (one.input.size(architecture.sizes), 1, 1)
        for one in consumers
    ]


def pass_bytes(architecture: Architecture, tokens: int, dtype: torch.dtype) -> PassBytes:
    """What a pass over so many tokens holds of a model that computes in a type.

    A layer holds about 16 times the width of the model and 8 times that of its widest map, for each token;
    of a mixture the experts count that a token goes through.
    """
    widest = max(width * met for width, met, _ in consumer_inputs(architecture))
    model, size = architecture.sizes["model"], tokens * dtype.itemsize
    layer = size * (16 * model + 8 * widest)
    parts = [list(map(architecture.numel, architecture.parameters_of(*block))) for block in architecture.blocks()]
    grams = [
        [copies * inputs**2 for inputs, _, copies in consumer_inputs(architecture, layer)]
        for layer in range(architecture.layers)
    ]
    return PassBytes(
        weights=architecture.total_parameters * dtype.itemsize,
        layer=layer,
        states=size * model * architecture.layers,
        kept=layer * architecture.layers,
        logits=tokens * architecture.sizes.get("vocab", 0) * torch.float32.itemsize,
        described=_COPIES * dtype.itemsize * max(map(sum, parts)),
        summed=_SUMMED * max(map(max, parts)),
        grams=torch.float32.itemsize * max(sum(one) + max(one, default=0) for one in grams),
    )


def scratch_of(layout: Layout, compute: Compute) -> Path | None:
    """The folder for what lies on disk in place of memory; None where weights are not read from disk.

    Args:
        compute: with `offload` settled.
    """
    return layout.work if compute.offload == "disk" else None


Place = Literal["none", "cpu", "disk"]
"""Where weights are, as `compute.offload` names it."""


def choose(compute: Compute, needs: PassBytes, device: torch.device, world: World, beside: int = 0) -> Place:
    """What `settle` chooses, without a word."""
    if compute.offload != "auto":
        return compute.offload
    if world.sharded or needs.weights + held_activations(compute, needs) < (_free(device, world) - beside) // 2:
        return "none"
    on_host = device.type == "cuda" and needs.weights < free_memory() // 2 // world.local_size
    return "cpu" if on_host else "disk"


def held_activations(compute: Compute, needs: PassBytes) -> int:
    """Bytes of activations that backward keeps with the weights on the device."""
    return needs.layer + needs.states if compute.gradient_checkpointing else needs.kept


def _free(device: torch.device, world: World) -> int:
    """Free bytes of the memory that the weights would lie in."""
    return free_on(device) if device.type == "cuda" else free_memory() // world.local_size


def settle(compute: Compute, needs: PassBytes, device: torch.device, world: World, beside: int = 0) -> Compute:
    """Choose where the weights are, if the params leave it open, and say what was chosen and why.

    They are on the device where they take less than half of its free memory, with what backward keeps. Otherwise they
    are on disk, or in the memory of the host where a GPU computes and half of that memory has room for them. What a
    stage writes is the same.

    Args:
        compute: the params.
        needs: of the largest pass.
        device: where the model runs.
        world: the processes; those that share the weights out keep them on their devices.
        beside: bytes of the same memory that something else is going to take, such as a model that is trained.

    Returns:
        The params, with `offload` as `none`, `cpu` or `disk`.
    """
    chosen = choose(compute, needs, device, world, beside)
    if compute.offload == "auto" and world.first:
        kept, taken = held_activations(compute, needs), f", {gigabytes(beside)} of which the training takes"
        note(
            f"compute.offload: auto is {chosen}: weights of {gigabytes(needs.weights)} and up to {gigabytes(kept)} of "
            f"activations, where {gigabytes(_free(device, world))} are free{taken if beside else ''}"
        )
    if chosen == "disk" and world.first:
        note(
            f"weights are read from disk; a pass holds {gigabytes(LIBRARIES)} of libraries, {gigabytes(needs.layer)} "
            f"of one layer, {gigabytes(needs.states)} of states before all layers where it goes back, and up to "
            f"{gigabytes(3 * needs.logits)} of logits; what is made of one layer takes "
            f"{gigabytes(max(needs.described, needs.summed, needs.grams))}"
        )
    return compute.model_copy(update={"offload": chosen})
