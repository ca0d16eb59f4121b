"""What measured loss increases say of criteria: which one predicts them best, and what mixture of them does.

The ablation stage masks single units and measures the loss. A criterion, or a mixture, is only as good as its
predictions for units that it was not fitted to.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from libprune.engine.errors import LibpruneError
from libprune.engine.tables import Values
from libprune.scoring.ranks import spearman

FOLDS = 5
"""Folds of the units: the units of each are predicted by a fit to the other four fifths."""
LEAST = 10
"""Fewest measured units of a part. It is also the fewest for a fit of two criteria, which needs five units each."""
CLEAR = 2.0
"""Standard errors by which R² must exceed 0, the R² of predicting the mean of the other units. A fit to noise has an R²
above 0 by luck: one time in four with 20 units, one in eight with 60."""

_REMEDY = "raise ablation.units or ablation.sequences, or set score.fusion to weighted"


@dataclass(frozen=True)
class LossFit:
    """A mixture of criteria that predicts loss increases.

    Attributes:
        coefficients: by criterion, nats for one unit of its importance; none is negative.
        r2: 1 - squared error / squared error of the mean, each unit predicted from the units of other folds.
        error: standard error of `r2` over units.
        units: the number of measured units.
    """

    coefficients: Mapping[str, float]
    r2: float
    error: float
    units: int


def fit_losses(criteria: Mapping[str, Values], increases: Values, part: str) -> LossFit:
    """Fit the measured loss increases of one part by a non-negative mixture of criteria, and test it on held-out units.

    There is no constant term: a unit that all criteria call worthless is worth nothing.

    Args:
        criteria: the importance of the measured units, ``[measured]``, by criterion.
        increases: measured loss increases, ``[measured]``, nats.
        part: the name of the part, for messages.

    Raises:
        LibpruneError: if there are too few units, or the fit does not clearly predict held-out
            units better than their mean would, so that it explains nothing.
    """
    names = list(criteria)
    require_enough(len(increases), max(LEAST, FOLDS * len(names)), part)
    features = np.column_stack([criteria[name] for name in names])
    scale = np.abs(features).mean(axis=0)
    features = features / np.where(scale > 0, scale, 1)
    r2, error = held_out_r2(features, increases)
    if not r2 > CLEAR * error:
        raise LibpruneError(
            f"score.fusion: learned explains nothing of {part}: R² {r2:.3f} ± {error:.3f} on held-out units, of "
            f"{len(increases)} measured ones, is not clearly above 0, which predicting their mean has; {_REMEDY}, or "
            f"name one criterion for score.{part}"
        )
    coefficients = _shares(features, increases) / np.where(scale > 0, scale, 1)
    return LossFit(dict(zip(names, coefficients.tolist(), strict=True)), r2, error, len(increases))


def _shares(features: Values, target: Values) -> Values:
    """The non-negative coefficients of least squares, ``[features]``."""
    from scipy.optimize import nnls  # which takes longer to load than the stages that fit nothing

    found: Values = nnls(features, target)[0]
    return found


def held_out_r2(features: Values, target: Values) -> tuple[float, float]:
    """R² of a non-negative fit on units that it did not see, and its standard error; NaN where the target is constant.

    Args:
        features: ``[rows, features]``.
        target: ``[rows]``.
    """
    fold = np.arange(len(target)) % FOLDS  # the units are in the order of layers, so every fold sees all of them
    of_fit, of_mean = np.empty(len(target)), np.empty(len(target))
    for number in range(FOLDS):
        held, rest = fold == number, fold != number
        predicted = features[held] @ _shares(features[rest], target[rest])
        of_fit[held] = (target[held] - predicted) ** 2
        of_mean[held] = (target[held] - target[rest].mean()) ** 2
    total = float(of_mean.sum())
    if total == 0:
        return np.nan, np.nan
    r2 = 1 - float(of_fit.sum()) / total
    spread = (of_mean - of_fit - r2 * of_mean).std(ddof=1)  # of a ratio of means, to first order
    return r2, float(np.sqrt(len(target)) * spread) / total


def best_criterion(criteria: Mapping[str, Values], increases: Values, part: str) -> tuple[str, dict[str, float]]:
    """The criterion whose ranks agree best with the measured loss increases of one part, and the agreement of each.

    Agreement is Spearman's rank correlation, 0 where it is not defined.

    Args:
        criteria: the importance of the measured units, ``[measured]``, by criterion.
        increases: measured loss increases, ``[measured]``, nats.
        part: the name of the part, for messages.

    Raises:
        LibpruneError: if there are too few units, or no criterion's ranks clearly agree with the measured ones.
    """
    require_enough(len(increases), LEAST, part)
    correlations = {name: float(np.nan_to_num(spearman(values, increases))) for name, values in criteria.items()}
    best = max(correlations, key=lambda name: correlations[name])
    error = 1 / np.sqrt(len(increases) - 1)  # of Spearman's under independence
    if not correlations[best] > CLEAR * error:
        listed = ", ".join(f"{name} {value:.2f}" for name, value in correlations.items())
        raise LibpruneError(
            f"score.fusion: best finds no criterion that predicts {part}: rank correlations with {len(increases)} "
            f"measured loss increases are {listed}, ± {error:.2f}; {_REMEDY}, or name one criterion for score.{part}"
        )
    return best, correlations


def require_enough(measured: int, least: int, part: str) -> None:
    """Stop if fewer units of a part were measured than are needed.

    Raises:
        LibpruneError: saying how many there are and how many are needed.
    """
    if measured < least:
        raise LibpruneError(
            f"score.fusion compares criteria with measured losses, and the ablation stage measured {measured} "
            f"{part} units of at least {least}; raise ablation.units, which counts the units of all parts"
        )
