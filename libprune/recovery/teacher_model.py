"""The model that the pruned one learns from: the dense model, or another one that `recover.teacher` names."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from libprune.collection.calibration import place
from libprune.collection.offload import PassBytes, pass_bytes, scratch_of, settle
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe, without_weights
from libprune.engine.errors import ParamsError, SourceError
from libprune.engine.stock_config import keys_of
from libprune.models.folder import fingerprint, load_config, load_model, own_model
from libprune.models.parallel import World
from libprune.models.source import load_dense, load_dense_config
from libprune.pipeline.digests import KnownDigests
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Prepare, Recover
from libprune.pipeline.sources import resolve


def described_teacher(architecture: Architecture, params: Recover) -> Architecture:
    """The description of the model to learn from, of which only the config is read.

    Args:
        architecture: the description of the dense model.
        params: the name of another model, if one is named.

    Raises:
        LibpruneError: if that model's config cannot be read, or it is of no family that is known.
    """
    if params.teacher is None:
        return architecture
    with _under_its_key():
        config = load_dense_config(Prepare(model=params.teacher))
        return describe(without_weights(config), accept=keys_of(config.to_dict()))


def teacher_needs(architecture: Architecture, params: Recover, compute: Compute, dtype: torch.dtype) -> PassBytes:
    """What a pass of the model to learn from holds, which never goes back; its description is read from its config.

    Args:
        architecture: the description of the dense model.
        params: the name of another model, if one is named, and the length of a sequence.
        compute: tokens of a pass.
        dtype: the type that it computes in.

    Raises:
        LibpruneError: as `described_teacher`.
    """
    needs = pass_bytes(described_teacher(architecture, params), max(compute.batch_tokens, params.length), dtype)
    return replace(needs, kept=needs.layer + needs.states)


def settle_teacher(
    architecture: Architecture,
    params: Recover,
    compute: Compute,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
    beside: int = 0,
) -> Compute:
    """Choose where the weights of the model to learn from are, if the params leave it open, and say so.

    Args:
        architecture: the description of the dense model.
        params: the name of another model, if one is named, and the length of a sequence.
        compute: the params of how models run.
        world: the processes.
        device: where the model runs.
        dtype: the type that it computes in.
        beside: bytes of that memory that the training of the pruned model is going to take.

    Returns:
        The params, with `offload` settled.

    Raises:
        LibpruneError: as `described_teacher`.
    """
    return settle(compute, teacher_needs(architecture, params, compute, dtype), device, world, beside)


def load_teacher(
    layout: Layout,
    architecture: Architecture,
    params: Recover,
    compute: Compute,
    world: World,
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Load the model to learn from, in evaluation mode, and put it where it will run.

    Args:
        layout: holds the dense model.
        architecture: the description of the dense model.
        params: the name of another model, if one is named.
        compute: where its weights are, as `settle_teacher` has settled it.
        world: whether weights are shared out over processes.
        device: where the model runs.
        dtype: the type that it computes in.

    Raises:
        LibpruneError: if the model cannot be loaded, or has another vocabulary than the dense model.
    """
    compute = compute.model_copy(update={"gradient_checkpointing": False})
    scratch = scratch_of(layout, compute)
    if params.teacher is None:
        model = load_model(own_model(layout, architecture), dtype, scratch=scratch)
        return place(model, architecture, compute, world, device)
    with _under_its_key():
        model, tokenizer = load_dense(_source(params.teacher, dtype), scratch)
    own = AutoTokenizer.from_pretrained(own_model(layout, architecture), local_files_only=True, trust_remote_code=False)
    if tokenizer.get_vocab() != own.get_vocab():
        raise ParamsError(
            f"recover.teacher: {params.teacher} has another vocabulary ({len(tokenizer):,} tokens) than the model that "
            f"is pruned ({len(own):,} tokens); their predictions cannot be compared"
        )
    rows, needed = model.get_input_embeddings().weight.shape[0], max(own.get_vocab().values()) + 1
    if rows < min(needed, architecture.sizes["vocab"]):
        raise ParamsError(
            f"recover.teacher: {params.teacher} has {rows:,} rows of embeddings for {needed:,} tokens; its tokenizer "
            "is that of another model"
        )
    if architecture.head == "sequence_classification":
        theirs, ours = model.config.num_labels, load_config(own_model(layout, architecture)).num_labels
        if theirs != ours:
            raise ParamsError(
                f"recover.teacher: {params.teacher} tells {theirs} labels apart, the model that is pruned {ours}; "
                "they cannot be compared"
            )
    width = architecture.sizes["model"]
    if architecture.pooling is not None and model.config.hidden_size != width:
        raise ParamsError(
            f"recover.teacher: {params.teacher} gives embeddings of {model.config.hidden_size} numbers, the model that "
            f"is pruned of {width}; they cannot be compared"
        )
    return place(model, describe(model, accept=keys_of(model.config.to_dict())), compute, world, device)


def require_taught(architecture: Architecture, params: Recover) -> None:
    """Stop if the params ask for predictions of a model that gives embeddings.

    Raises:
        ParamsError: naming the key.
    """
    for said in params.of_predictions.values() if architecture.pooling is not None else ():
        raise ParamsError(said)


@contextmanager
def _under_its_key() -> Iterator[None]:
    """Inside the context, errors about a model that is named name the key of the model to learn from."""
    try:
        yield
    except SourceError as error:
        raise SourceError(str(error).replace("prepare.model", "recover.teacher")) from error


def _source(name: str, dtype: torch.dtype) -> Prepare:
    return Prepare.model_validate({"model": name, "dtype": str(dtype).removeprefix("torch.")})


def teacher_identity(layout: Layout, architecture: Architecture, params: Recover) -> str:
    """What tells the model to learn from apart: a digest of its files, or its name on the hub.

    Raises:
        SourceError: if a local file or folder, or a package, does not exist.
    """
    if params.teacher is None:
        return architecture.fingerprint
    path: Path | None = resolve(params.teacher)
    if path is None:
        return params.teacher
    known = KnownDigests(layout.digests)
    return fingerprint(path, known) if path.is_dir() else known.of({"": path})[""][:16]


def prediction_origin(
    layout: Layout, architecture: Architecture, params: Recover, tokens: Mapping[str, Any]
) -> dict[str, str]:
    """What predictions to learn from are made from: the dense model, the model to learn from, and the text.

    Args:
        layout: keeps the digests of files that were read before.
        architecture: the description of the dense model.
        params: the name of another model to learn from, if one is named.
        tokens: the metadata of the text to train on.

    Raises:
        SourceError: if a local file or folder, or a package, does not exist.
    """
    teacher = teacher_identity(layout, architecture, params)
    return {"model": architecture.fingerprint, "teacher": teacher, "tokens": tokens["tokens"]}
