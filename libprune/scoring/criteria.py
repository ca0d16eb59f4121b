"""Criteria: from cached per-unit sums to the importance of every unit.

A criterion is a pure function of named arrays. `CRITERIA` is the one list of them; each record says
which stages' tables it reads, whether its values compare across blocks, and its source.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.engine.architecture import Architecture, Units
from libprune.engine.errors import ArtifactError, LibpruneError, StatisticsError, nearest
from libprune.engine.tables import Columns, Values, check_rows, numbers
from libprune.pipeline.artifacts import read_architecture, read_table, same_origin
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Score
from libprune.scoring.mixed import TERMS, activation_stats, cooperative, gradient_flow, weight_stats
from libprune.scoring.scaling import scale


@dataclass(frozen=True)
class Criterion:
    """One criterion.

    Attributes:
        components: function of the joined tables and the score params, giving named per-unit
            arrays that add up to the importance.
        stages: the stages whose per-unit tables it reads, beside the weights' own.
        comparable: whether values compare across layers and parts; otherwise only within one block.
        unit: what the importance is measured in.
        source: paper of the formula.
        orders: the order in the gradients of each component that comes from gradients: 1 for |W G|, 2 for squares, 0
            for a component that a factor on a layer's gradients does not change.
        columns: reads further per-unit columns from the stages' shards; None if the tables are enough.
        terms: names of the components, where they are neither the criterion's own name nor those in `orders`.
        only: the kind of units that it is about; None for all.
    """

    components: Callable[[Columns, Score], dict[str, Values]]
    stages: tuple[str, ...]
    comparable: bool
    unit: str
    source: str
    orders: Mapping[str, int] = field(default_factory=dict)
    columns: Callable[[Layout, Architecture, Score], Columns] | None = None
    terms: tuple[str, ...] = ()
    only: Units | None = None


def _magnitude(table: Columns, params: Score) -> dict[str, Values]:
    """Sum of |W|, or of W^2, over the unit's weights."""
    return {"magnitude": numbers(table, f"magnitude_{params.magnitude_norm}")}


def _taylor(table: Columns, params: Score) -> dict[str, Values]:
    """Sum of |W G|: first order, the absolute change of the loss weight by weight."""
    return {"taylor": numbers(table, "taylor")}


def _taylor_group(table: Columns, params: Score) -> dict[str, Values]:
    """|Sum of W G|: first order of the whole unit, where single weights may cancel."""
    return {"taylor_group": np.abs(numbers(table, "taylor_signed"))}


def _hessian_trace(table: Columns, params: Score) -> dict[str, Values]:
    """|Sum of H| |W|^2 / (2 count): the unit's curvature, spread evenly over its weights.

    It is the second-order term of the loss, H W^2 / 2 of each weight, with the unit's mean H for all: nats, on the
    scale of `fisher`. The factor 1/2 changes no order of units. The sum of H is absolute, since probes may give one
    below 0.
    """
    trace, squares, count = (numbers(table, name) for name in ("hessian_trace", "magnitude_l2", "cost"))
    return {"hessian_trace": np.abs(trace) * squares / (2 * count)}


def _fisher(table: Columns, params: Score) -> dict[str, Values]:
    """Half the sum of |W^2 H|: second order, diagonal."""
    return {"fisher": numbers(table, "fisher")}


def _taylor_2nd(table: Columns, params: Score) -> dict[str, Values]:
    """Sum of |W G| + |W^2 H| / 2: first and second order together."""
    return _taylor(table, params) | _fisher(table, params)


def _wanda(table: Columns, params: Score) -> dict[str, Values]:
    """Sum of |W_ij| a_j, with a_j a norm of input feature j over the calibration tokens."""
    return {"wanda": numbers(table, f"wanda_{params.wanda_norm}")}


def _unit_fisher(table: Columns, params: Score) -> dict[str, Values]:
    """Half the Fisher information of the unit's own mask."""
    return {"unit_fisher": numbers(table, f"unit_fisher_{params.fisher_over}")}


def _fluctuation(table: Columns, params: Score) -> dict[str, Values]:
    """Sum of variance times |W_:,p|^2 over the unit's positions p at the consumer's input: what no bias gives back."""
    return {"fluctuation": numbers(table, "fluctuation")}


def _obs_columns(layout: Layout, architecture: Architecture, params: Score) -> Columns:
    """The columns `obs` and `obs_share`, from Gram matrices."""
    from libprune.scoring.gram_columns import read_gram_columns  # needs torch, which the other criteria do not

    return read_gram_columns(layout, architecture, params, in_nats=params.criterion == "obs_fisher")


def _cooperative_columns(layout: Layout, architecture: Architecture, params: Score) -> Columns:
    """The columns of the graph of correlations, from Gram matrices."""
    from libprune.scoring.gram_columns import graph_columns

    return graph_columns(layout, architecture, params)


def _obs(table: Columns, params: Score) -> dict[str, Values]:
    """The squared output error of the consumer that remains after the best refit, when the unit's turn comes."""
    return {"obs": numbers(table, "obs")}


def _obs_share(table: Columns, params: Score) -> dict[str, Values]:
    """The output error of the consumer after the best refit over that without a refit, in the dense model, 0 to 1."""
    return {"obs_share": numbers(table, "obs_share")}


def _obs_fisher(table: Columns, params: Score) -> dict[str, Values]:
    """Half the sum over outputs of the mean squared gradient times the error of `obs`: the loss that no refit undoes.

    Second order, with the Hessian of the consumer's weights as the product of its inputs' Gram matrix
    and the diagonal of its outputs' gradient covariance (a Kronecker factorisation).
    """
    return {"obs_fisher": numbers(table, "obs")}


def _fisher_obs(table: Columns, params: Score) -> dict[str, Values]:
    """`unit_fisher` times `obs_share`: the share of a unit's loss that the other units cannot take over."""
    return {"fisher_obs": _unit_fisher(table, params)["unit_fisher"] * numbers(table, "obs_share")}


def _reap(table: Columns, params: Score) -> dict[str, Values]:
    """Mean over the tokens routed to the expert of the router's weight times the norm of the expert's output."""
    return {"reap": numbers(table, "reap")}


def _routed_frequency(table: Columns, params: Score) -> dict[str, Values]:
    """Share of the calibration tokens that are routed to the expert."""
    return {"routed_frequency": numbers(table, "routed_frequency")}


def _random(table: Columns, params: Score) -> dict[str, Values]:
    """Seeded noise per parameter, the floor that every criterion must clear."""
    cost = numbers(table, "cost")
    return {"random": np.random.default_rng(params.seed).random(len(cost)) * cost}


CRITERIA = {
    "magnitude": Criterion(_magnitude, (), False, "weight", "Han et al. 2015; Li et al. 2017"),
    "taylor": Criterion(
        _taylor, ("gradients",), True, "nats", "Molchanov et al. 2019; Ma et al. 2023 (LLM-Pruner)", {"taylor": 1}
    ),
    "taylor_group": Criterion(
        _taylor_group, ("gradients",), True, "nats", "Molchanov et al. 2019; Ma et al. 2023", {"taylor_group": 1}
    ),
    "taylor_2nd": Criterion(
        _taylor_2nd, ("gradients", "hessian"), True, "nats", "Ma et al. 2023 (LLM-Pruner)", {"taylor": 1, "fisher": 2}
    ),
    "fisher": Criterion(_fisher, ("hessian",), True, "nats", "LeCun et al. 1989; Theis et al. 2018", {"fisher": 2}),
    "hessian_trace": Criterion(
        _hessian_trace,
        ("hessian",),
        True,
        "nats",
        "Yu et al. 2022, with the estimated diagonal",
        {"hessian_trace": 2},
    ),
    "wanda": Criterion(_wanda, ("activations",), False, "activation", "Sun et al. 2024 (Wanda), summed by unit"),
    "unit_fisher": Criterion(
        _unit_fisher, ("gradients",), True, "nats", "Theis et al. 2018; Kwon et al. 2022", {"unit_fisher": 2}
    ),
    "fluctuation": Criterion(_fluctuation, ("activations",), False, "activation", "An et al. 2024 (FLAP)"),
    "obs": Criterion(
        _obs,
        ("activations",),
        False,
        "activation",
        "Hassibi & Stork 1993; Kurtic et al. 2023 (ZipLM)",
        columns=_obs_columns,
    ),
    "obs_share": Criterion(
        _obs_share, ("activations",), True, "none", "Kurtic et al. 2023 (ZipLM), in proportion", columns=_obs_columns
    ),
    "obs_fisher": Criterion(
        _obs_fisher,
        ("activations", "gradients"),
        True,
        "nats",
        "Kurtic et al. 2023; Martens & Grosse 2015 (K-FAC)",
        {"obs_fisher": 2},
        _obs_columns,
    ),
    "fisher_obs": Criterion(
        _fisher_obs,
        ("gradients", "activations"),
        True,
        "nats",
        "Theis et al. 2018, with Kurtic et al. 2023",
        {"fisher_obs": 2},
        _obs_columns,
    ),
    "weight_stats": Criterion(
        weight_stats, (), False, "none", "Li et al. 2017; Roy & Vetterli 2007", terms=TERMS["weight_stats"]
    ),
    "activation_stats": Criterion(
        activation_stats,
        ("activations",),
        False,
        "none",
        "Hu et al. 2016; Luo & Wu 2017",
        terms=TERMS["activation_stats"],
    ),
    "gradient_flow": Criterion(
        gradient_flow,
        ("gradients",),
        False,
        "none",
        "Molchanov et al. 2019; Blundell et al. 2015",
        dict.fromkeys(TERMS["gradient_flow"], 0),
    ),
    "cooperative": Criterion(
        cooperative,
        ("activations",),
        False,
        "none",
        "Robert & Escoufier 1976; Freeman 1978",
        columns=_cooperative_columns,
        terms=TERMS["cooperative"],
    ),
    "reap": Criterion(_reap, ("activations",), False, "activation", "Lasby et al. 2025 (REAP)", only="experts"),
    "routed_frequency": Criterion(_routed_frequency, ("activations",), False, "none", "", only="experts"),
    "random": Criterion(_random, (), True, "none", ""),
}


def find_criterion(name: str, key: str = "criterion") -> Criterion:
    """The record of a criterion.

    Args:
        name: as in `CRITERIA`.
        key: the key of the score section that holds the name, for errors.

    Raises:
        LibpruneError: for an unknown name, with the known ones.
    """
    if name not in CRITERIA:
        raise LibpruneError(unknown_criterion(name, key))
    return CRITERIA[name]


def unknown_criterion(name: str, key: str) -> str:
    """What is said of a name that is no criterion's."""
    known = ", ".join(CRITERIA)
    return f"score.{key} = {name!r} is unknown{nearest(name, CRITERIA, count=1)} (known: {known})"


NOTHING_COLLECTED = "needs the {} stage, which collects nothing; set hessian.estimator to fisher"
"""What is said of a criterion whose statistics are switched off."""


def join_tables(layout: Layout, criterion: Criterion, params: Score) -> tuple[Columns, dict[str, Any]]:
    """The columns of all per-unit tables that a criterion reads, and their common origin.

    Raises:
        ArtifactError: if a table is missing, or was made from another model or other text.
    """
    architecture = read_architecture(layout)
    joined, meta = read_table(layout.weights, "prepare")
    same_origin(layout.weights, meta, {"model": architecture.fingerprint})
    origin = {"model": architecture.fingerprint}
    for stage in criterion.stages:
        path = layout.root / stage / "units.parquet"
        if path.parent.exists() and not path.exists():
            raise ArtifactError(f"this criterion {NOTHING_COLLECTED.format(stage)}")
        table, meta = read_table(path, stage)
        same_origin(path, meta, origin)
        check_rows(architecture, table, path)
        origin |= {"tokens": meta["tokens"]}
        joined |= table
    if criterion.columns is not None:
        from libprune.pipeline.shards import read_meta  # needs torch, which the other criteria do not

        for stage in criterion.stages:
            same_origin(layout.root / stage, read_meta(layout.root / stage, stage), origin)
        joined |= criterion.columns(layout, architecture, params)
    return joined, origin


def score_units(table: Columns, params: Score, asked: NDArray[np.bool_] | None = None) -> Columns:
    """The importance table of one criterion.

    Args:
        table: joined per-unit columns: `layer_idx`, `group_type`, `group_idx`, `cost` (parameters)
            and those that the criterion reads.
        params: criterion and scaling.
        asked: the rows that are scored by this criterion, ``[units]``; None for all. The others may have no value.

    Returns:
        The index columns, `importance`, `cost`, `score`, and the criterion's components. `score`
        is importance per parameter; a scaled importance is already relative to units of the same
        cost, and `score` is the importance itself.

    Raises:
        StatisticsError: naming the first unit whose importance is not finite.
    """
    components = find_criterion(params.criterion).components(table, params)
    importance = np.sum(list(components.values()), axis=0)
    _require_finite(importance if asked is None else np.where(asked, importance, 0.0), table, params.criterion)
    cost = numbers(table, "cost")
    if params.scaling == "none":
        score = importance / cost
    else:
        importance = score = scale(importance, table, params.scaling)
    index = {name: table[name] for name in ("layer_idx", "group_type", "group_idx")}
    return {**index, "importance": importance, "cost": table["cost"], "score": score, **components}


def _require_finite(importance: Values, table: Columns, criterion: str) -> None:
    bad = np.flatnonzero(~np.isfinite(importance))
    if len(bad):
        place = f"layer {table['layer_idx'][bad[0]]}, {table['group_type'][bad[0]]} unit {table['group_idx'][bad[0]]}"
        raise StatisticsError(f"{criterion} is not finite for {len(bad)} unit(s), the first in {place}")
