"""Whole forward passes of a model, and what its layers and consumers got and gave in them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture, Map


@dataclass
class Pass:
    """What a whole forward pass shows: the inputs of blocks, and inputs and outputs of consumers, by module."""

    states: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


def forward(model: PreTrainedModel, architecture: Architecture, ids: Tensor) -> Pass:
    found, handles = Pass(), []

    def in_sequences(x: Tensor) -> Tensor:
        return x.detach().reshape(*ids.shape, -1)

    for layer in range(architecture.layers):
        name = f"{architecture.layers_path}.{layer}"

        def block(_, args, kwargs, name=name):
            found.states[name] = (args[0] if args else kwargs["hidden_states"]).detach()

        handles.append(model.get_submodule(name).register_forward_pre_hook(block, with_kwargs=True))
    for layer, part in architecture.blocks():
        for consumer in architecture.consumers(layer, part):

            def watch(_, args, output, name=consumer.module):
                found.inputs[name], found.outputs[name] = in_sequences(args[0]), in_sequences(output)

            handles.append(model.get_submodule(consumer.module).register_forward_hook(watch))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def in_order(architecture: Architecture, layer: int) -> list[Map]:
    """The consumers of a layer in the order in which they add to the residual stream."""
    return architecture.consumers_in(layer)
