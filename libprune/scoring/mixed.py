"""Mixed criteria: weighted sums of parts that are measured on different scales.

Every part is first made a share, 0 to 1, so that its weight is the most by which it can set two units
of a layer and type apart:

* a ratio (a frequency, a consistency) enters as it is, an entropy or a rank over the largest possible;
* an amount x >= 0 (a norm, a variance) enters as x / (x + m), m the median over the units of its layer and
  type: 0 of nothing, 1/2 of a typical unit, towards 1 of one that is far above it.

Unlike min-max, x / (x + m) does not press all others together where one unit stands out ten-thousandfold, as
channels with massive activations do, and it does not blow rounding up where all units are equal: then each has
1/2, or 0 if there is nothing. Where more than half of the units have nothing (m = 0), any amount is 1. A unit
alone in its layer and type has 1/2 in each amount. A weight of 0 leaves a part out.

The medians take the level of a layer out, so that importances compare within a layer and type only. They have
no unit. The parts are of the field's common stock; their mixture and its weights are heuristic.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from libprune.engine.tables import Columns, layers_and_parts, numbers
from libprune.pipeline.sections import ActivationStats, Cooperative, GradientFlow, Mixture, Score, WeightStats

Values = NDArray[np.float64]


_MIXTURES: dict[str, type[Mixture]] = {
    "weight_stats": WeightStats,
    "activation_stats": ActivationStats,
    "gradient_flow": GradientFlow,
    "cooperative": Cooperative,
}

TERMS = {name: tuple(f"{name}_{part}" for part in mixture.model_fields) for name, mixture in _MIXTURES.items()}
"""The names of each criterion's components."""


def weight_stats(table: Columns, params: Score) -> dict[str, Values]:
    """What the weights of a unit look like; no text is needed.

    * `l2`: |w| over all weights of the unit, an amount (Li et al. 2017);
    * `variance`: of the weights about their own mean, an amount;
    * `nonzero`: share of the weights that are not exactly 0; tells units apart in sparse models only;
    * `entropy`: of the shares p_i = w_i^2 / |w|^2, over ln(number of weights): how many weights carry the unit. 1 if
      all are equally large, 0 if one carries all. Chosen over the entropy of a histogram since it needs no bins, no
      reference to the largest weight, and exp(entropy) has a meaning: the effective number of weights;
    * `effective_rank`: exp(entropy of the shares s_k / sum s) of the singular values s_k of the unit's vectors in
      the model's space, over the rank that their shape allows (Roy & Vetterli 2007). An MLP channel has three
      vectors (two without a gate), an attention group as many as its queries, keys, values and outputs together.

    A unit without any weight has 0 in all of them.
    """
    parts = {
        "l2": _relative(np.sqrt(numbers(table, "magnitude_l2")), table),
        "variance": _relative(numbers(table, "weight_variance"), table),
        "nonzero": numbers(table, "weight_nonzero"),
        "entropy": numbers(table, "weight_entropy"),
        "effective_rank": numbers(table, "weight_effective_rank"),
    }
    return _weighed("weight_stats", parts, params.weight_stats)


def activation_stats(table: Columns, params: Score) -> dict[str, Values]:
    """What a unit hands to its consumer, averaged over the unit's features there.

    * `frequency`: share of tokens with |x| of at least an eighth of the layer's root mean square (Hu et al. 2016, who
      count exact zeros, which gated and smooth activations do not have);
    * `magnitude`: mean |x|, an amount;
    * `variance`: of x over tokens, an amount (An et al. 2024);
    * `entropy`: of the histogram of x in half octaves of |x| by sign, over ln(bins) (Luo & Wu 2017); the edges are
      fixed, so that no first pass must find the scale;
    * `range`: largest less smallest x, an amount.

    A constant input has no variance, entropy and range; one that is always 0 has no magnitude either, and no
    frequency unless the layer is silent as a whole.
    """
    from libprune.pipeline.shards import BINS

    amounts = {
        name: _relative(numbers(table, f"activation_{name}"), table) for name in ("magnitude", "variance", "range")
    }
    ratios = {
        "frequency": numbers(table, "activation_frequency"),
        "entropy": numbers(table, "activation_entropy") / np.log(BINS),
    }
    return _weighed("activation_stats", amounts | ratios, params.activation_stats)


def gradient_flow(table: Columns, params: Score) -> dict[str, Values]:
    """How much the gradient m_i by a unit's own mask says in each calibration sequence i, and how steadily.

    A sequence is the batch here: the smallest independent sample, so that nothing depends on how sequences were
    batched, and sums over sequences are all that is kept.

    * `magnitude`: mean |m_i|, an amount (Molchanov et al. 2019);
    * `stability`: mean of |m_i| / (mean + deviation of |m_i|);
    * `snr`: r / (1 + r) of r = |mean m_i| / deviation of m_i (Blundell et al. 2015, of weights);
    * `sign_consistency`: |mean sign of m_i| (Parascandolo et al. 2021).

    Of N sequences pure noise has an snr r and a sign consistency of about sqrt(2 / (pi N)), 0.07 of 128. A unit
    without gradient has 0 in all four. A factor on all gradients of a layer changes none of them: the first is
    relative to the layer, the others are ratios. So they are of order 0 in the gradients, and
    `allocate.gradient_fix`, which could do nothing, is refused.
    """
    snr = numbers(table, "snr")
    with np.errstate(invalid="ignore"):
        bounded = snr / (1 + snr)
    parts = {
        "magnitude": _relative(numbers(table, "mask_gradient_abs"), table),
        "stability": numbers(table, "stability"),
        "snr": bounded,
        "sign_consistency": numbers(table, "sign_consistency"),
    }
    return _weighed("gradient_flow", parts, params.gradient_flow)


def cooperative(table: Columns, params: Score) -> dict[str, Values]:
    """The place of a unit in the graph of correlations between the units of its layer and type.

    `libprune.scoring.correlation` defines the graph. `connection` (mean correlation with the others), `centrality`
    (share of the others above `score.cooperative_threshold`) and `cooperation` (mean correlation, weighted by what each
    other unit adds to the consumer's output) are amounts; `uniqueness` (1 less the largest correlation) is a ratio.

    Connection and uniqueness pull in opposite directions. A constant or dead unit has 0 in all four: a bias
    replaces it. A unit alone in its layer is unique and has no connections.
    """
    parts = {
        "connection": _relative(numbers(table, "unit_connection"), table),
        "uniqueness": numbers(table, "unit_uniqueness"),
        "centrality": _relative(numbers(table, "unit_centrality"), table),
        "cooperation": _relative(numbers(table, "unit_cooperation"), table),
    }
    return _weighed("cooperative", parts, params.cooperative)


def _weighed(criterion: str, parts: Mapping[str, Values], mixture: Mixture) -> dict[str, Values]:
    """Each share times its weight, under its component's name; what is not finite stays so."""
    with np.errstate(invalid="ignore"):
        return {f"{criterion}_{name}": weight * parts[name] for name, weight in mixture.model_dump().items()}


def _relative(amounts: Values, table: Columns) -> Values:
    """Amounts x as x / (x + median of the layer and type), 0 of 0; what is not finite stays so."""
    shares = np.zeros_like(amounts)
    for rows in layers_and_parts(table):
        own = amounts[rows]
        finite = own[np.isfinite(own)]
        total = own + (np.median(finite) if len(finite) else 0.0)
        with np.errstate(invalid="ignore"):
            shares[rows] = np.divide(own, total, out=np.zeros_like(own), where=total != 0)
    return shares
