"""Fixes against vanishing gradients: one factor a layer, applied to cached sums instead of to the gradients.

Scores of the first order in the gradients grow with the factor, those of the second with its square. So no
backward pass is needed, and the result is that of gradients multiplied by the factor of their layer.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from libprune.engine.errors import LibpruneError, StatisticsError
from libprune.engine.tables import Columns
from libprune.pipeline.methods import METHODS
from libprune.statistics.gradient_health import MILD, SEVERE

Factors = NDArray[np.float64]
"""One a layer, ``[layers]``, positive."""

ADAPTIVE_BOUNDS = (0.1, 10.0)
DEPTH_SHIFT = 0.5


def normalize(tensors: Columns) -> Factors:
    """s_l = 1 / mean over the layer's tensors of |G_p|, G_p the mean gradient of parameter p.

    Raises:
        StatisticsError: naming a layer without any gradient.
    """
    means = _layer_norms(tensors)
    if not means.all():
        raise StatisticsError(
            f"layer {int(np.argmin(means))} has no gradient at all, so allocate.gradient_fix: normalize is not "
            "defined; choose another, or none"
        )
    return 1 / means


def adaptive(tensors: Columns) -> Factors:
    """s_l = t / mean over the layer's tensors of |G_p|, cut to 0.1 ... 10; t the median of |G_p| over all tensors.

    Raises:
        StatisticsError: if at least half of all tensors have no gradient.
    """
    means, median = _layer_norms(tensors), float(np.median(tensors["norm"]))
    if median == 0:
        raise StatisticsError(
            "at least half of all parameters have no gradient at all, so allocate.gradient_fix: adaptive is not "
            "defined; choose another, or none"
        )
    with np.errstate(divide="ignore"):
        return np.clip(median / means, *ADAPTIVE_BOUNDS)


def depth(layers: int, weights: str) -> Factors:
    """s_l = w_l + 0.5, w_l falling from 1 at the input towards 0 at the output.

    Args:
        layers: their number N.
        weights: `linear`: w_l = (N - l) / N; `sqrt`: its square root; `log`: ln(N - l + 1) / ln(N + 1).
    """
    left = layers - np.arange(layers, dtype=np.float64)
    return DEPTH_WEIGHTS[weights](left, layers) + DEPTH_SHIFT


DEPTH_WEIGHTS: dict[str, Callable[[NDArray[np.float64], int], NDArray[np.float64]]] = {
    "linear": lambda left, layers: left / layers,
    "sqrt": lambda left, layers: np.sqrt(left / layers),
    "log": lambda left, layers: np.log(left + 1) / np.log(layers + 1),
}


def resolve(fix: str, ratio: float) -> str:
    """The fix that `auto` means: none, adaptive or adaptive+depth, as gradients are fine, vanish mildly or severely."""
    if fix != "auto":
        return fix
    return "none" if ratio < MILD else "adaptive" if ratio < SEVERE else "adaptive+depth"


def factors_of(fix: str, tensors: Columns, layers: int, weights: str) -> Factors:
    """The factors of a fix by its name; all 1 for `none`.

    Args:
        fix: `none`, `normalize`, `adaptive`, `depth` or `adaptive+depth` (the product).
        tensors: `layer_idx` and `norm` of the mean gradient of every parameter.
        layers: number of layers.
        weights: how `depth` falls.
    """
    factors = np.ones(layers)
    for name in fix.split("+"):
        if name == "normalize":
            factors = factors * normalize(tensors)
        elif name == "adaptive":
            factors = factors * adaptive(tensors)
        elif name == "depth":
            factors = factors * depth(layers, weights)
    return factors


def require_defined(fix: str, criterion: str, orders: Mapping[str, int], scaling: str, method: str) -> None:
    """Stop where a fix would do nothing or mean nothing.

    Raises:
        LibpruneError: if the criterion does not come from gradients, or is relative to its layer's, the scores were
            scaled by layer, or the allocation is measured.
    """
    if fix == "none":
        return
    if METHODS[method].weighs and not METHODS[method].between:  # scores only order the units of each block
        raise LibpruneError(
            f"allocate.method: {method} measures what layers are worth, so allocate.gradient_fix: {fix} would do "
            "nothing; set it to none"
        )
    if scaling != "none":
        raise LibpruneError(
            f"score.scaling: {scaling} gives every layer the same scale, so allocate.gradient_fix: {fix} would do "
            "nothing; set one of the two to none"
        )
    if not orders:
        raise LibpruneError(
            f"allocate.gradient_fix: {fix} multiplies gradients, from which {criterion} does not come, or not alone; "
            "set it to none, or choose another score.criterion, such as taylor or unit_fisher"
        )
    if not any(orders.values()):
        raise LibpruneError(
            f"{criterion} compares each unit's gradient with those of its own layer, so allocate.gradient_fix: {fix} "
            "would do nothing; set it to none, or choose another score.criterion, such as taylor or unit_fisher"
        )


def rescaled(scores: Columns, orders: Mapping[str, int], factors: Factors) -> Columns:
    """The importance table that gradients multiplied by the factors of their layers would have given.

    Args:
        scores: the importance table with its components.
        orders: of the components, the order in the gradients.
        factors: ``[layers]``.
    """
    by_unit = factors[scores["layer_idx"]]
    components = {name: scores[name] * by_unit**order for name, order in orders.items()}
    importance = np.sum(list(components.values()), axis=0)
    return scores | components | {"importance": importance, "score": importance / scores["cost"]}


def _layer_norms(tensors: Columns) -> NDArray[np.float64]:
    layers = np.unique(tensors["layer_idx"])
    return np.array([tensors["norm"][tensors["layer_idx"] == layer].mean() for layer in layers])
