"""From a plan to a pruned model folder: repair, slice, write, prove."""

import json
import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from libprune.architecture import Architecture, Map
from libprune.artifacts import Layout, read_architecture, read_plan, require, same_origin
from libprune.checkpoint import PROVENANCE, WeightFiles, load_model
from libprune.compute import named_dtype
from libprune.params import Slice
from libprune.plan import Plan
from libprune.pruned_folder import write_pruned
from libprune.repair import repair_local
from libprune.shards import read_meta, read_tensor
from libprune.surgery import masked, slice_state
from libprune.tokens import read_tokens
from libprune.verify import reference_logits, verify_folder

_CHECKED_SEQUENCES, _CHECKED_LENGTH = 2, 64


class _Weights(Mapping[str, Tensor]):
    """The dense weights with repaired ones in their place, cast when they are read."""

    def __init__(self, dense: WeightFiles, repaired: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._dense, self._repaired, self._dtype = dense, repaired, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._repaired[name] if name in self._repaired else self._dense[name]
        return tensor.to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._dense)

    def __len__(self) -> int:
        return len(self._dense)


def prune(layout: Layout, folder: Path, params: Slice) -> dict[str, float]:
    """Write the pruned model into an empty folder and prove that it loads.

    Returns:
        How near the reloaded logits are, for metrics.

    Raises:
        LibpruneError: if an artifact is missing or foreign, or the result fails its proof.
    """
    architecture = read_architecture(layout)
    plan, meta = read_plan(layout, architecture)
    dense = WeightFiles(require(layout.model, "prepare"))
    repaired = _repaired(layout, architecture, plan, dense, params)
    stored = named_dtype(params.dtype, dense[architecture.parameters[0].name].dtype)
    weights = _Weights(dense, repaired, stored)
    write_pruned(folder, layout.model, architecture, plan, meta["shape"], slice_state(weights, architecture, plan))
    shutil.copyfile(layout.plan, folder / "plan.parquet")
    proof = _prove(layout, folder, architecture, plan, weights, meta["shape"])
    made = {"plan": meta, "slice": params.model_dump(), "repaired_maps": len(repaired), "proof": proof, **_versions()}
    (folder / PROVENANCE).write_text(json.dumps(made, indent=2) + "\n")
    return proof


def _repaired(
    layout: Layout, architecture: Architecture, plan: Plan, dense: WeightFiles, params: Slice
) -> dict[str, Tensor]:
    if params.repair == "none":
        return {}
    same_origin(layout.activations, read_meta(layout.activations, "activations"), {"model": architecture.fingerprint})

    def gram(consumer: Map) -> Tensor:
        return read_tensor(layout.activations, consumer.layer, f"{consumer.module}.input_gram", "activations")

    return repair_local(architecture, plan, dense.__getitem__, gram, params.damping)


def _prove(
    layout: Layout, folder: Path, architecture: Architecture, plan: Plan, weights: Mapping[str, Tensor], shape: str
) -> dict[str, float]:
    """Compare the folder, loaded in a fresh process, with the dense model under the same weights and the mask."""
    model = load_model(layout.model, torch.float32)
    _set_weights(model, architecture, weights)
    tokens, _ = read_tokens(layout.calibration, architecture.fingerprint)
    ids = torch.from_numpy(tokens[:_CHECKED_SEQUENCES, :_CHECKED_LENGTH])
    with masked(model, architecture, plan):
        expected = reference_logits(model, ids)
    found = verify_folder(folder, ids, expected, remote=shape == "per_layer")
    return {"logit_difference": found.difference, "logit_scale": found.scale}


def _set_weights(model: nn.Module, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for parameter in architecture.parameters:
            model.get_parameter(parameter.name).copy_(weights[parameter.name])


def _versions() -> dict[str, Any]:
    names = ("libprune", "torch", "transformers")
    return {"versions": {name: version(name) for name in names} | {"python": platform.python_version()}}
