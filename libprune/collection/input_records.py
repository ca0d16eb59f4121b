"""Statistics of a map's input, and of a layer's input and output: moments, Gram matrix, histogram, cosine."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from libprune.collection.records import COUNT, Field, State, Statistic, count
from libprune.pipeline.shards import BINS


@dataclass(frozen=True)
class InputMoments(Statistic):
    """Norms, mean, variance and range of every feature of an input, over tokens.

    Mean and centred squares of each batch are joined by Chan, Golub & LeVeque (1979, "Updating
    formulae and a pairwise algorithm for computing sample variances"), in float64: sums of squares
    would lose the variance of a feature whose mean is far above its deviation.
    """

    width: int

    @property
    def fields(self) -> Mapping[str, Field]:
        """Tokens, mean, centred squares, sum of |x|, smallest and largest value; ``[width]`` each."""
        features = (self.width,)
        return {
            "count": COUNT,
            "mean": Field(features),
            "centred": Field(features),
            "absolute": Field(features),
            "lowest": Field(features, torch.float32, "min"),
            "highest": Field(features, torch.float32, "max"),
        }

    def measure(self, *batch: Tensor) -> State:
        """Of an input ``[tokens, width]``, float32."""
        (x,) = batch
        mean = x.mean(0)
        return {
            "count": count(len(x)),
            "mean": mean,
            "centred": (x - mean).square_().sum(0),
            "absolute": x.abs().sum(0),
            "lowest": x.amin(0),
            "highest": x.amax(0),
        }

    def merge(self, one: State, two: State) -> None:
        """Join by the pairwise update; the other fields element by element."""
        n, m = int(one["count"]), int(two["count"])
        device = one["mean"].device
        if n + m:
            delta = two["mean"].to(device, torch.float64) - one["mean"]
            one["mean"] += delta * (m / (n + m))
            one["centred"] += two["centred"].to(device, torch.float64) + delta.square() * (n * m / (n + m))
        one["count"] += m
        one["absolute"] += two["absolute"].to(device)
        torch.minimum(one["lowest"], two["lowest"].to(device), out=one["lowest"])
        torch.maximum(one["highest"], two["highest"].to(device), out=one["highest"])

    def finish(self, state: State) -> dict[str, Tensor]:
        """l1 = sum |x|, l2 = sqrt(sum x^2), max = max |x|; mean, variance, min, max per token; float32."""
        n = state["count"]
        return {
            "input_tokens": n,
            "input_norm_l1": state["absolute"].float(),
            "input_norm_l2": (state["centred"] + n * state["mean"].square()).sqrt().float(),
            "input_norm_max": torch.maximum(state["lowest"].abs(), state["highest"].abs()),
            "input_mean": state["mean"].float(),
            "input_variance": (state["centred"] / n).float(),
            "input_min": state["lowest"],
            "input_max": state["highest"],
        }


@dataclass(frozen=True)
class Gram(Statistic):
    """E[x x^T] and E[x] per token, summed in float32 and float64, a block of rows at a time.

    Only the blocks on and above the diagonal are multiplied, and only one block of rows is ever
    held beside the sum. Products are float32, or of 16-bit inputs with float32 sums, which are
    exact products.
    """

    width: int
    dtype: torch.dtype = torch.float32
    block: int = 256

    @property
    def fields(self) -> Mapping[str, Field]:
        """Tokens, the sum of inputs ``[width]``, and the upper blocks of that of products ``[width, width]``."""
        gram = Field((self.width, self.width), torch.float32)
        return {"count": COUNT, "total": Field((self.width,)), "gram": gram}

    def measure(self, *batch: Tensor) -> State:
        """Of an input ``[tokens, width]``."""
        state = self.init()
        self.update(state, *batch)
        return state

    def update(self, state: State, *batch: Tensor) -> None:
        """Add an input ``[tokens, width]``."""
        (x,) = batch
        state["count"] += len(x)
        state["total"] += x.sum(0, dtype=torch.float32).to(state["total"].device, torch.float64)
        for start in range(0, self.width, self.block):
            rows = slice(start, start + self.block)
            state["gram"][rows, start:] += _product(x[:, rows].T, x[:, start:]).to(state["gram"].device)

    def finish(self, state: State) -> dict[str, Tensor]:
        """The whole matrix, and the mean, per token."""
        upper = state["gram"].triu()
        whole = upper + upper.triu(1).T
        return {"": (whole / state["count"]).to(self.dtype), "mean": (state["total"] / state["count"]).float()}


HELD_OUT_SEQUENCES, HELD_OUT_TOKENS = 32, 32
"""Held-out sequences whose inputs are kept, at most, and tokens of each."""


@dataclass(frozen=True)
class HeldOut(Statistic):
    """Inputs themselves, at some tokens of the first held-out sequences: a repair is judged by them.

    Each has a place of its own, so that batches and processes join exactly.
    """

    width: int

    @property
    def fields(self) -> Mapping[str, Field]:
        """Tokens, and a row for each, ``[HELD_OUT_SEQUENCES * HELD_OUT_TOKENS, width]``; 0 where there is none."""
        return {
            "count": COUNT,
            "rows": Field((HELD_OUT_SEQUENCES * HELD_OUT_TOKENS, self.width), torch.float32),
        }

    def measure(self, *batch: Tensor) -> State:
        """Of the inputs of held-out sequences ``[sequences, tokens, width]`` and their numbers among the held-out."""
        x, numbers = batch
        state = self.init()
        chosen = numbers < HELD_OUT_SEQUENCES
        tokens = min(HELD_OUT_TOKENS, x.shape[1])
        positions = torch.arange(tokens) * x.shape[1] // tokens
        places = numbers[chosen][:, None] * tokens + torch.arange(tokens)
        state["rows"][places] = x[chosen.to(x.device)][:, positions.to(x.device)].float().cpu()
        state["count"] += places.numel()
        return state

    def finish(self, state: State) -> dict[str, Tensor]:
        """The rows, and how many of them there are."""
        return {"": state["rows"], "tokens": state["count"]}


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product with float32 sums and result."""
    if a.is_cuda and a.dtype != torch.float32:
        product: Tensor = torch.mm(a, b, out_dtype=torch.float32)
        return product
    return a.float() @ b.float()


_LOWEST, _OCTAVES = -20, BINS // 4


@dataclass(frozen=True)
class Histogram(Statistic):
    """Counts of every feature's values in half octaves of |x|, by sign; entropy and frequency follow from it.

    The edges are fixed, so that histograms join exactly. Values beyond them count in the first and
    last bins; zero is in the first.
    """

    width: int

    @property
    def fields(self) -> Mapping[str, Field]:
        """Counts, ``[width, BINS]``."""
        return {"counts": Field((self.width, BINS), torch.int32)}

    def measure(self, *batch: Tensor) -> State:
        """Of an input ``[tokens, width]``."""
        (x,) = batch
        bits = x.float().contiguous().view(torch.int32)
        first = 2 * (127 + _LOWEST)  # float32: 8 bits of exponent, biased by 127, then the half octave's bit
        half_octave = ((bits & 0x7FFFFFFF) >> 22).sub_(first).clamp_(0, BINS // 2 - 1)
        index = half_octave + (bits < 0) * (BINS // 2)
        index += torch.arange(self.width, dtype=torch.int32, device=x.device) * BINS
        counts = torch.bincount(index.flatten(), minlength=self.width * BINS)
        return {"counts": counts.view(self.width, BINS)}

    def finish(self, state: State) -> dict[str, Tensor]:
        """The counts."""
        return {"": state["counts"]}


def entropy(counts: Tensor) -> Tensor:
    """Entropy of histograms in nats; ``[features, BINS] -> [features]``."""
    share = counts.double() / counts.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1)


def frequency(counts: Tensor, threshold: float) -> Tensor:
    """Share of values with |x| at least the threshold, rounded down to an edge; ``[features, BINS] -> [features]``."""
    octaves = torch.exp2(torch.arange(_LOWEST, _LOWEST + _OCTAVES).float())
    edges = torch.stack([octaves, 1.5 * octaves], 1).flatten()
    start = max(0, int((edges <= threshold).sum()) - 1)
    both = counts[:, : BINS // 2] + counts[:, BINS // 2 :]
    return both[:, start:].sum(-1).double() / both.sum(-1)


@dataclass(frozen=True)
class Cosine(Statistic):
    """Cosine between a layer's input and output, over tokens."""

    @property
    def fields(self) -> Mapping[str, Field]:
        """Tokens, sum and sum of squares."""
        return {"count": COUNT, "total": Field(()), "square": Field(())}

    def measure(self, *batch: Tensor) -> State:
        """Of an input and an output, ``[tokens, model]`` each."""
        cosines = torch.cosine_similarity(batch[0].float(), batch[1].float(), dim=-1).double()
        return {"count": count(len(cosines)), "total": cosines.sum(), "square": cosines.square().sum()}

    def finish(self, state: State) -> dict[str, Tensor]:
        """Mean and variance over tokens."""
        mean = state["total"] / state["count"]
        return {"cosine_mean": mean, "cosine_variance": (state["square"] / state["count"] - mean.square()).clamp(min=0)}
