"""Expressions of criteria, such as `0.7*taylor + 0.3*wanda`: reading and writing them."""

import re
from collections.abc import Mapping

from libprune.engine.architecture import Architecture
from libprune.engine.errors import LibpruneError
from libprune.pipeline.sections import Score
from libprune.scoring.criteria import find_criterion

Weights = Mapping[str, float]
"""Criteria by name, and how much each counts; they sum to 1."""

_TERM = re.compile(r"(?:(?P<weight>\d*\.?\d+|\d+\.)\s*\*\s*)?(?P<name>[a-z_]\w*)")


def parse_criteria(text: str, fusion: str, key: str = "criterion") -> Weights:
    """The criteria that an expression such as `0.7*taylor + 0.3*wanda` names, with weights that sum to 1.

    Args:
        text: names joined by `+`; each may have a weight before it, which is 1 otherwise.
        fusion: the name of a fusion; only `weighted` reads weights.
        key: the key of the score section that holds the expression, for errors.

    Raises:
        LibpruneError: if the text is no such expression, names an unknown criterion or one twice, has no positive
            weight, or has weights that the fusion would ignore.
    """
    weights: dict[str, float] = {}
    where = f"score.{key} = {text!r}"
    for term in text.split("+"):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise LibpruneError(
                f"{term.strip()!r} in {where} is no criterion; write one name, or several as "
                "'taylor + wanda' or '0.7*taylor + 0.3*wanda'"
            )
        find_criterion(match["name"], key)
        if match["name"] in weights:
            raise LibpruneError(f"{where} names {match['name']} twice; give it one weight")
        if match["weight"] and fusion != "weighted":
            raise LibpruneError(
                f"{where} has weights, which score.fusion: {fusion} does not read; leave them out, "
                "or set score.fusion to weighted"
            )
        weights[match["name"]] = float(match["weight"] or 1)
    total = sum(weights.values())
    if total == 0:
        raise LibpruneError(f"all weights of {where} are 0; give one criterion a weight")
    return {name: weight / total for name, weight in weights.items()}


def named_criteria(params: Score) -> list[str]:
    """The names of all criteria in the params, each once.

    Raises:
        LibpruneError: if an expression cannot be read.
    """
    asked = (parse_criteria(text, params.fusion, key) for key, text in params.expressions.items())
    return list(dict.fromkeys(name for weights in asked for name in weights))


def format_criteria(weights: Weights) -> str:
    """An expression that `parse_criteria` reads, without weights where all are alike."""
    alike = len(set(weights.values())) == 1
    return " + ".join(name if alike else f"{weight:g}*{name}" for name, weight in weights.items())


def criteria_of(architecture: Architecture, params: Score) -> dict[str, Weights]:
    """The criteria of every part with their weights.

    Raises:
        LibpruneError: if an expression cannot be read.
    """
    asked = {"criterion": params.criterion} | params.expressions
    keys = {part: part if part in asked else "criterion" for part in architecture.parts}
    return {part: parse_criteria(asked[key], params.fusion, key) for part, key in keys.items()}
