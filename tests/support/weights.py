"""Models and descriptions of which every weight is known: who owns it, and how it is stored."""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from libprune.engine.architecture import Architecture, Parameter, PartShape
from libprune.engine.axes import parse_expr
from libprune.engine.describe import describe


def one_part(axis_sizes: Mapping[str, int], parameters: Mapping[str, tuple[str, ...]]) -> Architecture:
    """One layer with one part of axis kv, whose parameters have the given dimensions in storage order."""
    return Architecture(
        family="hand-made",
        sizes=axis_sizes,
        layers=1,
        layers_path="layers",
        parts={"part": PartShape("kv", "part", ())},
        parameters=tuple(
            Parameter(name, tuple(parse_expr(text) for text in dims), 0, "part") for name, dims in parameters.items()
        ),
        maps=(),
        cache=parse_expr("kv"),
        head="causal_lm",
        head_macs=0,
    )


def conv1d_stored(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with the weights of its blocks' maps stored the other way round, ``[input, output]``."""
    for entry in describe(model).maps:
        linear = model.get_submodule(entry.module)
        stored = Conv1D(linear.out_features, linear.in_features)
        stored.weight = nn.Parameter(linear.weight.detach().T.contiguous())
        if linear.bias is not None:
            stored.bias = linear.bias
        parent, _, name = entry.module.rpartition(".")
        setattr(model.get_submodule(parent), name, stored)
    return model


SEPARATE = ("llama", "llama_mha", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3")
"""Families whose maps are those of Llama."""


def elements(model: nn.Module, architecture: Architecture, layer: int, part: str, unit: int) -> list[Tensor]:
    """The elements of a Llama-like block that carry a unit's index, cut out by hand."""
    block, axes = model.get_submodule(f"model.layers.{layer}"), architecture.sizes
    if part == "mlp":
        producers = {block.mlp.gate_proj: 1, block.mlp.up_proj: 1}
        consumer, width = block.mlp.down_proj, 1
    else:
        attention, head = block.self_attn, axes["d"]
        width = axes["q"] * head
        producers = {attention.q_proj: width, attention.k_proj: head, attention.v_proj: head}
        consumer = attention.o_proj
    taken = [consumer.weight[:, unit * width : (unit + 1) * width]]
    for producer, rows in producers.items():
        own = slice(unit * rows, (unit + 1) * rows)
        taken += [producer.weight[own]] + ([] if producer.bias is None else [producer.bias[own]])
    return [tensor.flatten() for tensor in taken]
