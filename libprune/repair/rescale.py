"""Rescaling behind whole layers or parts that are gone, for repairs that fit nothing there.

A gap leaves the residual stream shorter than what the later layers expect, so that what they add weighs too much:

    alpha = mean |h| / mean |h^|

over tokens, h the dense stream in front of the first layer behind the gap, h^ the masked one. Chen et al. 2025
(Prune&Comp, arXiv 2507.18212) lengthen the stream by alpha. Where every later layer, and what follows them, reads the
stream through a norm, dividing what all later layers add by alpha is the same function, up to the epsilons of the
norms. So every map that writes into the stream takes the factor 1 / alpha with its bias, which every config can say.

Behind several gaps alpha is measured with the stream lengthened at the earlier ones; a layer's factor is the product.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from libprune.collection.calibration import Calibration, set_up
from libprune.engine.architecture import NUMBERED, SHARING, Architecture
from libprune.engine.plan import Plan
from libprune.engine.surgery import hooked, masked
from libprune.models.layers import first_output, layers_of, run_layer
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute
from libprune.pipeline.terminal import note

SEQUENCES = 16
"""Calibration sequences that lengths are measured on, from the first."""
_EXACT = 0.1
"""What rounding and the epsilons of norms may do to the outputs, as a share of what lengthening the stream does."""


@dataclass(frozen=True)
class Rescaling:
    """By what layers behind gaps are multiplied.

    Attributes:
        factors: by layer what multiplies all that it writes into the residual stream; empty where it cannot be done.
        why_not: why it cannot be done, in words that follow a colon; empty if it can.
    """

    factors: Mapping[int, float]
    why_not: str = ""

    def by_name(self, architecture: Architecture) -> dict[str, float]:
        """The factors of the maps that write into the stream, and of the biases that they may have, by name."""
        return {
            name: factor
            for layer, factor in self.factors.items()
            for consumer in architecture.consumers_in(layer)
            for name in (consumer.weight, consumer.bias)
        }


def behind_gaps(architecture: Architecture, plan: Plan) -> tuple[int, ...]:
    """The first layer behind each gap that still writes into the stream.

    A gap is a layer without one of its parts, or several layers in a row that are gone.
    """
    places, behind = [], False
    for layer in range(architecture.layers):
        gone = [plan.gone(*block) for block in architecture.uses(layer)]
        if behind and not all(gone):
            places.append(layer)
            behind = False
        behind |= any(gone)
    return tuple(places)


def measure_rescaling(
    layout: Layout, architecture: Architecture, plan: Plan, compute: Compute, available: int
) -> Rescaling:
    """Measure the factors on the dense weights under the plan's mask; empty for a plan without gaps.

    Args:
        available: calibration sequences that there are.

    Raises:
        LibpruneError: if an artifact is missing or foreign, or under torchrun.
    """
    plan = replace(plan, width=None)  # whose axes have the same lengths
    places = behind_gaps(architecture, plan)
    if not places:
        return Rescaling({})
    if architecture.layers_stay in {NUMBERED, SHARING}:
        return _left_out(architecture.layers_stay)
    run = set_up(layout, compute, min(SEQUENCES, available), alone="slice")
    if not rescales_exactly(run.model, architecture, plan, places[0], next(run.sequences.passes(1)).ids.to(run.device)):
        return _left_out("the outputs of this model depend on the length of its residual stream")
    factors = factors_behind(run, plan, places)
    note("rescaled " + ", ".join(f"from layer {layer} on by {factors[layer]:.3f}" for layer in places))
    return Rescaling(factors)


def _left_out(why_not: str) -> Rescaling:
    note(f"slice.rescale: layers behind those that are gone stay as they are: {why_not}")
    return Rescaling({}, why_not)


@torch.no_grad()
def rescales_exactly(model: Any, architecture: Architecture, plan: Plan, place: int, ids: Tensor) -> bool:
    """Whether a stream twice as long from a layer on is the same as half of what all layers from there on add.

    Powers of two change no rounding, so that only the epsilons of norms are left. Norms behind the parts, readers
    without a norm, and multiples that a layer keeps for itself all make a difference as large as the lengthening.
    """
    layers = layers_of(model, architecture)
    writers = [entry for layer in range(place, len(layers)) for entry in architecture.consumers_in(layer)]

    def output() -> Float[Tensor, "..."]:
        return first_output(model(input_ids=ids, use_cache=False)).float()

    with masked(model, architecture, plan):
        plain = output()
        with hooked(model) as handles:
            handles.append(layers[place].register_forward_pre_hook(_double, with_kwargs=True))
            longer = output()
        with hooked(model) as handles:
            handles += [model.get_submodule(entry.module).register_forward_hook(_halve) for entry in writers]
            less = output()
    return bool((longer - less).norm() <= _EXACT * (longer - plain).norm())


def _double(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if args:
        return (2 * args[0], *args[1:]), kwargs
    return args, kwargs | {"hidden_states": 2 * kwargs["hidden_states"]}


def _halve(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output / 2


def factors_behind(run: Calibration, plan: Plan, places: Sequence[int]) -> dict[int, float]:
    """The factor of every layer from the first place on that still writes into the stream."""
    architecture, dense, factors = run.architecture, dict[int, float](), dict[int, float]()

    def keep(layer: int, states: list[Tensor]) -> list[Tensor]:
        if layer in places:
            dense[layer] = _length(states)
        return states

    def lengthen(layer: int, states: list[Tensor]) -> list[Tensor]:
        alpha = dense[layer] / _length(states) if layer in places else 1.0
        if layer >= places[0]:
            factors[layer] = factors.get(layer - 1, 1.0) / alpha
        return [state * alpha for state in states] if layer in places else states

    _through_layers(run, keep)
    with masked(run.model, architecture, plan):
        _through_layers(run, lengthen)
    return {
        layer: factor
        for layer, factor in factors.items()
        if not all(plan.gone(*block) for block in architecture.uses(layer))
    }


def _length(states: Sequence[Float[Tensor, "batch length model"]]) -> float:
    """Mean length of the stream over tokens; without first ones, whose states can be a thousand times longer."""
    norms = [state.float().norm(dim=-1) for state in states]
    return float(torch.cat([(each[:, 1:] if each.shape[1] > 1 else each).flatten() for each in norms]).mean())


@torch.no_grad()
def _through_layers(run: Calibration, before: Callable[[int, list[Tensor]], list[Tensor]]) -> None:
    """Take the residual stream of the text through all layers; a function sees it before each and may change it."""
    layers, texts = layers_of(run.model, run.architecture), [each.ids for each in run.sequences.passes(run.at_once)]
    texts = [ids.to(run.device) for ids in texts]
    states = [run_layer(run.model, layers, 0, ids, None, until=layers[0])[0] for ids in texts]
    for layer in range(len(layers)):
        found = zip(texts, before(layer, states), strict=True)
        states = [first_output(run_layer(run.model, layers, layer, ids, state)[0]) for ids, state in found]
