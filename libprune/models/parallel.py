"""Several processes: which of them this is, and models whose weights are shared out over GPUs.

How a stage is launched is a matter of the environment, not of params: it changes no result, so it must not make DVC run
a stage again. `torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; LIBPRUNE_SHARD=1 also shares the weights out (FSDP2).
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture
from libprune.engine.errors import LibpruneError
from libprune.pipeline.processes import end_with_others

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""How long a process waits for the others: the first one may take long to join the sums and write the artifact."""


@dataclass(frozen=True)
class World:
    """The processes of one run of a stage, and the rank of this one.

    Attributes:
        rank: number of this process.
        size: number of all processes.
        local_rank: number of this process among those of its machine.
        local_size: number of the processes of this machine.
        sharded: whether the weights are shared out over the processes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes the artifacts."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def shared(self, value: T) -> T:
        """The value that the first process has given; returned in all processes."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors that all processes have given, of one shape and type; returned in all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gathered(self, value: T) -> list[T]:
        """The values that all processes have given, by rank; returned in all processes."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box


def join_world() -> World:
    """Join the processes that a launcher such as `torchrun` started; without one, this process is alone.

    From then on this process ends soon after another one has failed (`libprune.pipeline.processes.tell_others`).

    Raises:
        LibpruneError: if the weights should be shared out over fewer than two processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    sharded = os.environ.get("LIBPRUNE_SHARD", "0") not in {"", "0"}
    if size == 1:
        if sharded:
            raise LibpruneError(
                "LIBPRUNE_SHARD is set for one process; start several with torchrun (docs/large-models.md)"
            )
        return World()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
        end_with_others(dist.distributed_c10d._get_default_store(), int(os.environ["RANK"]))
    local_rank, local_size = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    return World(int(os.environ["RANK"]), size, local_rank, max(1, local_size), sharded)


def by_itself(stage: str) -> World:
    """The one process of a stage that no launcher starts; LIBPRUNE_SHARD, set for other stages, is of no account.

    Raises:
        LibpruneError: if a launcher has started several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LibpruneError(f"the {stage} stage runs in one process; start it without torchrun")
    return World()


def shard_layers(model: PreTrainedModel, architecture: Architecture, device: torch.device) -> None:
    """Share the weights of all linear maps out over the processes, those of experts too, layer by layer (FSDP2).

    Before a layer runs, every process gathers the whole layer, all of its experts included. Norms stay whole in every
    process: they are small, and their gradients are read from their parameters.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    shared = {name for entry in architecture.maps for name in (entry.weight, entry.bias)}
    whole = {parameter for name, parameter in model.named_parameters() if name not in shared}
    for parameter in [*whole, *model.buffers()]:
        parameter.data = parameter.data.to(device)
    for layer in model.get_submodule(architecture.layers_path).children():
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole & set(layer.parameters()))
