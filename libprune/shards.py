"""The shards of the collecting stages: one safetensors file a layer."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from libprune.artifacts import damage, decode_meta, require
from libprune.errors import ArtifactError, missing_key


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
