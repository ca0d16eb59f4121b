"""Running a model that is larger than the memory at hand."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture
from libprune.engine.errors import LibpruneError
from libprune.pipeline.terminal import gigabytes


def recompute_layers(model: PreTrainedModel, architecture: Architecture) -> None:
    """Keep only each layer's input for backward, and compute the rest of the layer again there.

    One more forward pass buys a peak of one layer's activations (Chen et al. 2016, "Training Deep
    Nets with Sublinear Memory Cost"). transformers' own switch asks for training mode, with dropout.
    """
    for layer in model.get_submodule(architecture.layers_path).children():
        layer.forward = partial(_checkpointed, layer.forward)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with set_checkpoint_early_stop(False):  # a map that is stopped in the middle would not be offloaded again
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def offload_maps(model: PreTrainedModel, architecture: Architecture, device: torch.device) -> None:
    """Keep the linear maps' weights in host memory and bring each to the device while it works (accelerate)."""
    from accelerate import cpu_offload

    maps = {entry.module for entry in architecture.maps}
    for name, module in model.named_modules():
        if name in maps:
            cpu_offload(module, execution_device=device)
        else:
            for parameter in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                parameter.data = parameter.data.to(device)


def fits_in_memory(size: int) -> bool:
    """Whether so many bytes take less than half of the memory that is free."""
    return size < psutil.virtual_memory().available // 2


def require_room(needs: Mapping[Path, int], what: str, advice: str) -> None:
    """Check that the disks have room.

    Args:
        needs: bytes to be written below each folder.
        what: who writes them, for the message.
        advice: how to need less.

    Raises:
        LibpruneError: naming the disk, what is needed and what is free.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needs.items():
        place = _existing(folder)
        disk = place.stat().st_dev
        disks[disk] = (place, disks.get(disk, (place, 0))[1] + size)
    for place, size in disks.values():
        free = shutil.disk_usage(place).free
        if size > free:
            raise LibpruneError(
                f"{what} needs {gigabytes(size)} below {place.resolve()}, where {gigabytes(free)} are free; {advice}"
            )


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
