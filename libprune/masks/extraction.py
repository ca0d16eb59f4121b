"""Removing wholly masked units for real: from a masked model to a smaller one, and the proof that both are alike."""

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from libprune.engine.architecture import Architecture, Block
from libprune.engine.describe import describe, with_biases
from libprune.engine.errors import LibpruneError, NotExpressibleError
from libprune.engine.family import families
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked as under_plan
from libprune.engine.surgery import slice_state
from libprune.engine.tables import unit_index
from libprune.masks.contributions import Reach, reaches
from libprune.masks.decision import Decision, decide
from libprune.masks.files import Masked, fresh
from libprune.models.folder import fingerprint, load_model
from libprune.pipeline.artifacts import write_table
from libprune.results.folder import pruned_config, write_pruned
from libprune.results.proof import reference_logits, verify_folder
from libprune.results.record import PLAN, versions, write_provenance

_SEQUENCES, _LENGTH, _TOLERANCE = 2, 32, 1e-4


@dataclass(frozen=True)
class Extraction:
    """A masked model, what can be removed of it, and what is left.

    Attributes:
        masked: the model as it was given.
        own: its description.
        architecture: the same with the biases that are added.
        config: of the dense shape, with these biases.
        reach: what every unit sends.
        decision: which units go, and what folds into which bias.
    """

    masked: Masked
    own: Architecture
    architecture: Architecture
    config: PreTrainedConfig
    reach: Mapping[Block, Reach]
    decision: Decision

    @property
    def plan(self) -> Plan:
        """Which units stay."""
        return self.decision.plan

    @cached_property
    def shape(self) -> str:
        """`uniform` where a stock config can say what is left, else `per_layer`."""
        if self.plan.uniform:
            try:
                pruned_config(families()[self.own.family], self.config, self.architecture, self.plan, "uniform")
            except NotExpressibleError:
                return "per_layer"
            return "uniform"
        return "per_layer"

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The model's parameters, float32, in the dense shape, constants folded into biases."""
        model, sizes = self.masked.model, self.architecture.sizes
        names = {parameter.name for parameter in self.own.parameters}
        weights = {
            p.name: model.get_parameter(p.name).detach()
            if p.name in names
            else torch.zeros([dim.size(sizes) for dim in p.dims])
            for p in self.architecture.parameters
        }
        for name, fold in self.decision.folds.items():
            weights[name] = (weights[name].double() + torch.from_numpy(fold)).float()
        return weights

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The smaller model's parameters by its own names, in the stored type."""
        stored = {name: weight.to(self.masked.dtype) for name, weight in self.weights.items()}
        return slice_state(stored, self.architecture, self.plan)

    def smaller(self) -> PreTrainedModel:
        """The smaller model, in the stored type and evaluation mode; of the shape `per_layer` with code of its own."""
        with tempfile.TemporaryDirectory() as scratch:
            folder, nothing = Path(scratch, "pruned"), Path(scratch, "nothing")
            folder.mkdir()
            nothing.mkdir()
            self.write(folder, nothing)
            return load_model(folder, self.masked.dtype, trust_remote_code=self.shape == "per_layer")

    def write(self, folder: Path, source: Path) -> None:
        """Write the smaller model into an empty folder; the tokenizer comes from `source`."""
        write_pruned(folder, source, self.architecture, self.plan, self.shape, self.state, self.config)


def extraction(masked: Masked) -> Extraction:
    """What can be removed of a masked model.

    Raises:
        LibpruneError: if no family describes it, or no layer is left.
    """
    model = masked.model
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    own = describe(model, accept=tuple(config.to_dict()))
    reach = reaches(model, own)
    decision = decide(model, own, config, reach)
    architecture, config = with_biases(own, config, decision.added)
    return Extraction(masked, own, architecture, config, reach, decision)


def write_extraction(found: Extraction, folder: Path, source: Path) -> dict[str, float]:
    """Write the smaller model into an empty folder, with its record, and prove that it computes the same.

    Returns:
        The largest difference of a logit that the removal makes in float32, that of the folder in a fresh process,
        and the largest logit.

    Raises:
        LibpruneError: if the outputs differ.
    """
    found.write(folder, source)
    digest = fingerprint(source)
    keep = np.concatenate([found.plan.keep[block] for block in found.own.blocks()])
    meta = {"model": digest, "shape": found.shape}
    write_table(folder / PLAN, unit_index(found.own) | {"keep": keep}, meta)
    proof = _prove(found, folder)
    changed = bool(found.masked.masks or found.decision.folds)
    made: dict[str, Any] = {
        "plan": meta,
        "slice": {"repair": "masks" if changed else "none", "dtype": str(found.masked.dtype).removeprefix("torch.")},
        "masks": {"tensors": len(found.masked.masks), "folded": sorted(found.decision.folds)},
        "biases_added": list(found.decision.added),
        "proof": proof,
    }
    write_provenance(folder, made | versions())
    return proof


def _prove(found: Extraction, folder: Path) -> dict[str, float]:
    """Two steps, since storing a folded bias in fewer bits rounds it: the removal in float32, then the folder."""
    ids = _tokens(found.own)
    expected = reference_logits(found.masked.model, ids)
    model = fresh(type(found.masked.model), found.config)
    removed = _logits_under(model, found, found.weights, ids)
    difference, scale = float((removed - expected).abs().max()), float(expected.abs().max())
    if not difference <= _TOLERANCE * scale:
        raise LibpruneError(
            f"without the wholly masked units the logits differ by {difference:.3g} of {scale:.3g}. This is a defect "
            "of libprune; please report the model and its masks"
        )
    stored = {name: weight.to(found.masked.dtype).float() for name, weight in found.weights.items()}
    expected = _logits_under(model, found, stored, ids)
    remote, head = found.shape == "per_layer", found.own.head
    reloaded = verify_folder(folder, ids, expected, remote=remote, head=head)
    return {"removal_difference": difference, "logit_difference": reloaded.difference, "logit_scale": reloaded.scale}


def _tokens(architecture: Architecture) -> Tensor:
    length = min(_LENGTH, architecture.sizes.get("positions", _LENGTH))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(architecture.sizes["vocab"], (_SEQUENCES, length), generator=generator)


def _logits_under(model: PreTrainedModel, found: Extraction, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits of the dense shape with these weights, under the plan."""
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_parameter(name).copy_(weight)
    with under_plan(model, found.architecture, found.plan):
        return reference_logits(model, ids)
