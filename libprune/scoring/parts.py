"""The importance of one type's units: a single criterion, or what several make."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.engine.tables import Columns
from libprune.pipeline.sections import Score
from libprune.scoring.criteria import SCALINGS
from libprune.scoring.fusion import Values, Weights, adaptive_weights, expression
from libprune.scoring.learned import best_criterion, fit_losses

NATS = "nats"
READS_LOSSES = ("learned", "best")
"""The fusions that need measured losses."""


@dataclass(frozen=True)
class Alone:
    """One criterion by itself, over all units: its components, their sum, and what the sum is worth elsewhere.

    Attributes:
        components: `[units]` each, by name.
        importance: their sum, ``[units]``.
        comparable: whether it compares across layers and types.
        unit: what it is measured in.
        orders: of the components that come from gradients, the order in them.
    """

    components: Mapping[str, Values]
    importance: Values
    comparable: bool
    unit: str
    orders: Mapping[str, int]


@dataclass(frozen=True)
class Scored:
    """The importance of one type's units, ``[units of the type]``, and where it comes from.

    Attributes:
        components: arrays that add up to the importance, by name, if it is not scaled afterwards.
        importance: what the units are worth.
        source: the criteria, as an expression.
        nature: what it compares with: the importance of another type with the same entry; None: nothing beyond a
            layer and type.
        orders: of the components the order in the gradients; empty where a factor on gradients is not defined.
        facts: figures of the fusion, for the metadata.
    """

    components: Mapping[str, Values]
    importance: Values
    source: str
    nature: str | None
    orders: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)


def score_part(
    part: str, table: Columns, alone: Mapping[str, Alone], weights: Weights, measured: Columns, params: Score
) -> Scored:
    """The importance of one type's units.

    Args:
        part: the type.
        table: the index columns of all units.
        alone: its criteria.
        weights: how much each counts, where that is given.
        measured: the ablation table with `row`; empty where nothing reads it.
        params: how to fuse and to scale.

    Raises:
        LibpruneError: if the measured losses say nothing.
    """
    rows = np.flatnonzero(table["group_type"] == part)
    if len(alone) == 1:
        return _single(rows, table, weights, alone, params)
    if params.fusion in READS_LOSSES:
        chosen = measured["group_type"] == part
        units, increases = measured["row"][chosen], measured["loss_increase"][chosen]
        values = {name: one.importance[units] for name, one in alone.items()}
        if params.fusion == "learned":
            fit = fit_losses(values, increases, part)
            components = {name: weight * alone[name].importance[rows] for name, weight in fit.coefficients.items()}
            importance = _sum(components)
            shares = {name: float(values.sum() / importance.sum()) for name, values in components.items()}
            facts: dict[str, Any] = {"coefficients": dict(fit.coefficients), "shares": shares}
            facts |= {"r2": fit.r2, "r2_se": fit.error, "units": fit.units}
            return Scored(components, importance, expression(weights), NATS, {}, facts)
        best, correlations = best_criterion(values, increases, part)
        facts = {"rank_correlations": correlations, "units": len(units)}
        return _single(rows, table, {best: 1.0}, {best: alone[best]}, params, facts)
    if params.scaling == "none":
        return _in_nats(rows, alone, weights)
    return _scaled(rows, table, alone, weights, params)


def _single(
    rows: NDArray[np.int64],
    table: Columns,
    weights: Weights,
    alone: Mapping[str, Alone],
    params: Score,
    facts: Mapping[str, Any] | None = None,
) -> Scored:
    (name,) = alone
    one = alone[name]
    importance = one.importance[rows]
    if params.scaling != "none":
        importance = np.concatenate([SCALINGS[params.scaling](importance[own]) for own in _layers(rows, table)])
    components = {key: values[rows] for key, values in one.components.items()}
    nature = (one.unit if one.unit == NATS else name) if one.comparable else None
    return Scored(components, importance, expression(weights), nature, one.orders, facts or {})


def _in_nats(rows: NDArray[np.int64], alone: Mapping[str, Alone], weights: Weights) -> Scored:
    """The weighted mean of loss increases, with components kept apart, so that a gradient fix knows their orders."""
    components: dict[str, Values] = {}
    orders: dict[str, int] = {}
    for name, one in alone.items():
        orders |= one.orders
        for key, values in one.components.items():
            components[key] = components.get(key, np.zeros(len(rows))) + weights[name] * values[rows]
    known = orders if orders.keys() == components.keys() else {}
    return Scored(components, _sum(components), expression(weights), NATS, known)


def _scaled(
    rows: NDArray[np.int64], table: Columns, alone: Mapping[str, Alone], weights: Weights, params: Score
) -> Scored:
    """The mean of the criteria on the scale of each layer; weights are given, or found in each layer."""
    adaptive = params.fusion == "adaptive"
    components = {name: np.empty(len(rows)) for name in alone}
    used = []
    for own in _layers(rows, table):
        values = {name: one.importance[rows[own]] for name, one in alone.items()}
        shares = adaptive_weights(list(values.values())) if adaptive else np.array([weights[name] for name in alone])
        for share, (name, importance) in zip(shares, values.items(), strict=True):
            components[name][own] = share * SCALINGS[params.scaling](importance)
        used.append(shares)
    means = dict(zip(alone, np.mean(used, axis=0).tolist(), strict=True))
    facts = {"mean_weights": means} if adaptive else {}
    return Scored(components, _sum(components), expression(weights), None, {}, facts)


def _layers(rows: NDArray[np.int64], table: Columns) -> Iterator[NDArray[np.int64]]:
    """Positions in `rows` of each layer's units."""
    layers = table["layer_idx"][rows]
    for layer in np.unique(layers):
        yield np.flatnonzero(layers == layer)


def _sum(components: Mapping[str, Values]) -> Values:
    total: Values = np.sum(list(components.values()), axis=0)
    return total
