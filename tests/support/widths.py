"""Axes of residual streams as they could have been measured, and families whose streams can be narrower."""

import torch
from transformers import PreTrainedModel

from libprune.collection.stream import read_stream
from libprune.collection.stream_axes import Axes, Kind
from libprune.engine.architecture import RESIDUAL, Architecture
from tests.support.models import FAMILIES

STAY = {
    "llama_mha": "is not a multiple of the number of attention heads",
    "gemma": "multiplies the embeddings by the root of their width",
    "gemma2": "multiplies the embeddings by the root of their width",
    "gemma3": "multiplies the embeddings by the root of their width",
    "gemma4_text": "multiplies the embeddings by the root of their width",
    "gpt2": "must be both",
    "gpt_neox": "must be both",
    "opt": "must be both",
    "olmoe": "because this size follows from the width",
    "olmo2": "without a described norm in front of it",
    "olmo3": "without a described norm in front of it",
    "exaone4": "without a described norm in front of it",
    "nanochat": "without a described norm in front of it",
    "bert": "its head is masked_lm",
    "bert_classifier": "its head is sequence_classification",
    "bert_embedding": "its head is embedding",
    "roberta": "its head is embedding",
    "distilbert": "its head is embedding",
    "mpnet": "its head is embedding",
    "modernbert": "its head is embedding",
}
"""The families whose residual stream keeps its width, with what the message says."""
NARROWING = [name for name in FAMILIES if name not in STAY]


def width_of(architecture: Architecture) -> int:
    """A width below the whole that the kernels of experts take."""
    return (architecture.sizes[RESIDUAL] - 3) // 4 * 4


def made_axes(model: PreTrainedModel, architecture: Architecture, kind: Kind, seed: int = 0) -> Axes:
    """Random axes of a model, with moments as of states along them."""
    generator, whole = torch.Generator().manual_seed(seed), architecture.sizes[RESIDUAL]
    stream = read_stream(model, architecture)

    def moments() -> torch.Tensor:
        states = torch.randn(3 * whole, whole, generator=generator)
        return states.T @ states / len(states)

    gains = {name: model.get_parameter(n.weight).detach() + n.shift for name, n in stream.norms.items()}
    turned = kind == "principal"
    return Axes(
        stream,
        None if turned else torch.randperm(whole, generator=generator),
        torch.linalg.qr(torch.randn(whole, whole, generator=generator))[0] if turned else None,
        gains if turned else {},
        {name: torch.rand(whole, generator=generator) + 0.5 for name in stream.norms},
        {name: moments() for name in stream.readers.values()},
        {name: moments() for name in stream.readers.values()},
    )
