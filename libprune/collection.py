"""What the collecting stages share: the model, the calibration batches, and the layer shards they write."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from libprune.architecture import Architecture
from libprune.artifacts import Layout, damage, decode_meta, encode_meta, read_architecture, require
from libprune.checkpoint import load_model
from libprune.compute import batches, resolve_device, resolve_dtype
from libprune.errors import ArtifactError, missing_key
from libprune.params import Compute
from libprune.tokens import read_tokens


@dataclass(frozen=True)
class Calibration:
    """A model on its device and the batches to run through it.

    Attributes:
        n_tok: loss-counted tokens of a sequence.
        meta: what the collected artifacts say of their origin.
    """

    model: PreTrainedModel
    architecture: Architecture
    batches: Iterator[tuple[int, Tensor]]
    n_tok: int
    meta: dict[str, Any]


def set_up(layout: Layout, compute: Compute, sequences: int | None, label: str) -> Calibration:
    """Load what a collecting stage needs.

    Raises:
        LibpruneError: if an artifact is missing or foreign, or the device cannot be used.
    """
    architecture = read_architecture(layout)
    ids, tokens_meta = read_tokens(layout.calibration, architecture.fingerprint, sequences)
    device = resolve_device(compute.device)
    dtype = resolve_dtype(compute.dtype, device)
    model = load_model(require(layout.model, "prepare"), dtype).to(device)
    meta = {
        "model": architecture.fingerprint,
        "tokens": tokens_meta["tokens"],
        "sequences": len(ids),
        "length": ids.shape[1],
        "compute_dtype": str(dtype).removeprefix("torch."),
    }
    return Calibration(model, architecture, batches(ids, compute.batch_tokens, device, label), ids.shape[1] - 1, meta)


def write_layers(
    folder: Path,
    architecture: Architecture,
    tensors_of: Callable[[int], Mapping[str, Tensor]],
    meta: Mapping[str, Any],
) -> None:
    """Write one safetensors shard a layer, `layer-000.safetensors` and so on."""
    for layer in range(architecture.layers):
        tensors = {name: tensor.contiguous() for name, tensor in tensors_of(layer).items()}
        save_file(tensors, shard(folder, layer), metadata=encode_meta(meta))


def shard(folder: Path, layer: int) -> Path:
    """The file of one layer."""
    return folder / f"layer-{layer:03d}.safetensors"


def read_tensor(folder: Path, layer: int, name: str, stage: str) -> Tensor:
    """One tensor of a layer's shard.

    Raises:
        ArtifactError: if the shard or the tensor is missing.
    """
    path = require(shard(folder, layer), stage)
    with damage(path, stage), safe_open(path, framework="pt") as file:
        names = list(file.keys())
        if name not in names:
            raise ArtifactError(missing_key(name, names, str(path)))
        tensor: Tensor = file.get_tensor(name)
    return tensor


def read_meta(folder: Path, stage: str) -> dict[str, Any]:
    """What the shards of a stage say of their origin."""
    path = require(shard(folder, 0), stage)
    with damage(path, stage), safe_open(path, framework="pt") as file:
        return decode_meta(path, file.metadata(), stage)


def block_parameters(architecture: Architecture, layer: int) -> list[str]:
    """Names of all parameters of one block."""
    return [p.name for part in architecture.parts for p in architecture.parameters_of(layer, part)]


def stored(tensor: Tensor, dtype: str) -> Tensor:
    """A tensor in its storage dtype."""
    return tensor.to(getattr(torch, dtype))
