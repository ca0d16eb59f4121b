"""What the description of a model that lies here forbids: the share, its width, biases that its config cannot say."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from libprune.allocation.allocate import allocate, require_layers_priced
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.errors import BudgetError, LibpruneError
from libprune.engine.plan import Plan
from libprune.foresight.settings import refused, whole_layers
from libprune.pipeline.faults import Fault
from libprune.pipeline.params import Params
from libprune.pipeline.sections import Allocate, Prepare
from libprune.pipeline.sources import resolve
from libprune.scoring.expression import named_criteria

SAFE = 0.5
"""A share of the layers' parameters that every described family can lose, if nothing else is asked for: two thirds of
a layer are channels, of which all but one may go."""


def budget_faults(params: Params) -> Iterator[Fault]:
    """The faults of a share or a width that this model cannot have, and of a repair or a criterion that it cannot.

    The model is described only where the settings ask for what some model cannot give, since that takes seconds. Of a
    model of the hub nothing is known.
    """
    allocate, biases = params.allocate, params.slice.repair == "bias"
    counted = allocate.ratio is not None and allocate.objective != "latency" and _strained(allocate)
    if params.prepare.vocabulary is not None and allocate.ratio_of == "total":
        counted = False  # how much of it goes with the vocabulary is known when its text is read
    if allocate.width == "auto":
        counted = False  # how much of it goes with columns is known when these are measured
    compares = _COOPERATIVE in named_criteria(params.score)
    asked = counted or biases or compares or allocate.times or allocate.width is not None or allocate.depth != "none"
    if not asked or resolve(params.prepare.model) is None:
        return
    try:
        config, architecture = _described(params.prepare)
    except LibpruneError as error:
        yield Fault(f"prepare.model: {error}", ("prepare", "model"))
        return
    if biases and not _holds_biases(architecture, config):
        yield Fault(
            "slice.repair: bias needs a bias on the maps that read what is removed, and the config of this "
            f"{config.model_type} model cannot say one; choose slice.repair: local or sequential",
            ("slice", "repair"),
        )
    unfit = list(_unfit(params, config, architecture))
    yield from unfit
    try:
        if counted and not unfit:
            removable(architecture, allocate)
    except LibpruneError as error:
        told = str(error).replace("global removes", f"{allocate.method} removes")  # which is no more
        yield Fault(told, ("allocate", "ratio" if isinstance(error, BudgetError) else "method"))


_COOPERATIVE = "cooperative"


def _unfit(params: Params, config: Any, architecture: Architecture) -> Iterator[Fault]:
    """What a model of this description refuses of a criterion, a width, the time of a layer, or its removal."""
    from libprune.narrowing.measure import choose_widths
    from libprune.scoring.gram_columns import require_one_text
    from libprune.statistics.latency import measured_widths

    width = params.allocate.width
    yield from whole_layers(params, architecture.family, architecture.layers_stay)
    if _COOPERATIVE in named_criteria(params.score):
        yield from refused(("score", "criterion"), require_one_text, architecture)
    if width is not None:
        yield from refused(("allocate", "width"), choose_widths, architecture, config, params.width, width)
    if params.allocate.times:
        yield from refused(("allocate", "objective"), measured_widths, architecture, params.latency.widths)


def _described(section: Prepare) -> tuple[Any, Architecture]:
    """The config and the description of a model, of which no weight is read."""
    from libprune.engine.describe import describe, require_shared, without_weights
    from libprune.models.source import load_dense_config

    config = load_dense_config(section)
    model = without_weights(config, section.trust_remote_code)
    architecture = describe(model, accept=section.accept_config, experts=section.experts, heads=section.heads)
    require_shared(architecture)
    return config, architecture


def _holds_biases(architecture: Architecture, config: Any) -> bool:
    """Whether the maps that read some part have biases, or can have them by the config."""
    from libprune.engine.stock_config import bias_key

    names = {parameter.name for parameter in architecture.parameters}
    return any(
        bias_key(architecture.family, config, part)
        or all(consumer.bias in names for consumer in architecture.consumers(architecture.with_part(part)[0], part))
        for part in architecture.parts
    )


def _strained(allocate: Allocate) -> bool:
    """Whether there may be a model of which this cannot be removed; its layers are taken to be at least twice as much
    as those that are frozen and as what lies outside of them.
    """
    frozen = allocate.freeze_first + allocate.freeze_last
    demand = (allocate.ratio or 0) * (2 if allocate.ratio_of == "total" else 1) * (2 if frozen else 1)
    return (
        demand > SAFE
        or frozen > 2
        or allocate.columns is not None
        or any(getattr(allocate, key) != value for key, value in _USUAL.items())
    )


_LIMITS = ("objective", "min_groups", "min_channels", "channel_multiple", "collapse_below")
_USUAL = {key: getattr(Allocate(), key) for key in _LIMITS}


def removable(architecture: Architecture, params: Allocate) -> Plan:
    """A plan that removes the share, if there were no difference between units.

    How much a method can remove at all does not depend on scores, but for the layers that `hgsp` collapses.

    Raises:
        LibpruneError: if it cannot be removed.
    """
    if params.collapse_below:
        require_layers_priced(cost.prices(architecture, params.objective), params)
    alike = np.ones(sum(architecture.units(part) for _, part in architecture.blocks()))
    changes: dict[str, Any] = {"method": "uniform", "evaluations": 0, "split": "proportional"}
    if params.method != "uniform" and params.shape != "uniform":  # each removes no more than what may go anywhere
        empties = 0 in (params.min_groups, params.min_channels) and not architecture.layers_stay
        changes |= {"method": "global", "depth": "units" if params.may_empty or empties else "none"}
    if params.ordered or params.collapse_below:  # floors hold for what is not removed whole
        freely = {"method": "global", "min_groups": 0, "min_channels": 0, "collapse_below": 0.0, "layers": None}
        changes |= freely | {"depth": "none" if architecture.layers_stay else "units"}
    return allocate(architecture, {"score": alike, "importance": alike}, params.model_copy(update=changes))
