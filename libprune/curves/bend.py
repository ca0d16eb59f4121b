"""Where a curve of loss against size bends: the point farthest below the chord, if that is more than noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEEPER = 2.0
"""How many times as steep the curve must be behind a bend as before it; a convention, not measured."""
NOISE = 2.0
"""Standard errors that the distance to the chord must exceed."""


@dataclass(frozen=True)
class Bend:
    """A point up to which removing costs little, and beyond which it costs much.

    Attributes:
        place: the number of the point.
        before: mean loss for each unit of removed size, from the first point to this one.
        after: the same from this point to the last.
        distance: how far the loss lies below the chord from the first to the last point.
        error: one standard error of this distance; 0 where the losses have none.
    """

    place: int
    before: float
    after: float
    distance: float
    error: float


def find_bend(removed: Sequence[float], losses: Sequence[float], errors: Sequence[float] | None = None) -> Bend | None:
    """The bend of a curve, or None if there is no clear one.

    The bend is the point of largest vertical distance below the straight line from the first to the last point. That is
    the knee of Satopää et al. 2011 (Finding a "Kneedle" in a Haystack) on the whole curve, without smoothing: bringing
    both axes to 0 to 1 first, as they do, changes no order of these distances. It counts as clear if

    - the distance d_i = y_0 + w (y_n - y_0) - y_i, w = (x_i - x_0) / (x_n - x_0), exceeds two of its standard errors
      √((1 - w)² e_0² + w² e_n² + e_i²), as if the errors were independent (on the same text they are correlated
      positively, so that the true error is smaller as a rule), and
    - the curve is at least twice as steep behind it as before it.

    The place depends on where the curve ends: every curve that rises faster and faster has a point farthest below its
    chord. Points that remove no more than the first, or as much as the last, are no bend.

    Args:
        removed: the removed size of each point, never falling.
        losses: the loss of each.
        errors: one standard error of each loss; None where the losses have none.
    """
    last = len(removed) - 1
    errors = [0.0] * len(removed) if errors is None else errors
    found: Bend | None = None
    between = (place for place in range(1, last) if removed[0] < removed[place] < removed[last])
    for place in between:
        weight = (removed[place] - removed[0]) / (removed[last] - removed[0])
        distance = losses[0] + weight * (losses[last] - losses[0]) - losses[place]
        if found is None or distance > found.distance:
            error = math.hypot((1 - weight) * errors[0], weight * errors[last], errors[place])
            before, after = _slope(removed, losses, 0, place), _slope(removed, losses, place, last)
            found = Bend(place, before, after, distance, error)
    if found is None or found.distance <= NOISE * found.error:
        return None
    return found if found.after > 0 and found.after >= STEEPER * found.before else None


def _slope(removed: Sequence[float], losses: Sequence[float], start: int, end: int) -> float:
    return (losses[end] - losses[start]) / (removed[end] - removed[start])
