"""Which wholly masked units can go, and why others of them stay."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from libprune.engine.architecture import Architecture, Block, Map
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.stock_config import bias_key
from libprune.masks.contributions import Reach, matrix


@dataclass(frozen=True)
class Decision:
    """What becomes of wholly masked units.

    Attributes:
        plan: which units stay.
        stays: by (layer, part), why wholly masked units of it stay; without the blocks where none does.
        folds: by bias of a consumer, what the removed units send to every token, ``[output]``; where that is not zero.
        added: parts whose maps have no bias yet and need one for that.
    """

    plan: Plan
    stays: Mapping[Block, str]
    folds: Mapping[str, Float64[np.ndarray, " output"]]
    added: tuple[str, ...]


def decide(
    model: PreTrainedModel, architecture: Architecture, config: PreTrainedConfig, reach: Mapping[Block, Reach]
) -> Decision:
    """Remove every wholly masked unit that can go without a change of the model's outputs.

    Args:
        model: masks multiplied into the weights.
        architecture: its description.
        config: of the model; whether it can say biases decides whether constants can be folded.
        reach: what its units send.

    Raises:
        LibpruneError: if no layer is left.
    """
    names = {parameter.name for parameter in architecture.parameters}
    gone: dict[Block, Bool[np.ndarray, " units"]] = {}
    stays: dict[Block, str] = {}
    for block, sent in reach.items():
        gone[block], why = _removable(model, architecture, config, names, block, sent)
        if why:
            stays[block] = why
    if architecture.layers_stay:
        _leave_layers(architecture, gone, stays)
    plan = Plan({block: ~units for block, units in gone.items()})
    if not plan.layers:
        raise LibpruneError("every unit of every layer is wholly masked: the layers compute nothing, so none is left")
    folds: dict[str, Float64[np.ndarray, " output"]] = {}
    added: set[str] = set()
    for block in architecture.blocks():
        for consumer in architecture.consumers(*block):
            sends = _fold(model, architecture, consumer, reach[block], gone[block])
            if sends.any() and not plan.gone(*block):
                folds[consumer.bias] = sends
                added |= set() if consumer.bias in names else {consumer.part}
    return Decision(plan, stays, folds, tuple(sorted(added)))


def _removable(
    model: PreTrainedModel,
    architecture: Architecture,
    config: PreTrainedConfig,
    names: set[str],
    block: Block,
    sent: Reach,
) -> tuple[Bool[np.ndarray, " units"], str]:
    """The units of a block that can go, and why the other wholly masked ones stay."""
    shape, consumers = architecture.parts[block[1]], architecture.consumers(*block)
    holds = all(c.bias in names for c in consumers) or bias_key(architecture.family, config, block[1]) is not None
    gone, why = (sent.still if holds else sent.silent).copy(), ""
    if (sent.still & ~gone).any():
        why = f"they send a constant, and the config of this {config.model_type} model can say no bias to hold it"
    if shape.coupled and gone.any() and not gone.all():
        gone[:], why = False, f"{' and '.join(shape.coupled)} couple all units, which can only go together"
    if gone.all() and any(_constant(model, architecture, c, sent, gone, names).any() for c in consumers):
        gone[: len(gone) if shape.coupled else 1] = False
        why = "the part adds the same vector to every token, and one unit stays to carry its bias"
    return gone, why


def _leave_layers(
    architecture: Architecture, gone: dict[Block, Bool[np.ndarray, " units"]], stays: dict[Block, str]
) -> None:
    """Leave a unit in every layer, where norms on the residual stream itself forbid that a layer goes."""
    last = list(architecture.parts)[-1]
    for layer in range(architecture.layers):
        if all(gone[layer, part].all() for part in architecture.parts):
            gone[layer, last][: None if architecture.parts[last].coupled else 1] = False
            stays[layer, last] = "norms of the block work on the residual stream itself; something of a layer must stay"


def fold(
    model: nn.Module,
    consumer: Map,
    constants: Float64[np.ndarray, " input"],
    removed: Bool[np.ndarray, " input"],
) -> Float64[np.ndarray, " output"]:
    """What the removed positions of a consumer's input send through it, to every token alike."""
    columns = matrix(model, consumer).double().numpy()[:, removed]
    sent: Float64[np.ndarray, " output"] = columns @ constants[removed]
    return sent


def _fold(
    model: PreTrainedModel, architecture: Architecture, consumer: Map, sent: Reach, gone: Bool[np.ndarray, " units"]
) -> Float64[np.ndarray, " output"]:
    """What the removed units of a block send through one consumer."""
    removed = ~consumer.input.kept(architecture.parts[consumer.part].axis, architecture.sizes, ~gone)
    return fold(model, consumer, sent.constants[consumer.module], removed)


def _constant(
    model: PreTrainedModel,
    architecture: Architecture,
    consumer: Map,
    sent: Reach,
    gone: Bool[np.ndarray, " units"],
    names: set[str],
) -> Float64[np.ndarray, " output"]:
    """What a consumer adds to every token once all its units have gone."""
    sends = _fold(model, architecture, consumer, sent, gone)
    return sends + model.get_parameter(consumer.bias).detach().double().numpy() if consumer.bias in names else sends
