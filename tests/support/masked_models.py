"""Parts of a tiny Llama's layer, and weights of it that are set to zero."""

import numpy as np
from torch import nn
from torch.nn.utils import prune
from transformers import PreTrainedModel

from libprune.engine.plan import Plan

Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")  # noqa: E741


GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"


def removed(plan: Plan) -> dict[tuple[int, str], list[int]]:
    return {block: np.flatnonzero(~keep).tolist() for block, keep in plan.keep.items() if not keep.all()}


Zeros = dict[str, slice | int | list[int]]
"""Rows of a map, or columns of a consumer, that are zeroed; with `.bias` behind the name those of the bias."""


def zero(model: PreTrainedModel, zeros: Zeros, layer: int = 2) -> None:
    for name, where in zeros.items():
        tensor = model.model.layers[layer].get_parameter(name if name.endswith(".bias") else f"{name}.weight").data
        if name in (O, DOWN):
            tensor[:, where] = 0
        else:
            tensor[where] = 0


def unstructured(model: PreTrainedModel) -> None:
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            prune.random_unstructured(module, "weight", amount=0.25)
