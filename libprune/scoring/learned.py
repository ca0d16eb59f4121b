"""What measured loss increases say of criteria: which one predicts them best, and what mixture of them does.

The ablation stage masks single units and measures the loss. A criterion, or a mixture, is only as good as what it says
of units that it was not fitted to.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from libprune.engine.errors import LibpruneError
from libprune.scoring.ranks import spearman

Values = NDArray[np.float64]

FOLDS = 5
"""Every unit is predicted by a fit to the other four fifths of the units."""
LEAST = 10
"""Measured units of a type below which nothing is concluded, and so many are needed for two criteria to fit."""
CLEAR = 2.0
"""Standard errors by which R² must exceed 0, what predicting the mean of the other units has: of noise it is above 0 by
luck one time in four with 20 units, one in eight with 60."""

_REMEDY = "raise ablation.units or ablation.sequences, or set score.fusion to weighted"


@dataclass(frozen=True)
class Fit:
    """A mixture of criteria that predicts loss increases.

    Attributes:
        coefficients: nats for one unit of each criterion, by name; none is negative.
        r2: 1 - squared error / squared error of the mean, each unit predicted from the units of other folds.
        error: standard error of that over units.
        units: how many measured units it rests on.
    """

    coefficients: Mapping[str, float]
    r2: float
    error: float
    units: int


def fit_losses(criteria: Mapping[str, Values], increases: Values, part: str) -> Fit:
    """Fit the measured loss increases of one type by a non-negative mixture of criteria, and test it on held-out units.

    There is no constant term: a unit that all criteria call worthless is worth nothing.

    Args:
        criteria: of each criterion the values of the measured units, ``[measured]``, in its own unit.
        increases: measured loss increases, ``[measured]``, nats.
        part: the type, for messages.

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
    found = nnls(features, increases)[0] / np.where(scale > 0, scale, 1)
    return Fit(dict(zip(names, found.tolist(), strict=True)), r2, error, len(increases))


def held_out_r2(features: Values, target: Values) -> tuple[float, float]:
    """R² of the fit on units that it did not see, and its standard error over units; NaN where the target is constant.

    Args:
        features: ``[rows, features]``.
        target: ``[rows]``.
    """
    fold = np.arange(len(target)) % FOLDS  # the units are in the order of layers, so every fold sees all of them
    of_fit, of_mean = np.empty(len(target)), np.empty(len(target))
    for number in range(FOLDS):
        held, rest = fold == number, fold != number
        predicted = features[held] @ nnls(features[rest], target[rest])[0]
        of_fit[held] = (target[held] - predicted) ** 2
        of_mean[held] = (target[held] - target[rest].mean()) ** 2
    total = float(of_mean.sum())
    if total == 0:
        return np.nan, np.nan
    r2 = 1 - float(of_fit.sum()) / total
    spread = (of_mean - of_fit - r2 * of_mean).std(ddof=1)  # of a ratio of means, to first order
    return r2, float(np.sqrt(len(target)) * spread) / total


def best_criterion(criteria: Mapping[str, Values], increases: Values, part: str) -> tuple[str, dict[str, float]]:
    """The criterion whose ranks agree best with the measured loss increases of one type, and Spearman's of all.

    Args:
        criteria: of each criterion the values of the measured units, ``[measured]``.
        increases: measured loss increases, ``[measured]``, nats.
        part: the type, for messages.

    Raises:
        LibpruneError: if there are too few units, or no criterion's ranks clearly agree with the measured ones.
    """
    require_enough(len(increases), LEAST, part)
    found = {name: float(np.nan_to_num(spearman(values, increases))) for name, values in criteria.items()}
    best = max(found, key=lambda name: found[name])
    error = 1 / np.sqrt(len(increases) - 1)  # of Spearman's under independence
    if not found[best] > CLEAR * error:
        told = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
        raise LibpruneError(
            f"score.fusion: best finds no criterion that predicts {part}: rank correlations with {len(increases)} "
            f"measured loss increases are {told}, ± {error:.2f}; {_REMEDY}, or name one criterion for score.{part}"
        )
    return best, found


def require_enough(measured: int, least: int, part: str) -> None:
    """Stop unless so many units of a type were measured.

    Raises:
        LibpruneError: saying how many there are and are needed.
    """
    if measured < least:
        raise LibpruneError(
            f"score.fusion compares criteria with measured losses, and the ablation stage measured {measured} "
            f"{part} units of at least {least}; raise ablation.units, which counts the units of all types"
        )
