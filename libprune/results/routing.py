"""What routing does after a cut: which experts the tokens go through in the dense model, and in a pruned one.

The router of a mixture chooses some experts for every token, and a weight for each. Where experts are removed, a token
that went through one of them goes through another. Its hidden states change with that, and so may the choices in the
layers behind, also of tokens whose own experts were all kept.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from libprune.engine.architecture import STAND_IN, Architecture
from libprune.engine.plan import Plan
from libprune.engine.surgery import hooked

Place = tuple[int, str]
"""A layer of the dense model, and the path of a mixture's experts inside the layer."""


@dataclass(frozen=True)
class Choices:
    """The experts that the tokens of a text went through, by mixture; in the dense model's numbering.

    Attributes:
        chosen: the experts of each token in each batch, ascending, ``[tokens, k]``.
        weights: the sum of the router's weights of each expert, over all tokens, ``[experts]``.
    """

    chosen: dict[Place, list[Tensor]] = field(default_factory=dict)
    weights: dict[Place, Tensor] = field(default_factory=dict)


@contextmanager
def watched(model: nn.Module, architecture: Architecture, plan: Plan) -> Iterator[Choices]:
    """Inside the context, note which experts the tokens go through. Models without mixtures are left alone.

    Args:
        model: the dense model, or what is left of it.
        architecture: of the dense model.
        plan: which units the model has.
    """
    choices = Choices()
    with hooked(model) as handles:
        for place, kept in _experts(architecture, plan).items():
            layer, path = place
            experts = model.get_submodule(f"{architecture.layers_path}.{plan.layers.index(layer)}.{path}")
            choices.chosen[place], choices.weights[place] = [], torch.zeros(len(kept), dtype=torch.float64)
            handles.append(experts.register_forward_pre_hook(partial(_note, choices, place, kept)))
        yield choices


def _experts(architecture: Architecture, plan: Plan) -> dict[Place, NDArray[np.bool_]]:
    """Which experts a plan keeps of each mixture, in the layers that are left."""
    found = {}
    for entry in architecture.maps:
        if entry.stack and entry.layer in plan.layers:
            experts, _, _ = entry.module.rpartition(STAND_IN)
            path = experts.removeprefix(f"{architecture.layers_path}.{entry.layer}.")
            of = [part for part in architecture.parts_of(entry.layer) if architecture.parts[part].axis == entry.stack]
            kept = plan.keep[entry.layer, of[0]] if of else np.ones(architecture.sizes[entry.stack], dtype=bool)
            if kept.any():
                found[entry.layer, path] = kept
    return found


def _note(choices: Choices, place: Place, kept: NDArray[np.bool_], module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of the experts of a mixture that notes what the router has chosen for a batch."""
    _, chosen, weights = args
    numbers = torch.from_numpy(np.flatnonzero(kept))[chosen.cpu()]
    choices.chosen[place].append(numbers.sort(1).values.to(torch.int16))
    choices.weights[place].index_add_(0, numbers.flatten(), weights.double().flatten().cpu())


def routing_changes(
    dense: Choices, others: Mapping[str, Choices], architecture: Architecture, plan: Plan
) -> dict[str, Any] | None:
    """What became of the dense model's routing in each mixture that is left.

    Args:
        dense: of the dense model.
        others: of models that the plan has left, on the same text in the same order, by name.
        architecture: of the dense model.
        plan: which units are kept.

    Returns:
        `mixtures`, for each of them its `layer` in the dense model; how many `experts` it had, and `kept`;
        `removed_weight`, the share of the weight of the dense model's router that went to experts which are removed, 0
        to 1; and `changed`, by name the share of tokens that go through other experts than in the dense model, 0 to 1.
        Beside it the means of `removed_weight` and `changed` over the mixtures. None of a model without mixtures.
    """
    rows: list[dict[str, Any]] = []
    for place, kept in _experts(architecture, plan).items():
        before, weights = torch.cat(dense.chosen[place]), dense.weights[place]
        after = {name: torch.cat(other.chosen[place]) for name, other in others.items()}
        rows.append(
            {
                "layer": place[0],
                "experts": len(kept),
                "kept": int(kept.sum()),
                "removed_weight": float(weights[torch.from_numpy(~kept)].sum() / weights.sum()),
                "changed": {name: float((one != before).any(1).double().mean()) for name, one in after.items()},
            }
        )
    if not rows:
        return None
    return {
        "removed_weight": float(np.mean([row["removed_weight"] for row in rows])),
        "changed": {name: float(np.mean([row["changed"][name] for row in rows])) for name in others},
        "mixtures": rows,
    }
