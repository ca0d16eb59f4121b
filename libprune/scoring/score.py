"""Scoring: from the artifacts and the params to the global importance table, of one criterion or several."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from libprune.engine.architecture import Architecture
from libprune.engine.errors import ArtifactError, LibpruneError
from libprune.engine.tables import Columns
from libprune.pipeline.artifacts import read_architecture, read_table, same_origin
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Score
from libprune.scoring.criteria import CRITERIA, find_criterion, join_tables, score_units
from libprune.scoring.expression import Weights, criteria_of, format_criteria
from libprune.scoring.fusion import NATS, READS_LOSSES, CriterionScores, PartScores, score_part


def score_layout(layout: Layout, params: Score) -> tuple[Columns, dict[str, Any]]:
    """The importance table and its metadata.

    Raises:
        LibpruneError: if the criteria cannot be read, do not go together, or do not explain the measured losses.
    """
    architecture = read_architecture(layout)
    asked = criteria_of(architecture, params)
    require_scaling(asked, params)
    _require_units(architecture, asked)
    alone, table, origin = _alone(layout, asked, params)
    measured: Columns = {}
    if params.fusion in READS_LOSSES and any(len(weights) > 1 for weights in asked.values()):
        measured = _measured(layout, architecture, origin)
    scored = {
        part: score_part(part, table, {name: alone[name] for name in weights}, weights, measured, params)
        for part, weights in asked.items()
    }
    _require_one_text(layout, origin)
    return assemble(table, scored, params), origin | params.model_dump() | _nature(asked, scored, params)


def _require_units(architecture: Architecture, asked: Mapping[str, Weights]) -> None:
    """Stop where a criterion is asked of units that it is not about.

    Raises:
        LibpruneError: naming the criterion and the part.
    """
    for part, weights in asked.items():
        for name in weights:
            only = CRITERIA[name].only
            shape = architecture.parts[part]
            if only is not None and not (shape.units == only and shape.router):
                raise LibpruneError(
                    f"the criterion {name} is about {only}, and the {part} of this model has none; set score.experts: "
                    f"{name}, and score.criterion to a criterion of all units"
                )


def _require_one_text(layout: Layout, origin: Mapping[str, Any]) -> None:
    """Stop where statistics beside those that were read are of another model or text, which allocate would mix.

    Raises:
        ArtifactError: naming them.
    """
    for path in (folder / "units.parquet" for folder in (layout.gradients, layout.hessian, layout.activations)):
        if "tokens" in origin and path.exists():
            same_origin(path, read_table(path, path.parent.name)[1], {key: origin[key] for key in ("model", "tokens")})


def require_scaling(asked: Mapping[str, Weights], params: Score) -> None:
    """Stop where several criteria have no common scale, or where a fit to losses would read scaled criteria.

    Raises:
        LibpruneError: saying which setting to change.
    """
    several = [weights for weights in asked.values() if len(weights) > 1]
    for weights in several:
        units = {name: (find_criterion(name).unit, find_criterion(name).comparable) for name in weights}
        if params.fusion == "learned" and params.scaling != "none":
            raise LibpruneError(
                f"score.fusion: learned predicts nats from the criteria's own magnitudes, which score.scaling: "
                f"{params.scaling} takes away; set it to none"
            )
        alike = set(units.values()) == {(NATS, True)} and params.fusion in {"weighted", "simple"}
        if params.scaling == "none" and params.fusion not in READS_LOSSES and not alike:
            listed = ", ".join(f"{name} ({unit})" for name, (unit, _) in units.items())
            raise LibpruneError(
                f"score.fusion: {params.fusion} of {listed} adds unlike things; set score.scaling to rank, zscore or "
                "minmax (only criteria in nats can be weighted without), or score.fusion to learned"
            )


def _alone(
    layout: Layout, asked: Mapping[str, Weights], params: Score
) -> tuple[dict[str, CriterionScores], Columns, dict[str, Any]]:
    """Every criterion by itself, the index columns and costs, and the common origin.

    Args:
        asked: the criteria of every part.
    """
    alone: dict[str, CriterionScores] = {}
    origin: dict[str, Any] = {}
    index: Columns = {}
    for name in dict.fromkeys(name for weights in asked.values() for name in weights):
        criterion, own = find_criterion(name), params.model_copy(update={"criterion": name, "scaling": "none"})
        table, source = join_tables(layout, criterion, own)
        same_origin(layout.root, source, {key: origin[key] for key in origin.keys() & source.keys()})
        origin |= source
        parts = [part for part, weights in asked.items() if name in weights]
        scores = score_units(table, own, np.isin(table["group_type"], parts))
        index = {key: scores[key] for key in ("layer_idx", "group_type", "group_idx", "cost")}
        components = {key: scores[key] for key in scores if key not in {*index, "importance", "score"}}
        alone[name] = CriterionScores(
            components, scores["importance"], criterion.comparable, criterion.unit, dict(criterion.orders)
        )
    return alone, index, origin


def _measured(layout: Layout, architecture: Architecture, origin: Mapping[str, Any]) -> Columns:
    """The ablation table with a column `row`, the row of each unit in a per-unit table."""
    table, meta = read_table(layout.ablation, "ablation")
    if not len(table["layer_idx"]):
        raise ArtifactError(
            f"{layout.ablation} holds no measured unit, and score.fusion: learned and best are about them; set "
            "ablation.units (400 is a start) and run `dvc repro`"
        )
    same_origin(layout.ablation, meta, origin)
    starts, start = {}, 0
    for block in architecture.blocks():
        starts[block] = start
        start += architecture.units(block[1])
    blocks = zip(table["layer_idx"].tolist(), table["group_type"].tolist(), strict=True)
    return table | {"row": np.array([starts[block] for block in blocks]) + table["group_idx"]}


def assemble(table: Columns, scored: Mapping[str, PartScores], params: Score) -> Columns:
    """The importance table of all parts.

    Where all parts have components of the same names, each is a column of its name. Otherwise the column is
    `part.name`, with 0 for the units of the other parts.
    """
    importance = np.zeros(len(table["cost"]))
    components: Columns = {}
    for part, one in scored.items():
        rows = table["group_type"] == part
        importance[rows] = one.importance
        for name, values in one.components.items():
            components.setdefault(_named(name, part, scored), np.zeros(len(importance)))[rows] = values
    score = importance / table["cost"] if params.scaling == "none" else importance
    index = {name: table[name] for name in ("layer_idx", "group_type", "group_idx")}
    return {**index, "importance": importance, "cost": table["cost"], "score": score, **components}


def component_columns(asked: Mapping[str, Weights], params: Score) -> int:
    """How many columns of components the table of these criteria has; for the fusion `best`, the most it may have."""
    in_nats = params.fusion in {"weighted", "simple"} and params.scaling == "none"
    columns = []
    for weights in asked.values():
        own = {name: frozenset(_components(name)) for name in weights}
        if len(weights) == 1 or in_nats:
            columns.append(frozenset().union(*own.values()))
        elif params.fusion == "best":
            return len(asked) * max(map(len, own.values()))
        else:
            columns.append(frozenset(weights))
    return len(columns[0]) if len(set(columns)) == 1 else sum(map(len, columns))


def _components(name: str) -> Iterable[str]:
    """The names of a criterion's components."""
    criterion = find_criterion(name)
    return criterion.terms or criterion.orders or (name,)


def _named(component: str, part: str, scored: Mapping[str, PartScores]) -> str:
    """The column of a part's component."""
    alike = len({frozenset(one.components) for one in scored.values()}) == 1
    return component if alike else f"{part}.{component}"


def _nature(asked: Mapping[str, Weights], scored: Mapping[str, PartScores], params: Score) -> dict[str, Any]:
    """The metadata by which allocation knows how scores compare, and the report names their criteria."""
    sources = {part: one.source for part, one in scored.items()}
    alike = len(set(sources.values())) == 1
    natures = {one.nature for one in scored.values()}
    orders = {_named(name, part, scored): order for part, one in scored.items() for name, order in one.orders.items()}
    return {
        "criterion": next(iter(sources.values()))
        if alike
        else ", ".join(f"{part}: {source}" for part, source in sources.items()),
        "fusion": params.fusion if any(len(weights) > 1 for weights in asked.values()) else "none",
        "fused": {part: dict(one.facts) for part, one in scored.items() if one.facts},
        "comparable": len(natures) == 1 and None not in natures,
        "gradient_orders": orders if all(one.orders for one in scored.values()) else {},
    }


def foretold(asked: Mapping[str, Weights], params: Score) -> dict[str, Any] | None:
    """The metadata by which allocation judges scores, before there are any; None if they depend on measured losses.

    Args:
        asked: the criteria of every part, as `libprune.scoring.expression.criteria_of` gives them.
        params: how they are fused and scaled.
    """
    natures, orders, sources = set(), {}, {}
    for part, weights in asked.items():
        records, several = {name: CRITERIA[name] for name in weights}, len(weights) > 1
        if several and params.fusion == "best":
            return None
        if not several:
            ((name, record),) = records.items()
            natures.add((NATS if record.unit == NATS else name) if record.comparable else None)
        else:
            natures.add(NATS if params.fusion == "learned" or params.scaling == "none" else None)
        summed = not several or (params.fusion in {"weighted", "simple"} and params.scaling == "none")
        own = {key: order for record in records.values() for key, order in record.orders.items()}
        known = summed and own.keys() == {key for name in weights for key in _components(name)}
        orders[part] = {f"{part}.{key}": order for key, order in own.items()} if known else {}
        sources[part] = format_criteria(weights)
    return {
        "criterion": ", ".join(dict.fromkeys(sources.values())),
        "fusion": params.fusion if any(len(weights) > 1 for weights in asked.values()) else "none",
        "scaling": params.scaling,
        "comparable": len(natures) == 1 and None not in natures,
        "gradient_orders": {k: v for own in orders.values() for k, v in own.items()} if all(orders.values()) else {},
    }


def fusion_lines(meta: Mapping[str, Any]) -> Iterator[str]:
    """Lines on the result of a fusion, one for each part."""
    for part, facts in meta["fused"].items():
        if "r2" in facts:
            quality = f"R² {facts['r2']:.3f} ± {facts['r2_se']:.3f} on held-out units of {facts['units']} measured"
            yield f"{part}: {quality}; shares of the loss: {_listed(facts['shares'])}"
        elif "rank_correlations" in facts:
            quality = f"rank correlation with {facts['units']} measured loss increases"
            yield f"{part}: {quality}: {_listed(facts['rank_correlations'])}"
        else:
            yield f"{part}: weights, mean over layers: {_listed(facts['mean_weights'])}"


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
