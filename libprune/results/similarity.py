"""How near the embeddings of a changed model are to the dense model's: cosines, and the order of similarities."""

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from transformers import PreTrainedModel

from libprune.models.compute import passes_with_bar
from libprune.models.embeddings import embed
from libprune.models.sequences import Sequences
from libprune.pipeline.terminal import Bar
from libprune.results.perplexity import Estimate, estimate_mean

Embeddings = Float[np.ndarray, "windows width"]
"""Embeddings of evaluation windows, each of length 1."""


def window_embeddings(model: PreTrainedModel, windows: Sequences, batch_tokens: int, label: str | Bar) -> Embeddings:
    """The embedding of each evaluation window, in float64."""
    device = next(model.parameters()).device
    with torch.no_grad():
        found = [embed(model, batch).double().cpu() for batch in passes_with_bar(windows, batch_tokens, device, label)]
    return torch.cat(found).numpy()


def mean_cosine(dense: Embeddings, other: Embeddings) -> Estimate:
    """The mean cosine of the embeddings of the same windows, and its standard error over them."""
    return estimate_mean((dense * other).sum(1))


def rank_correlation(dense: Embeddings, other: Embeddings) -> Estimate:
    """Spearman's correlation, over all pairs of windows, of the similarities that two models give to a pair.

    The similarity of a pair is the cosine of its embeddings. Pairs share windows, so that the standard error is that of
    the jackknife over windows, with the ranks of all pairs (Efron and Stein 1981, The jackknife estimate of variance).
    """
    first, second = (_ranks(one @ one.T) for one in (dense, other))
    number, pairs = len(dense), len(dense) * (len(dense) - 1) // 2
    products = np.stack([first, second, first**2, second**2, first * second])
    of_window = products.sum(2)
    every = of_window.sum(1, keepdims=True) / 2
    left_out = _correlation(every - of_window, pairs - (number - 1))
    error = float(np.sqrt((number - 1) * np.var(left_out)))
    return Estimate(float(_correlation(every, pairs)[0]), error)


def _ranks(similarities: Float[np.ndarray, "windows windows"]) -> Float[np.ndarray, "windows windows"]:
    """The rank of each pair's similarity among all pairs, less the mean rank; symmetric, and 0 on the diagonal."""
    pairs = np.triu_indices(len(similarities), 1)
    ranks = np.zeros_like(similarities)
    ranks[pairs] = rankdata(similarities[pairs]) - (len(pairs[0]) + 1) / 2
    return ranks + ranks.T


def _correlation(sums: Float[np.ndarray, "5 cases"], pairs: int) -> Float[np.ndarray, " cases"]:
    """Pearson's correlation over so many pairs, by the sums of x, y, x^2, y^2 and x y; 0 where one is constant.

    Ranks are multiples of 1/2, so that sums over the pairs of up to 512 windows are exact.
    """
    x, y, xx, yy, xy = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = (xx - x**2 / pairs) * (yy - y**2 / pairs)
        return np.where(spread > 0, (xy - x * y / pairs) / np.sqrt(spread), 0.0)


def similarity(dense: Embeddings, other: Embeddings) -> dict[str, float]:
    """The figures of a changed model beside the dense one, each with its standard error."""
    cosine, correlation = mean_cosine(dense, other), rank_correlation(dense, other)
    return {
        "cosine": cosine.value,
        "cosine_se": cosine.error,
        "rank_correlation": correlation.value,
        "rank_correlation_se": correlation.error,
    }
