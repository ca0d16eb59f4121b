"""The model that is trained: a pruned folder, with all of its weights or with small matrices beside its linear maps."""

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.engine.describe import stored_tensors
from libprune.engine.errors import LibpruneError
from libprune.engine.family import described_by
from libprune.models.folder import load_model
from libprune.pipeline.sections import Recover
from libprune.results.record import Record

WEIGHTS = "model.safetensors"
"""The file of a checkpoint that holds what is trained, by the names of the parameters."""


def load_student(record: Record, params: Recover) -> PreTrainedModel:
    """Load a pruned folder on the CPU, in the type that its weights are trained in.

    Args:
        record: the record of the folder, whose own code runs if its layers differ in width.
        params: the type.
    """
    dtype = getattr(torch, params.dtype)
    return load_model(record.folder, dtype, trust_remote_code=record.remote)


def prepare(student: PreTrainedModel, params: Recover) -> nn.Module:
    """The model with the parameters that are trained: all of them, or those of `lora` beside its linear maps.

    Modules that a family leaves whole, such as a vision part, are not trained.

    Raises:
        LibpruneError: if the package peft is not installed, no map has a name that `recover.lora_targets` names, or it
            names a head that shares its weight with the embedding.
    """
    family = described_by(student.config.model_type)
    whole = () if family is None or family.tower is None else family.tower.untouched
    if params.method == "full":
        student.requires_grad_(True)
        for path in whole:
            student.get_submodule(path).requires_grad_(False)
        return student
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise LibpruneError("recover.method: lora needs peft; run `pip install 'libprune[lora]'`") from error
    targets = params.lora_targets if isinstance(params.lora_targets, str) else list(params.lora_targets)
    rank = params.lora_rank
    without = "|".join(rf"{re.escape(path)}\..*" for path in whole) or None
    config = LoraConfig(
        r=rank, lora_alpha=params.lora_alpha or 2 * rank, target_modules=targets, exclude_modules=without
    )
    tied = set(_tied(student))
    torch.manual_seed(params.seed)  # one of the two matrices beside each map begins with random numbers
    try:
        with warnings.catch_warnings():  # of names in transformers, and of maps that are stored as [in, out]
            warnings.simplefilter("ignore")
            trained = get_peft_model(student, config)
    except ValueError as error:
        raise LibpruneError(f"recover.lora_targets: {error}") from error
    if caught := tied.intersection(trained.targeted_module_names):
        raise LibpruneError(
            f"recover.lora_targets names {min(caught)}, whose weight is that of {min(tied - {min(caught)})} too: what "
            "is trained beside one of them cannot be added to both; take it out, or choose recover.method: full"
        )
    return trained


def _tied(model: PreTrainedModel) -> Iterator[str]:
    """The paths of the embedding and of the head, where these have one weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        yield from (name for name, module in model.named_modules() if module in (embedding, head))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; a shared one has one name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def read_weights(model: nn.Module, checkpoint: Path) -> None:
    """Set the trained parameters to those of a checkpoint.

    Raises:
        LibpruneError: if the checkpoint holds other parameters.
    """
    stored, own = load_file(checkpoint / WEIGHTS), trained_parameters(model)
    if stored.keys() != own.keys():
        odd = min(stored.keys() ^ own.keys())
        raise LibpruneError(f"{checkpoint} does not fit the model that is trained ({odd}); delete {checkpoint.parent}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])


def finished_weights(record: Record, params: Recover, checkpoint: Path | None) -> Mapping[str, Tensor]:
    """The tensors of the pruned model after training by their names, as they are stored; matrices of `lora` are added.

    Args:
        record: the record of the pruned folder.
        params: how it was trained.
        checkpoint: the folder of the step that is kept; None to leave the weights as they were.
    """
    finest = torch.promote_types(record.dtype, getattr(torch, params.dtype))  # the type of the training may round
    student = load_model(record.folder, finest, trust_remote_code=record.remote)
    if checkpoint is not None:
        trained: Any = prepare(student, params)
        read_weights(trained, checkpoint)
        if params.method == "lora":
            student = trained.merge_and_unload()
    weights = {name: tensor.detach() for name, tensor in stored_tensors(student).items()}
    buffers = weights.keys() - dict(student.named_parameters()).keys()
    weights = {name: tensor if name in buffers else tensor.to(record.dtype) for name, tensor in weights.items()}
    if buffers:  # which have types of their own
        own = stored_tensors(load_model(record.folder, record.dtype, trust_remote_code=record.remote))
        weights |= {name: own[name].detach() for name in buffers}
    return weights
