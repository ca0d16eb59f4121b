"""Removing wholly masked units for real: from a masked model to a smaller one, and the proof that both are alike."""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from libprune.engine.architecture import Architecture, Map
from libprune.engine.describe import added_biases, describe, with_biases
from libprune.engine.errors import LibpruneError, NotExpressibleError
from libprune.engine.family import families
from libprune.engine.plan import Plan
from libprune.engine.stock_config import bias_key
from libprune.engine.surgery import slice_state
from libprune.engine.tables import join_blocks, unit_index
from libprune.masks.contributions import language_contributions
from libprune.masks.decision import Decision, of_dense, settle
from libprune.masks.files import Masked, Model, fresh
from libprune.models.folder import fingerprint, load_model
from libprune.pipeline.artifacts import write_table
from libprune.pipeline.atomic import scratch_folder
from libprune.results.folder import pruned_config, write_pruned
from libprune.results.proof import agrees, masked_logits, reference_logits, verify_folder
from libprune.results.record import PLAN, versions, write_provenance

_SEQUENCES, _LENGTH = 2, 32


@dataclass(frozen=True)
class Extraction(Generic[Model]):
    """A masked model, what can be removed of it, and what is left.

    Attributes:
        masked: the model as it was given.
        own: its description.
        architecture: its description with the biases that are added.
        decision: which units go, and what folds into which bias.
    """

    masked: Masked[Model]
    own: Architecture
    architecture: Architecture
    decision: Decision

    @property
    def plan(self) -> Plan:
        """Which units stay."""
        return self.decision.plan

    @property
    def repair(self) -> str:
        """`masks` where weights of the result differ from the given ones, else `none`."""
        return "masks" if self.masked.masks or self.decision.folds else "none"

    @property
    def shape(self) -> str:
        """The shape of the result: `uniform`, `per_layer` or `network`."""
        raise NotImplementedError


@dataclass(frozen=True)
class LanguageExtraction(Extraction[PreTrainedModel]):
    """The extraction of a language model, with the smaller model that it gives.

    Attributes:
        config: of the dense shape, with the biases that are added.
    """

    config: PreTrainedConfig

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
        weights = {name: parameter.detach() for name, parameter in self.masked.model.named_parameters()}
        weights |= added_biases(self.own, self.architecture)
        for name, fold in self.decision.folds.items():
            weights[name] = (weights[name].double() + torch.from_numpy(fold)).float()
        return weights

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The smaller model's parameters by its own names, in the stored type."""
        return slice_state(self._typed, self.architecture, self.plan)

    @property
    def _typed(self) -> dict[str, Tensor]:
        return {name: weight.to(self.masked.dtype) for name, weight in self.weights.items()}

    def smaller(self) -> PreTrainedModel:
        """The smaller model, in the stored type and evaluation mode; of the shape `per_layer` with code of its own."""
        with scratch_folder() as scratch:
            folder, nothing = Path(scratch, "pruned"), Path(scratch, "nothing")
            folder.mkdir()
            nothing.mkdir()
            self._write(folder, nothing)
            return load_model(folder, self.masked.dtype, trust_remote_code=self.shape == "per_layer")

    def _write(self, folder: Path, source: Path) -> None:
        write_pruned(folder, source, self.architecture, self.plan, self.shape, self.state, self.config)

    def save(self, folder: Path, source: Path) -> dict[str, float]:
        """Write the smaller model into an empty folder, with its record, and prove that it computes the same.

        Args:
            folder: where to.
            source: the folder of the dense model, whose tokenizer is copied.

        Returns:
            The largest difference of a logit that the removal makes in float32, that of the folder in a fresh process,
            and the largest logit.

        Raises:
            LibpruneError: if the outputs differ.
        """
        self._write(folder, source)
        meta = {"model": fingerprint(source), "shape": self.shape}
        write_table(folder / PLAN, unit_index(self.own) | {"keep": join_blocks(self.own, self.plan.keep)}, meta)
        proof = self._prove(folder)
        made: dict[str, Any] = {
            "plan": meta,
            "slice": {"repair": self.repair, "dtype": str(self.masked.dtype).removeprefix("torch.")},
            "masks": {"tensors": len(self.masked.masks), "folded": sorted(self.decision.folds)},
            "biases_added": list(self.decision.added),
            "proof": proof,
        }
        write_provenance(folder, made | versions())
        return proof

    def _prove(self, folder: Path) -> dict[str, float]:
        """Two steps, since storing a folded bias in fewer bits rounds it: the removal in float32, then the folder."""
        length = min(_LENGTH, self.own.sizes.get("positions", _LENGTH))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.own.sizes["vocab"], (_SEQUENCES, length), generator=generator)
        expected = reference_logits(self.masked.model, ids)
        model = fresh(type(self.masked.model), self.config)
        removed = masked_logits(model, self.architecture, self.plan, self.weights, ids)
        difference, scale = float((removed - expected).abs().max()), float(expected.abs().max())
        if not agrees(difference, scale):
            raise LibpruneError(
                f"without the wholly masked units the logits differ by {difference:.3g} of {scale:.3g}. This is a "
                "defect of libprune; please report the model and its masks"
            )
        expected = masked_logits(model, self.architecture, self.plan, self._typed, ids)
        remote, head = self.shape == "per_layer", self.own.head
        reloaded = verify_folder(folder, ids, expected, remote=remote, head=head)
        return {
            "removal_difference": difference,
            "logit_difference": reloaded.difference,
            "logit_scale": reloaded.scale,
        }


def extraction(masked: Masked[PreTrainedModel]) -> LanguageExtraction:
    """What can be removed of a masked language model.

    Raises:
        LibpruneError: if no family describes it, or no layer is left.
    """
    model = masked.model
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    own = of_dense(describe(model, accept=tuple(config.to_dict())))
    names = {parameter.name for parameter in own.parameters}

    def obstacle(model: nn.Module, consumer: Map) -> str:
        if consumer.bias in names or bias_key(own.family, config, consumer.part) is not None:
            return ""
        return f"they send a constant, and the config of this {config.model_type} model can say no bias to hold it"

    decision = settle(model, own, lambda model: language_contributions(model, own), obstacle)
    architecture, config = with_biases(own, config, decision.added)
    return LanguageExtraction(masked, own, architecture, decision, config)
