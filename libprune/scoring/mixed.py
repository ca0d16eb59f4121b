"""Mixed criteria: weighted sums of terms that are measured on different scales.

Every term is first made a share, 0 to 1, so that its weight is the largest difference that it can make between two
units of a block:

* a ratio (a frequency, a consistency) enters unchanged, an entropy or a rank over the largest possible;
* an amount x >= 0 (a norm, a variance) enters as x / (x + m), with m the median over the units of the block: 0 for an
  amount of 0, 1/2 for a typical unit, near 1 for a unit that is far above it.

One unit may stand out ten-thousandfold, for example a channel with massive activations. Unlike min-max, x / (x + m)
then does not press all others together. Nor does it enlarge rounding where all units are equal: then each has 1/2, or
0 if all amounts are 0. Where more than half of the amounts are 0 (m = 0), any other amount is 1. The only unit of a
block has 1/2 in each amount. A weight of 0 leaves a term out.

The medians remove the scale of a block, so that importances compare within a block only. They have no unit. The terms
are common in the field; their mixture and its weights are heuristic.
"""

from collections.abc import Mapping

import numpy as np

from libprune.engine.tables import Columns, Values, layers_and_parts, numbers
from libprune.pipeline.sections import ActivationStats, Cooperative, GradientFlow, Mixture, Score, WeightStats

_MIXTURES: dict[str, type[Mixture]] = {
    "weight_stats": WeightStats,
    "activation_stats": ActivationStats,
    "gradient_flow": GradientFlow,
    "cooperative": Cooperative,
}

TERMS = {name: tuple(f"{name}_{term}" for term in mixture.model_fields) for name, mixture in _MIXTURES.items()}
"""The names of each criterion's components."""


def weight_stats(table: Columns, params: Score) -> dict[str, Values]:
    """How large, how even and how independent the weights of a unit are; no text is needed.

    * `l2`: |w| over all weights of the unit, an amount (Li et al. 2017);
    * `variance`: of the weights about their own mean, an amount;
    * `nonzero`: share of the weights that are not exactly 0; it differs between units of sparse models only;
    * `entropy`: of the shares p_i = w_i^2 / |w|^2, over ln(number of weights): how many weights carry the unit. 1 if
      all are equally large, 0 if one carries all. Unlike the entropy of a histogram it needs neither bins nor the
      largest weight, and exp(entropy) has a meaning: the effective number of weights;
    * `effective_rank`: exp(entropy of the shares s_k / sum s) of the singular values s_k of the unit's vectors in
      the model's space, over the rank that their shape allows (Roy & Vetterli 2007). An MLP channel has three
      vectors (two without a gate), an attention group as many as its queries, keys, values and outputs together.

    A unit without any weight has 0 in all of them.
    """
    shares = {
        "l2": _relative(np.sqrt(numbers(table, "magnitude_l2")), table),
        "variance": _relative(numbers(table, "weight_variance"), table),
        "nonzero": numbers(table, "weight_nonzero"),
        "entropy": numbers(table, "weight_entropy"),
        "effective_rank": numbers(table, "weight_effective_rank"),
    }
    return _weighed("weight_stats", shares, params.weight_stats)


def activation_stats(table: Columns, params: Score) -> dict[str, Values]:
    """Statistics of the values x that a unit hands to its consumer, averaged over the unit's features there.

    * `frequency`: share of tokens with |x| of at least an eighth of the layer's root mean square (Hu et al. 2016, who
      count exact zeros, which gated and smooth activations do not have);
    * `magnitude`: mean |x|, an amount;
    * `variance`: of x over tokens, an amount (An et al. 2024);
    * `entropy`: of the histogram of x in half octaves of |x| by sign, over ln(bins) (Luo & Wu 2017); the edges are
      fixed, so that no first pass over the text is needed to choose them;
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
    """How large and how steady the gradient m_i by a unit's own mask is over the calibration sequences i.

    The sequence is the smallest independent sample. So nothing depends on how sequences were batched, and only sums
    over sequences are kept.

    * `magnitude`: mean |m_i|, an amount (Molchanov et al. 2019);
    * `stability`: mean of |m_i| / (mean + deviation of |m_i|);
    * `snr`: r / (1 + r) of r = |mean m_i| / deviation of m_i (Blundell et al. 2015, of weights);
    * `sign_consistency`: |mean sign of m_i| (Parascandolo et al. 2021).

    For pure noise over N sequences, r and the sign consistency are about sqrt(2 / (pi N)): 0.07 for 128 sequences. A
    unit without gradient has 0 in all four. A factor on all gradients of a layer changes none of them: the first is
    relative to the layer, the others are ratios. So they are of order 0 in the gradients, and
    `allocate.gradient_fix`, which would change nothing, is refused.
    """
    snr = numbers(table, "snr")
    with np.errstate(invalid="ignore"):
        bounded = snr / (1 + snr)
    shares = {
        "magnitude": _relative(numbers(table, "mask_gradient_abs"), table),
        "stability": numbers(table, "stability"),
        "snr": bounded,
        "sign_consistency": numbers(table, "sign_consistency"),
    }
    return _weighed("gradient_flow", shares, params.gradient_flow)


def cooperative(table: Columns, params: Score) -> dict[str, Values]:
    """The place of a unit in the graph of correlations between the units of its block.

    `libprune.scoring.correlation` defines the graph. `connection` (mean correlation with the others), `centrality`
    (share of the others above `score.cooperative_threshold`) and `cooperation` (mean correlation, weighted by what each
    other unit adds to the consumer's output) are amounts; `uniqueness` (1 less the largest correlation) is a ratio.

    Connection and uniqueness pull in opposite directions. A constant or dead unit has 0 in all four: a bias
    replaces it. A unit alone in its layer is unique and has no connections.
    """
    shares = {
        "connection": _relative(numbers(table, "unit_connection"), table),
        "uniqueness": numbers(table, "unit_uniqueness"),
        "centrality": _relative(numbers(table, "unit_centrality"), table),
        "cooperation": _relative(numbers(table, "unit_cooperation"), table),
    }
    return _weighed("cooperative", shares, params.cooperative)


def _weighed(criterion: str, shares: Mapping[str, Values], mixture: Mixture) -> dict[str, Values]:
    """Each share times its weight, by the name of its component; a value that is not finite stays so."""
    with np.errstate(invalid="ignore"):
        return {f"{criterion}_{name}": weight * shares[name] for name, weight in mixture.model_dump().items()}


def _relative(amounts: Values, table: Columns) -> Values:
    """X / (x + median of the block) for amounts x, 0 where x is 0; a value that is not finite stays so."""
    shares = np.zeros_like(amounts)
    for rows in layers_and_parts(table):
        own = amounts[rows]
        finite = own[np.isfinite(own)]
        total = own + (np.median(finite) if len(finite) else 0.0)
        with np.errstate(invalid="ignore"):
            shares[rows] = np.divide(own, total, out=np.zeros_like(own), where=total != 0)
    return shares
