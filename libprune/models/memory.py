"""Running a model that is larger than the memory, and checks of memory and disk space.

Weights on disk are tensors that the system maps from files: it reads a page when it is used first, and drops it when
memory is short. So a model of any size computes what it would compute in memory, by the same code. A tensor in the type
in which it is stored lies in the model's own file. Any other one is written to a file without a name, which is gone as
soon as nothing needs it. Writing to such a tensor changes a page in memory, never the file.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import getsource
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import PreTrainedModel, core_model_loading, modeling_gguf_pytorch_utils

from libprune.engine.architecture import Architecture
from libprune.engine.errors import MeansError
from libprune.pipeline.terminal import gigabytes

Keep = Callable[[Tensor], Tensor]
"""Where a tensor waits until it is needed: `in_memory`, or `on_disk` below some folder."""


def in_memory(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


def on_disk(tensor: Tensor, folder: Path) -> Tensor:
    """Put a tensor into a file without a name below a folder, and map it from there, where it takes no memory.

    Args:
        tensor: on the CPU.
        folder: made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not tensor.numel():
        return tensor
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        path = f"/dev/fd/{file.fileno()}"
        return torch.from_file(path, shared=False, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)


def keeping(folder: Path | None) -> Keep:
    """`on_disk` below a folder; `in_memory` without one."""
    return in_memory if folder is None else partial(on_disk, folder=folder)


class _Mapped:
    """The tensors that lie in mapped files; none where the system does not tell.

    To ask the system is to read the list of all mappings. It is not asked for storages that PyTorch has allocated: they
    alone can grow. An answer counts for all tensors in the same mapping. The first of them is kept: without it the
    system could give its addresses to other memory.
    """

    def __init__(self) -> None:
        self._known: list[tuple[int, int, Tensor]] = []

    def __contains__(self, tensor: Tensor) -> bool:
        address = tensor.data_ptr()
        if tensor.untyped_storage().resizable():
            return False
        if any(first <= address < last for first, last, _ in self._known):
            return True
        maps = Path("/proc/self/maps")
        for line in maps.read_text().splitlines() if maps.exists() else []:
            extent, _, _, _, inode = line.split(maxsplit=5)[:5]
            first, last = (int(end, 16) for end in extent.split("-"))
            if first <= address < last:
                self._known += [(first, last, tensor)] if inode != "0" else []
                return inode != "0"
        return False


@contextmanager
def loading_on_disk(folder: Path) -> Iterator[None]:
    """Inside the context, transformers maps the weights of the models that it loads, each as soon as it has it.

    What it converts on the way, one tensor at a time, lies in files without names below the folder.
    """
    put, variable = core_model_loading.set_param_for_module, "HF_DEACTIVATE_ASYNC_LOAD"
    numbers, before = modeling_gguf_pytorch_utils.np, os.environ.get(variable)
    mapped = _Mapped()

    def put_mapped(model: Any, name: str, value: Tensor, *rest: Any) -> None:
        put(model, name, value if value in mapped else on_disk(value, folder), *rest)

    core_model_loading.set_param_for_module = put_mapped
    modeling_gguf_pytorch_utils.np = _Arrays(numbers, folder)
    os.environ[variable] = "1"  # else threads read ahead of what is mapped
    try:
        yield
    finally:
        core_model_loading.set_param_for_module, modeling_gguf_pytorch_utils.np = put, numbers
        del os.environ[variable]
        os.environ.update({} if before is None else {variable: before})


class _Arrays:
    """numpy, whose copies lie on disk; for the reader of GGUF files, which keeps a copy of each dequantised tensor."""

    def __init__(self, numbers: Any, folder: Path) -> None:
        self._numbers, self._folder = numbers, folder

    def copy(self, array: Any) -> Any:
        own = array if array.flags.writeable else array.copy()
        return on_disk(torch.from_numpy(own), self._folder).numpy()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._numbers, name)


LOADING_CODE = "\n".join(
    [
        *("import os", "import tempfile", "from contextlib import contextmanager", "from pathlib import Path"),
        *("from typing import Any", "from collections.abc import Iterator", "import torch", "from torch import Tensor"),
        "from transformers import core_model_loading, modeling_gguf_pytorch_utils",
        *(getsource(part) for part in (on_disk, _Mapped, _Arrays, loading_on_disk)),
    ]
)
"""`loading_on_disk` as a text, for a process that is not to import libprune."""


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
    """Keep the weights of linear maps where they are, and copy each to the device while its map runs (accelerate).

    Those of the experts of a mixture stay too; `libprune.engine.stacks.StackedMap` copies the experts that have tokens.
    """
    from accelerate import cpu_offload

    maps = {entry.module for entry in architecture.maps}
    stacks = {name for entry in architecture.maps if entry.stack for name in (entry.weight, entry.bias)}
    for name, module in model.named_modules():
        if name in maps:
            cpu_offload(module, execution_device=device)
        else:
            for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if f"{name}.{own}" not in stacks:
                    tensor.data = tensor.data.to(device)


def free_memory() -> int:
    """Bytes of memory that this process can still take: of the machine, and of the control groups that it is in.

    Pages of files count as free, since the system drops them.
    """
    return min([psutil.virtual_memory().available, *_left_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _left_in_groups(groups: Path, mounted: Path) -> Iterator[int]:
    """What the limits of memory leave to the control groups of this process and those around them, in bytes.

    Args:
        groups: the file that names the groups, in the format of `/proc/self/cgroup`.
        mounted: where they lie; those of version 1 in the folder `memory`.
    """
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in _GROUP_FILES:
            continue
        home, (limit, used, *files) = mounted / controllers, _GROUP_FILES[controllers]
        own = home / path.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(home) or not (folder / used).exists() or not (folder / limit).exists():
                continue  # a container may see its own group as the root
            most = (folder / limit).read_text().strip()
            if most != "max":
                stat = dict(one.split() for one in (folder / "memory.stat").read_text().splitlines())
                dropped = sum(int(stat.get(name, 0)) for name in files)
                yield max(0, int(most) - int((folder / used).read_text()) + dropped)


_GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file", "active_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"),
}
"""By the name of a hierarchy: the files of its limit and its use, and the pages of files in its statistics."""


def fits_in_memory(size: int) -> bool:
    """Whether `size` bytes are less than half of the memory that is free."""
    return size < free_memory() // 2


def fits_on(device: torch.device, size: int) -> bool:
    """Whether `size` bytes are less than a third of the memory that is free on a GPU; False for the CPU."""
    if device.type == "cpu":
        return False
    return size < free_on(device) // 3


def free_on(device: torch.device) -> int:
    """Bytes of a GPU's memory that this process can still take, with what PyTorch keeps of it for later tensors."""
    of_kind = torch.get_device_module(device)
    free, _ = of_kind.mem_get_info(device)
    return int(free + of_kind.memory_reserved(device) - of_kind.memory_allocated(device))


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
