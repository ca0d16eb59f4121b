"""Running a model that is larger than the memory, and checks of memory and disk space."""

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
from libprune.engine.errors import MeansError
from libprune.pipeline.terminal import gigabytes


def recompute_layers(model: PreTrainedModel, architecture: Architecture) -> None:
    """Keep only each layer's input for backward, which then computes the rest of the layer a second time.

    For the price of one more forward pass, only one layer's activations are in memory (Chen et al. 2016, "Training Deep
    Nets with Sublinear Memory Cost"). transformers' own switch needs training mode, with dropout.
    """
    for layer in model.get_submodule(architecture.layers_path).children():
        layer.forward = partial(_checkpointed, layer.forward)


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with set_checkpoint_early_stop(False):  # a map that is stopped in the middle would not be offloaded again
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def offload_maps(model: PreTrainedModel, architecture: Architecture, device: torch.device) -> None:
    """Keep the weights of linear maps in host memory, and copy each to the device while its map runs (accelerate)."""
    from accelerate import cpu_offload

    maps = {entry.module for entry in architecture.maps}
    for name, module in model.named_modules():
        if name in maps:
            cpu_offload(module, execution_device=device)
        else:
            for parameter in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                parameter.data = parameter.data.to(device)


def fits_in_memory(size: int) -> bool:
    """Whether `size` bytes are less than half of the memory that is free."""
    return size < psutil.virtual_memory().available // 2


def fits_on(device: torch.device, size: int) -> bool:
    """Whether `size` bytes are less than a third of the memory that is free on a GPU; False for the CPU."""
    if device.type == "cpu":
        return False
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return size < free // 3


def require_room(needs: Mapping[Path, int], what: str, advice: str) -> None:
    """Stop if a disk has too little room.

    Args:
        needs: bytes to be written below each folder.
        what: name of the stage that writes them, for the message.
        advice: how to need less, for the message.

    Raises:
        MeansError: naming the disk, the bytes that are needed and those that are free.
    """
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needs.items():
        place = _existing(folder)
        disk = place.stat().st_dev
        disks[disk] = (place, disks.get(disk, (place, 0))[1] + size)
    for place, size in disks.values():
        free = shutil.disk_usage(place).free
        if size > free:
            raise MeansError(
                f"{what} needs {gigabytes(size)} below {place.resolve()}, where {gigabytes(free)} are free; {advice}"
            )


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
