"""A model on its device and the text that statistics are collected on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from libprune.collection.offload import pass_bytes, scratch_of, settle
from libprune.engine.architecture import Architecture
from libprune.engine.errors import LibpruneError
from libprune.engine.stacks import IMPLEMENTATION, exposed
from libprune.models.compute import PATIENCE, resolve_device, resolve_dtype
from libprune.models.folder import WeightFiles, load_model, own_model
from libprune.models.memory import offload_maps, on_disk, recompute_layers
from libprune.models.parallel import World, by_itself, join_world, shard_layers
from libprune.models.samples import Samples
from libprune.models.sequences import Sequences
from libprune.models.tokens import read_tokens, require_sequences
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute
from libprune.pipeline.terminal import note

Items = TypeVar("Items", Sequences, Samples)
"""Calibration sequences of a language model, or samples of a network."""
HELD_OUT_EVERY = 8
"""Every eighth calibration sequence is held out from the fits of a repair, to choose settings and measure errors."""


def held_out(first: int, number: int) -> Bool[Tensor, " number"]:
    """Whether each of `number` consecutive calibration sequences, from index `first` on, is held out from fits."""
    return torch.arange(first, first + number) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


@dataclass(frozen=True)
class Run(Generic[Items]):
    """A described model on its device, and the sequences or samples that are run through it.

    Attributes:
        weights: the dense model's parameters, read from its files.
        sequences: the chosen calibration sequences, or the samples of a network.
        compute: the params of how to run the model.
        meta: the origin of the collected artifacts, for their metadata.
        work: the folder of unfinished work.
        at_once: the most sequences in one pass.
    """

    architecture: Architecture
    weights: WeightFiles
    sequences: Items
    device: torch.device
    compute: Compute
    world: World
    meta: dict[str, Any]
    work: Path
    at_once: int

    @property
    def unit(self) -> str:
        """The unit that a progress bar counts."""
        return "tok" if isinstance(self.sequences, Sequences) else "sample"

    @property
    def patience(self) -> float:
        """Seconds of work before a progress bar shows; most statistics of a network take less."""
        return 0.0 if isinstance(self.sequences, Sequences) else PATIENCE


@dataclass(frozen=True)
class Calibration(Run[Sequences]):
    """A language model on its device and the text to run through it.

    Attributes:
        available: number of all calibration sequences, chosen or not.
    """

    model: PreTrainedModel
    available: int

    @property
    def first(self) -> int:
        """The index of the first chosen sequence among all, where the last ones were chosen."""
        return self.available - len(self.sequences)

    @property
    def n_tok(self) -> int:
        """Tokens of a sequence that its loss is the mean over."""
        return self.sequences.counted

    @property
    def recompute(self) -> bool:
        """Whether backward computes the layers a second time."""
        return self.compute.gradient_checkpointing or self.compute.offload != "none"

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor that waits for later: on disk where the weights are, or else where it is."""
        return on_disk(tensor.cpu(), self.work) if self.compute.offload == "disk" else tensor


def set_up(
    layout: Layout,
    compute: Compute,
    sequences: int | None,
    last: bool = False,
    text: Path | None = None,
    alone: str = "",
) -> Calibration:
    """Load the model and the calibration sequences of a stage that runs the model on text.

    Args:
        sequences: calibration sequences to use; None for all.
        last: use the last ones instead of the first.
        text: other sequences that `tokenize` has drawn, in the place of the calibration sequences.
        alone: name of a stage that runs in one process; "" for one that several may share.

    Raises:
        LibpruneError: if an artifact is missing or foreign, or the device or several processes cannot be used.
    """
    architecture = read_architecture(layout)
    text = text or layout.calibration_tokens
    stored, tokens_meta = read_tokens(text, architecture.fingerprint)
    number = require_sequences(sequences, stored, text)
    chosen = (stored[-number:] if last else stored[:number]).shortest_first()
    world = by_itself(alone) if alone else join_world()
    require_equal_passes(chosen, world)
    device, dtype = own_device(compute, world)
    at_once = max(1, compute.batch_tokens // stored.ids.shape[1])
    compute = settle(compute, pass_bytes(architecture, at_once * stored.ids.shape[1], dtype), device, world)
    if world.first and architecture.experts is not None:
        note(f"experts run by the implementation {IMPLEMENTATION}, which shows each expert's tokens")
    scratch = layout.work if world.sharded else scratch_of(layout, compute)  # a process keeps its share alone
    model = load_model(own_model(layout, architecture), dtype, scratch=scratch)
    model = place(model, architecture, compute, world, device)
    meta = {
        "model": architecture.fingerprint,
        "tokens": tokens_meta["tokens"],
        "sequences": len(chosen),
        "length": stored.ids.shape[1],
        "compute_dtype": str(dtype).removeprefix("torch."),
    }
    return Calibration(
        architecture=architecture,
        weights=WeightFiles(layout.model),
        sequences=chosen,
        device=device,
        compute=compute,
        world=world,
        meta=meta,
        work=layout.work,
        at_once=at_once,
        model=exposed(model, architecture),
        available=len(stored),
    )


def own_device(compute: Compute, world: World) -> tuple[torch.device, torch.dtype]:
    """The device of this process, which becomes the current one if it is a GPU, and the type that it computes in.

    Raises:
        LibpruneError: if the device cannot be used.
    """
    device = resolve_device(compute.device, world.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device, resolve_dtype(compute.dtype, device)


def require_equal_passes(sequences: Sequences, world: World) -> None:
    """Stop if processes that share the weights would run different numbers of passes and wait for each other.

    Raises:
        LibpruneError: saying what to change.
    """
    if world.sharded and sequences.lengths is not None:
        raise LibpruneError(
            "LIBPRUNE_SHARD needs as many passes in every process, but labelled documents run in passes of their own "
            "lengths; unset it, and use compute.offload: cpu where the weights do not fit"
        )


def require_own_weights(run: Calibration) -> None:
    """Stop if the weights do not lie whole on the device, for work that changes them.

    Raises:
        LibpruneError: saying which setting to change.
    """
    visiting = run.compute.offload != "none" and run.device.type != "cpu"
    if run.world.sharded or visiting or run.compute.offload == "cpu":
        raise LibpruneError(
            "this stage changes weights of the model, which must lie whole on the device; unset LIBPRUNE_SHARD, and "
            "set compute.offload: none, or compute.device: cpu with compute.offload: disk"
        )


def place(
    model: PreTrainedModel, architecture: Architecture, compute: Compute, world: World, device: torch.device
) -> PreTrainedModel:
    """Put the model where it will run: on the device, offloaded to the host or the disk, or shared out over processes.

    Args:
        model: on the CPU; loaded from disk where it is to stay there.
        compute: with `offload` settled.
    """
    if world.sharded:
        shard_layers(model, architecture, device)
    elif compute.offload == "cpu" or (compute.offload == "disk" and device.type != "cpu"):
        offload_maps(model, architecture, device)
        model = exposed(model, architecture)  # by which the weights of experts visit it
    else:
        model = model.to(device)
    if compute.gradient_checkpointing or compute.offload != "none":  # offloaded weights must not wait for backward
        recompute_layers(model, architecture)
    return model
