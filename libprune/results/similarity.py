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
    number = len(dense)
    left_out = [_correlation(first, second, np.delete(np.arange(number), window)) for window in range(number)]
    error = float(np.sqrt((number - 1) * np.var(left_out)))
    return Estimate(_correlation(first, second, np.arange(number)), error)


def _ranks(similarities: Float[np.ndarray, "windows windows"]) -> Float[np.ndarray, "windows windows"]:
    """The rank of each pair's similarity among all pairs, above the diagonal."""
    pairs = np.triu_indices(len(similarities), 1)
    ranks = np.zeros_like(similarities)
    ranks[pairs] = rankdata(similarities[pairs])
    return ranks


def _correlation(
    first: Float[np.ndarray, "windows windows"], second: Float[np.ndarray, "windows windows"], chosen: np.ndarray
) -> float:
    """Pearson's correlation of two tables over the pairs of chosen windows; 0 where one of them is constant."""
    pairs = np.triu_indices(len(chosen), 1)
    values = [table[np.ix_(chosen, chosen)][pairs] for table in (first, second)]
    spread = [one - one.mean() for one in values]
    norm = float(np.sqrt((spread[0] ** 2).sum() * (spread[1] ** 2).sum()))
    return float((spread[0] * spread[1]).sum()) / norm if norm else 0.0


def similarity(dense: Embeddings, other: Embeddings) -> dict[str, float]:
    """The figures of a changed model beside the dense one, each with its standard error."""
    cosine, correlation = mean_cosine(dense, other), rank_correlation(dense, other)
    return {
        "cosine": cosine.value,
        "cosine_se": cosine.error,
        "rank_correlation": correlation.value,
        "rank_correlation_se": correlation.error,
    }
