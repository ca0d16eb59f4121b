"""Fusion: the importance of one part's units, by a single criterion or by several together.

`simple` and `weighted` are means with the same weights in all layers; `adaptive` finds weights for every layer. Unless
all criteria are in nats, they are put on one scale first. `learned` and `best` read measured losses, see
`libprune.scoring.learned`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.engine.tables import Columns, Values
from libprune.pipeline.sections import Score
from libprune.scoring.expression import Weights, format_criteria
from libprune.scoring.learned import best_criterion, fit_losses
from libprune.scoring.scaling import SCALINGS

NATS = "nats"
"""The unit of criteria that estimate an increase of the loss."""
READS_LOSSES = ("learned", "best")
"""The fusions that need measured losses."""


@dataclass(frozen=True)
class CriterionScores:
    """What one criterion says of all units, before it is fused or scaled.

    Attributes:
        components: arrays that add up to the importance, ``[units]`` each, by name.
        importance: their sum, ``[units]``.
        comparable: whether the importance compares across layers and parts.
        unit: what the importance is measured in.
        orders: the order in the gradients of the components that come from gradients.
    """

    components: Mapping[str, Values]
    importance: Values
    comparable: bool
    unit: str
    orders: Mapping[str, int]


@dataclass(frozen=True)
class PartScores:
    """The importance of one part's units, ``[units of the part]``, and where it comes from.

    Attributes:
        components: arrays by name, which add up to the importance unless it was scaled afterwards.
        importance: what the units are worth.
        source: the criteria, as an expression.
        nature: what the importance compares with: that of another part with the same entry; None if it compares only
            within a block.
        orders: the order in the gradients by component; empty where a factor on gradients is not defined.
        facts: figures of the fusion, for the metadata.
    """

    components: Mapping[str, Values]
    importance: Values
    source: str
    nature: str | None
    orders: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)


def score_part(
    part: str, table: Columns, alone: Mapping[str, CriterionScores], weights: Weights, measured: Columns, params: Score
) -> PartScores:
    """The importance of one part's units.

    Args:
        part: the name of the part.
        table: the index columns of all units.
        alone: the part's criteria by name, each by itself.
        weights: how much each criterion counts, where the fusion does not find that out.
        measured: the ablation table with the column `row`; empty where the fusion does not read it.
        params: how to fuse and to scale.

    Raises:
        LibpruneError: if the measured losses do not support a fusion.
    """
    rows = np.flatnonzero(table["group_type"] == part)
    if len(alone) == 1:
        return _single(rows, table, weights, alone, params)
    if params.fusion in READS_LOSSES:
        own = {name: column[measured["group_type"] == part] for name, column in measured.items()}
        return _from_losses(part, rows, table, alone, weights, own, params)
    if params.scaling == "none":
        return _in_nats(rows, alone, weights)
    return _scaled(rows, table, alone, weights, params)


def _single(
    rows: NDArray[np.int64],
    table: Columns,
    weights: Weights,
    alone: Mapping[str, CriterionScores],
    params: Score,
    facts: Mapping[str, Any] | None = None,
) -> PartScores:
    """The importance by one criterion, scaled if that is asked for."""
    ((name, one),) = alone.items()
    importance = one.importance[rows]
    if params.scaling != "none":
        importance = np.concatenate([SCALINGS[params.scaling](importance[own]) for own in _layers(rows, table)])
    components = {key: values[rows] for key, values in one.components.items()}
    nature = (one.unit if one.unit == NATS else name) if one.comparable else None
    return PartScores(components, importance, format_criteria(weights), nature, one.orders, facts or {})


def _from_losses(
    part: str,
    rows: NDArray[np.int64],
    table: Columns,
    alone: Mapping[str, CriterionScores],
    weights: Weights,
    measured: Columns,
    params: Score,
) -> PartScores:
    """The mixture of criteria, or the one criterion, that agrees best with the part's measured loss increases."""
    increases = measured["loss_increase"]
    values = {name: one.importance[measured["row"]] for name, one in alone.items()}
    if params.fusion == "best":
        best, correlations = best_criterion(values, increases, part)
        facts: dict[str, Any] = {"rank_correlations": correlations, "units": len(increases)}
        return _single(rows, table, {best: 1.0}, {best: alone[best]}, params, facts)
    fit = fit_losses(values, increases, part)
    components = {name: weight * alone[name].importance[rows] for name, weight in fit.coefficients.items()}
    importance = _sum(components)
    shares = {name: float(values.sum() / importance.sum()) for name, values in components.items()}
    facts = {"coefficients": dict(fit.coefficients), "shares": shares}
    facts |= {"r2": fit.r2, "r2_se": fit.error, "units": fit.units}
    return PartScores(components, importance, format_criteria(weights), NATS, {}, facts)


def _in_nats(rows: NDArray[np.int64], alone: Mapping[str, CriterionScores], weights: Weights) -> PartScores:
    """The weighted mean of loss increases, by component, so that a gradient fix knows the orders."""
    components: dict[str, Values] = {}
    orders: dict[str, int] = {}
    for name, one in alone.items():
        orders |= one.orders
        for key, values in one.components.items():
            components[key] = components.get(key, np.zeros(len(rows))) + weights[name] * values[rows]
    known = orders if orders.keys() == components.keys() else {}
    return PartScores(components, _sum(components), format_criteria(weights), NATS, known)


def _scaled(
    rows: NDArray[np.int64], table: Columns, alone: Mapping[str, CriterionScores], weights: Weights, params: Score
) -> PartScores:
    """The mean of the criteria on the scale of each layer, with the given weights or with those found in each layer."""
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
    return PartScores(components, _sum(components), format_criteria(weights), None, {}, facts)


def _layers(rows: NDArray[np.int64], table: Columns) -> Iterator[NDArray[np.int64]]:
    """The positions in `rows` of each layer's units, layer by layer."""
    layers = table["layer_idx"][rows]
    for layer in np.unique(layers):
        yield np.flatnonzero(layers == layer)


def _sum(components: Mapping[str, Values]) -> Values:
    total: Values = np.sum(list(components.values()), axis=0)
    return total


def adaptive_weights(importances: Sequence[Values]) -> Values:
    """How much each criterion counts in one block, ``[criteria]``: its divergence over the sum of all divergences.

    The divergence is 1 - H(p) / ln(units), with p_u the criterion's importance from 0 (the lowest unit) to 1 (the
    highest), as a share of its sum, and H the entropy of p in nats: 0 where all units are alike, 1 where one unit holds
    everything (entropy weights: Shannon 1948; Zeleny 1982; Hwang & Yoon 1981). A constant criterion counts nothing;
    where all are constant, or where there is one unit, all count alike.

    Args:
        importances: one array ``[units]`` for each criterion; neither a factor nor a constant on one matters.
    """
    divergences = np.array([_divergence(values) for values in importances])
    total = divergences.sum()
    return divergences / total if total > 0 else np.full(len(divergences), 1 / len(divergences))


def _divergence(values: Values) -> float:
    """1 - H(p) / ln(units) of one criterion in one block, 0 where it is constant."""
    spread = float(np.ptp(values))
    if spread == 0:
        return 0.0
    above = values - values.min()
    shares = above[above > 0] / above.sum()
    return float(1 + (shares * np.log(shares)).sum() / np.log(len(values)))
