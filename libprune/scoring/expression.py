"""Expressions of criteria, such as `0.7*taylor + 0.3*wanda`: reading and writing them."""

import math
import re
from collections.abc import Iterator, Mapping

from libprune.engine.architecture import Architecture, Units
from libprune.engine.errors import LibpruneError, nearest
from libprune.pipeline.sections import Score
from libprune.scoring.criteria import CRITERIA, unknown_criterion

Weights = Mapping[str, float]
"""Criteria by name, and how much each counts; they sum to 1."""

_TERM = re.compile(r"(?:(?P<weight>[0-9]*\.?[0-9]+|[0-9]+\.)\s*\*\s*)?(?P<name>[a-z_]\w*)")
_SHOWN = 100
_WORD = re.compile(r"[^\W\d]\w*")


def expression_faults(text: str, fusion: str, key: str = "criterion") -> Iterator[str]:
    """What is wrong with an expression of criteria; nothing if `parse_criteria` reads it. Arguments are as there."""
    where = f"score.{key} = {text[:_SHOWN]!r}"
    total, seen = 0.0, set()
    for term in text.split("+"):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            near = next(
                (near for word in _WORD.findall(term) if (near := nearest(word.lower(), CRITERIA, count=1))), ""
            )
            yield (
                f"{term.strip()[:_SHOWN]!r} in {where} is no criterion{near}; write one name, or several "
                "as 'taylor + wanda' or '0.7*taylor + 0.3*wanda'"
            )
            continue
        if match["name"] not in CRITERIA:
            yield unknown_criterion(match["name"], key)
        elif match["name"] in seen:
            yield f"{where} names {match['name']} twice; give it one weight"
        if match["weight"] and fusion != "weighted":
            yield (
                f"{where} has weights, which score.fusion: {fusion} does not read; leave them out, "
                "or set score.fusion to weighted"
            )
        seen.add(match["name"])
        total += float(match["weight"] or 1)
    if seen and total == 0:
        yield f"all weights of {where} are 0; give one criterion a weight"
    if math.isinf(total):
        yield f"a weight of {where} is too large to be a number; only their proportions count"


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
    if found := list(dict.fromkeys(expression_faults(text, fusion, key))):
        raise LibpruneError("; ".join(found))
    terms = [_TERM.fullmatch(term.strip()) for term in text.split("+")]
    weights = {match["name"]: float(match["weight"] or 1) for match in terms if match}
    total = sum(weights.values())
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
    routed = {part: shape.units != "experts" or shape.router != "" for part, shape in architecture.parts.items()}
    parts = {part: KEYS[shape.units] if routed[part] else "mlp" for part, shape in architecture.parts.items()}
    return {part: parse_criteria(text, params.fusion, key) for part, (key, text) in asked_of(parts, params)}


KEYS: Mapping[Units, str] = {"groups": "attention", "heads": "attention", "channels": "mlp", "experts": "experts"}
"""The key of the score section that names the criteria of parts with such units, where it is not null. Shared experts,
which all tokens go through, are scored as an MLP."""


def asked_of(parts: Mapping[str, str], params: Score) -> Iterator[tuple[str, tuple[str, str]]]:
    """The key and the expression that each part is scored by, given the key of its units in `KEYS`."""
    asked = {"criterion": params.criterion} | params.expressions
    for part, own in parts.items():
        key = own if own in asked else "criterion"
        yield part, (key, asked[key])
