"""Fusion: one importance from several criteria, each first put on one scale in every layer and type.

`simple` and `weighted` are means with the same weights everywhere; `adaptive` finds weights for every layer and
type. What is learned from measured losses instead lies in `libprune.scoring.learned`.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from libprune.engine.errors import LibpruneError
from libprune.pipeline.sections import Score
from libprune.scoring.criteria import find_criterion

Values = NDArray[np.float64]
Weights = Mapping[str, float]
"""Criteria by name, and how much each counts; they sum to 1."""

_TERM = re.compile(r"(?:(?P<weight>\d*\.?\d+|\d+\.)\s*\*\s*)?(?P<name>[a-z_]\w*)")


def parse_criteria(text: str, fusion: str, key: str = "criterion") -> Weights:
    """The criteria that an expression such as `0.7*taylor + 0.3*wanda` names, with weights that sum to 1.

    Args:
        text: names joined by `+`, each with a weight before it or none, which counts as 1.
        fusion: as in `score.fusion`; only `weighted` reads weights.
        key: where in the score section it stands, for errors.

    Raises:
        LibpruneError: if it is no such expression, names an unknown criterion or one twice, has no positive weight,
            or has weights that the fusion would ignore.
    """
    found: dict[str, float] = {}
    where = f"score.{key} = {text!r}"
    for term in text.split("+"):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise LibpruneError(
                f"{term.strip()!r} in {where} is no criterion; write one name, or several as "
                "'taylor + wanda' or '0.7*taylor + 0.3*wanda'"
            )
        find_criterion(match["name"], key)
        if match["name"] in found:
            raise LibpruneError(f"{where} names {match['name']} twice; give it one weight")
        if match["weight"] and fusion != "weighted":
            raise LibpruneError(
                f"{where} has weights, which score.fusion: {fusion} does not read; leave them out, "
                "or set score.fusion to weighted"
            )
        found[match["name"]] = float(match["weight"] or 1)
    total = sum(found.values())
    if total == 0:
        raise LibpruneError(f"all weights of {where} are 0; give one criterion a weight")
    return {name: weight / total for name, weight in found.items()}


def named_criteria(params: Score) -> list[str]:
    """The criteria that the params name, each once.

    Raises:
        LibpruneError: if an expression cannot be read.
    """
    asked = (parse_criteria(text, params.fusion, key) for key, text in params.expressions.items())
    return list(dict.fromkeys(name for weights in asked for name in weights))


def expression(weights: Weights) -> str:
    """The criteria as `parse_criteria` reads them; without weights where all are alike."""
    alike = len(set(weights.values())) == 1
    return " + ".join(name if alike else f"{weight:g}*{name}" for name, weight in weights.items())


def adaptive_weights(importances: Sequence[Values]) -> Values:
    """How much each criterion counts in one layer and type, ``[criteria]``: its divergence over the sum of all.

    The divergence is 1 - H(p) / ln(units), with p_u the criterion's importance from 0 (the lowest unit) to 1 (the
    highest), as a share of its sum, and H the entropy of p in nats: 0 where all units are alike, 1 where one holds
    everything (entropy weights: Shannon 1948; Zeleny 1982; Hwang & Yoon 1981). A criterion that is constant counts
    nothing; where all are, or where there is one unit, all count alike.

    Args:
        importances: of each criterion, ``[units]``; their units do not matter.
    """
    divergences = np.array([_divergence(values) for values in importances])
    total = divergences.sum()
    return divergences / total if total > 0 else np.full(len(divergences), 1 / len(divergences))


def _divergence(values: Values) -> float:
    spread = float(np.ptp(values))
    if spread == 0:
        return 0.0
    above = values - values.min()
    shares = above[above > 0] / above.sum()
    return float(1 + (shares * np.log(shares)).sum() / np.log(len(values)))
