"""The statistics: small frozen records that say how a sum starts, grows, joins another, and what is stored of it.

A state is a dict of tensors, one for each field. `merge` is associative, so that one pass, two joined halves, and any
batch size give the same result up to rounding. Everything that the collecting stages keep between batches is made of
these records: first those of losses and gradients, then those of the inputs of maps and layers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from libprune.pipeline.shards import BINS

Device = torch.device | str
State = dict[str, Tensor]
"""The tensors of a statistic while it grows, by the names of its fields."""


@dataclass(frozen=True)
class Field:
    """One tensor of a state; `join` says how two of them become one, element by element.

    A field of the host lies there wherever the others do: its numbers are known without asking a GPU.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    join: Literal["sum", "min", "max"] = "sum"
    host: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def start(self) -> float:
        """The value that changes nothing when joined."""
        return {"sum": 0.0, "min": float("inf"), "max": float("-inf")}[self.join]


COUNT = Field((), torch.int64, host=True)
"""The field that counts tokens, sequences or samples."""


class Statistic(ABC):
    """A quantity collected over calibration text; subclasses are frozen records of its sizes."""

    @property
    @abstractmethod
    def fields(self) -> Mapping[str, Field]:
        """The tensors of a state, by name."""

    @abstractmethod
    def measure(self, *batch: Tensor) -> State:
        """The state of one batch alone."""

    @abstractmethod
    def finish(self, state: State) -> dict[str, Tensor]:
        """The tensors that are stored, by name; "" stands for the statistic itself. It also works on meta tensors."""

    def init(self, device: Device = "cpu") -> State:
        """The state of no batch, on a device."""
        places = {False: device, True: device if device == "meta" else "cpu"}
        return {
            name: torch.full(f.shape, f.start, dtype=f.dtype, device=places[f.host]) for name, f in self.fields.items()
        }

    def update(self, state: State, *batch: Tensor) -> None:
        """Join a batch to a state, in place."""
        self.merge(state, self.measure(*batch))

    def merge(self, one: State, two: State) -> None:
        """Join the second state to the first, in place."""
        for name, field in self.fields.items():
            other = two[name].to(one[name].device, field.dtype)
            if field.join == "sum":
                one[name].add_(other)
            else:
                extreme = torch.minimum if field.join == "min" else torch.maximum
                extreme(one[name], other, out=one[name])


def count(number: int) -> Tensor:
    """A number of tokens or sequences as a tensor of a state, int64 without dimensions."""
    return torch.tensor(number, dtype=torch.int64)


@dataclass(frozen=True)
class MaskGradient(Statistic):
    """The gradient of every unit's own mask, per sequence and per token.

    With L_i the mean-token loss of sequence i in nats over its n_tok counted tokens, s_t(u) = sum
    over the positions p of unit u of x_p dL_i/dx_p at token t of the consumer's input is what token
    t adds to the gradient of L_i by the mask of u, m_i(u) = sum_t s_t(u).
    """

    units: int
    n_tok: int

    @property
    def fields(self) -> Mapping[str, Field]:
        """Sequences, tokens, and sums over them; ``[units]`` each."""
        names = ("signed", "absolute", "sign", "square", "square_token")
        return {"sequences": COUNT, "tokens": COUNT} | {name: Field((self.units,)) for name in names}

    def measure(self, *batch: Tensor) -> State:
        """The state of s, ``[sequences, tokens, units]``."""
        (s,) = batch  # in float32: what is summed here is one batch
        mask = s.sum(1).double()
        return {
            "sequences": count(s.shape[0]),
            "tokens": count(s.shape[0] * s.shape[1]),
            "signed": mask.sum(0),
            "absolute": mask.abs().sum(0),
            "sign": mask.sign().sum(0),
            "square": mask.square().sum(0),
            "square_token": s.square().flatten(0, 1).sum(0).double() * self.n_tok**2,
        }

    def finish(self, state: State) -> dict[str, Tensor]:
        """Means over sequences and tokens, and quantities that follow from them; ``[units]`` each, float64.

        `mask_gradient`, `_abs`, `_square`: means of m_i, |m_i| and m_i^2; `mask_gradient_square_token`:
        E_t[(n_tok s_t)^2]; `sign_consistency` = |mean of sign m_i|, 0 to 1; `stability` =
        1 / (1 + deviation of |m_i| / mean of |m_i|), 0 to 1; `snr` = |mean of m_i| / deviation of
        m_i. `unit_fisher_sequence` = n_tok/2 E_i[m_i^2] and `unit_fisher_token` = E_t[(n_tok s_t)^2]/2
        are the second order of the loss along the mask (Optimal Brain Damage, LeCun et al. 1989,
        with the Fisher information in place of the Hessian); they agree where the tokens of a
        sequence are independent.
        """
        n = state["sequences"]
        mean, size, square = state["signed"] / n, state["absolute"] / n, state["square"] / n
        token = state["square_token"] / state["tokens"]
        tiny = torch.finfo(torch.float64).tiny
        return {
            "mask_gradient": mean,
            "mask_gradient_abs": size,
            "mask_gradient_square": square,
            "mask_gradient_square_token": token,
            "sign_consistency": (state["sign"] / n).abs(),
            "stability": size / (size + (square - size.square()).clamp(min=0).sqrt()).clamp(min=tiny),
            "snr": mean.abs() / (square - mean.square()).clamp(min=0).sqrt().clamp(min=tiny),
            "unit_fisher_sequence": 0.5 * self.n_tok * square,
            "unit_fisher_token": 0.5 * token,
        }


@dataclass(frozen=True)
class Sum(Statistic):
    """A sum over calibration sequences of a tensor of one shape; stored as the mean, times a factor."""

    shape: tuple[int, ...]
    factor: float = 1.0
    dtype: torch.dtype = torch.float32
    sums: torch.dtype = torch.float32

    @property
    def fields(self) -> Mapping[str, Field]:
        """Sequences and the sum."""
        return {"count": COUNT, "total": Field(self.shape, self.sums)}

    def measure(self, *batch: Tensor) -> State:
        """The state of a sum over some sequences, given with their number."""
        return {"count": batch[1], "total": batch[0]}

    def finish(self, state: State) -> dict[str, Tensor]:
        """The mean over sequences."""
        return {"": (state["total"] * (self.factor / state["count"].double())).to(self.dtype)}


@dataclass(frozen=True)
class Pending(Statistic):
    """The gradient of a batch that takes several passes, kept until the last pass; it is not stored."""

    shape: tuple[int, ...]

    @property
    def fields(self) -> Mapping[str, Field]:
        """The sum so far; 0 between batches."""
        return {"total": Field(self.shape, torch.float32)}

    def measure(self, *batch: Tensor) -> State:
        """The state of the gradient of one pass."""
        return {"total": batch[0]}

    def finish(self, state: State) -> dict[str, Tensor]:
        """An empty dict: nothing is stored."""
        return {}


@dataclass(frozen=True)
class BatchRows(Statistic):
    """Mean |g|, standard deviation and norm of one parameter's gradient in every batch."""

    batches: int

    @property
    def fields(self) -> Mapping[str, Field]:
        """A row for each batch, ``[batches, 3]``; 0 where a batch was not seen."""
        return {"rows": Field((self.batches, 3))}

    def measure(self, *batch: Tensor) -> State:
        """The state of a batch: its summed gradient, the number of its sequences, and its own number."""
        gradient, sequences, number = batch[0].flatten().float(), int(batch[1]), int(batch[2])
        sums = torch.stack([gradient.abs().sum(), gradient.sum(), gradient.dot(gradient)]).double()
        size, mean = sums[:2] / (sequences * gradient.numel())
        square = sums[2] / sequences**2
        rows = sums.new_zeros(self.batches, 3)
        deviation = (square / gradient.numel() - mean.square()).clamp(min=0).sqrt()
        rows[number] = torch.stack([size, deviation, square.sqrt()])
        return {"rows": rows}

    def finish(self, state: State) -> dict[str, Tensor]:
        """The rows of all batches."""
        return {"": state["rows"]}


@dataclass(frozen=True)
class WeightedMean(Statistic):
    """The mean of weighted samples and its standard error, from sums of values and of their squares."""

    width: int

    @property
    def fields(self) -> Mapping[str, Field]:
        """Sums of weights, of squared weights, of weighted values and squares, and the number of samples."""
        vector = Field((self.width,))
        return {"count": COUNT, "weight": Field(()), "weight_square": Field(()), "total": vector, "square": vector}

    def measure(self, *batch: Tensor) -> State:
        """The state of one sample ``[width]`` and its weight."""
        value, weight = batch[0].double(), batch[1].double()
        return {
            "count": count(1),
            "weight": weight,
            "weight_square": weight.square(),
            "total": weight * value,
            "square": weight * value.square(),
        }

    def finish(self, state: State) -> dict[str, Tensor]:
        """Weighted mean, and its standard error by Kish's effective sample size; the error of one sample is NaN."""
        mean = state["total"] / state["weight"]
        variance = (state["square"] / state["weight"] - mean.square()).clamp(min=0)
        samples = state["weight"].square() / state["weight_square"]
        return {"mean": mean, "standard_error": (variance / (samples - 1)).sqrt()}


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
        """The state of an input ``[tokens, width]``, float32."""
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
        """Join mean and centred squares by the pairwise update, and the other fields element by element."""
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
        """Norms l1 = sum |x|, l2 = sqrt(sum x^2), max = max |x|, and mean, variance, min, max over tokens; float32."""
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
    """E[x x^T] and E[x] per token, summed in float32 and float64, a tile of rows at a time.

    Only the tiles on and above the diagonal are multiplied, and only one tile of rows is ever held beside the sum.
    Products are float32, or of 16-bit inputs with float32 sums, which are exact products.
    """

    width: int
    dtype: torch.dtype = torch.float32
    tile: int = 256

    @property
    def fields(self) -> Mapping[str, Field]:
        """Tokens, the sum of inputs ``[width]``, and the upper tiles of the sum of products ``[width, width]``."""
        gram = Field((self.width, self.width), torch.float32)
        return {"count": COUNT, "total": Field((self.width,)), "gram": gram}

    def measure(self, *batch: Tensor) -> State:
        """The state of an input ``[tokens, width]``."""
        state = self.init()
        self.update(state, *batch)
        return state

    def update(self, state: State, *batch: Tensor) -> None:
        """Add an input ``[tokens, width]``; a second one of this shape stands for it in the products."""
        x, *scaled = batch
        state["count"] += len(x)
        state["total"] += x.sum(0, dtype=torch.float32).to(state["total"].device, torch.float64)
        (x,) = scaled or (x,)
        for start in range(0, self.width, self.tile):
            rows = slice(start, start + self.tile)
            state["gram"][rows, start:] += _product(x[:, rows].T, x[:, start:]).to(state["gram"].device)

    def finish(self, state: State) -> dict[str, Tensor]:
        """The whole Gram matrix and the mean input, per token."""
        whole = state["gram"].triu()
        whole += whole.triu(1).T
        whole /= state["count"]
        return {"": whole.to(self.dtype), "mean": (state["total"] / state["count"]).float()}


HELD_OUT_SEQUENCES, HELD_OUT_TOKENS = 32, 32
"""The most held-out sequences whose inputs are kept, and the most tokens of each."""


@dataclass(frozen=True)
class HeldOut(Statistic):
    """Inputs at some tokens of the first held-out sequences; the error of a repair is measured on them.

    Each token has a place of its own, so that batches and processes join exactly.
    """

    width: int

    @property
    def fields(self) -> Mapping[str, Field]:
        """Tokens, and a row for each, ``[HELD_OUT_SEQUENCES * HELD_OUT_TOKENS, width]``; 0 where no token is kept."""
        return {
            "count": COUNT,
            "rows": Field((HELD_OUT_SEQUENCES * HELD_OUT_TOKENS, self.width), torch.float32),
        }

    def measure(self, *batch: Tensor) -> State:
        """The state of inputs ``[sequences, tokens, width]``, given with their numbers among the held-out sequences."""
        state = self.init()
        self.update(state, *batch)
        return state

    def update(self, state: State, *batch: Tensor) -> None:
        """Put inputs ``[sequences, tokens, width]`` into their places, given with their numbers, which the host has."""
        x, numbers = batch
        rows, kept = state["rows"], numbers < HELD_OUT_SEQUENCES
        tokens = min(HELD_OUT_TOKENS, x.shape[1])
        positions = torch.arange(tokens, device=x.device) * x.shape[1] // tokens
        places = numbers[kept][:, None] * tokens + torch.arange(tokens)
        rows[_at(places, rows.device)] = chosen(x, kept)[:, positions].float().to(rows.device)
        state["count"] += places.numel()

    def finish(self, state: State) -> dict[str, Tensor]:
        """The rows of all kept tokens, and the number of these tokens."""
        return {"": state["rows"], "tokens": state["count"]}


def chosen(x: Shaped[Tensor, "rows ..."], mask: Bool[Tensor, " rows"]) -> Shaped[Tensor, "_ ..."]:
    """The rows that a mask of the host chooses, on whatever device, which the host does not wait for."""
    return x if bool(mask.all()) else x[_at(mask.nonzero().squeeze(1), x.device)]


def _at(places: Tensor, device: torch.device) -> Tensor:
    """Places that the host knows, for a device."""
    return places.to(device, non_blocking=True)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product with float32 sums and result."""
    if a.is_cuda and a.dtype != torch.float32:
        product: Tensor = torch.mm(a, b, out_dtype=torch.float32)
        return product
    return a.float() @ b.float()


_LOWEST, _OCTAVES = -20, BINS // 4
"""The exponent of the lowest edge of a histogram, and the number of octaves above it."""


@dataclass(frozen=True)
class Histogram(Statistic):
    """Counts of every feature's values in half octaves of |x|, by sign; entropy and frequency follow from it.

    The edges are fixed, so that histograms join exactly. Values beyond them count in the first and
    last bins; zero is in the first.
    """

    width: int

    @property
    def fields(self) -> Mapping[str, Field]:
        """Counts of every feature's values by bin, ``[width, BINS]``."""
        return {"counts": Field((self.width, BINS), torch.int32)}

    def measure(self, *batch: Tensor) -> State:
        """The state of an input ``[tokens, width]``."""
        (x,) = batch
        bits = x.float().contiguous().view(torch.int32)
        first = 2 * (127 + _LOWEST)  # float32: 8 bits of exponent, biased by 127, then the half octave's bit
        half_octave = ((bits & 0x7FFFFFFF) >> 22).sub_(first).clamp_(0, BINS // 2 - 1)
        index = half_octave + (bits < 0) * (BINS // 2)
        index += torch.arange(self.width, dtype=torch.int32, device=x.device) * BINS
        counts = counted(index.flatten(), self.width * BINS)
        return {"counts": counts.view(self.width, BINS)}

    def finish(self, state: State) -> dict[str, Tensor]:
        """The counts, ``[width, BINS]``."""
        return {"": state["counts"]}


def counted(index: Int[Tensor, " values"], bins: int) -> Int[Tensor, " bins"]:
    """How often each number occurs; `bincount` would wait for a GPU, to learn the largest."""
    if not index.is_cuda:
        return torch.bincount(index, minlength=bins)
    return index.new_zeros(bins).index_add_(0, index, torch.ones_like(index))


def entropy(counts: Tensor) -> Tensor:
    """Entropy of histograms in nats; ``[..., BINS] -> [...]``."""
    share = counts.double() / counts.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1)


def frequency(counts: Tensor, threshold: float) -> Tensor:
    """Share of values with |x| at least the threshold, rounded down to an edge; ``[..., BINS] -> [...]``."""
    octaves = torch.exp2(torch.arange(_LOWEST, _LOWEST + _OCTAVES).float())
    edges = torch.stack([octaves, 1.5 * octaves], 1).flatten()
    start = max(0, int((edges <= threshold).sum()) - 1)
    both = counts[..., : BINS // 2] + counts[..., BINS // 2 :]
    return both[..., start:].sum(-1).double() / both.sum(-1)


@dataclass(frozen=True)
class Cosine(Statistic):
    """The cosine between a layer's input and output, over tokens."""

    @property
    def fields(self) -> Mapping[str, Field]:
        """Tokens, and the sums of cosines and of their squares."""
        return {"count": COUNT, "total": Field(()), "square": Field(())}

    def measure(self, *batch: Tensor) -> State:
        """The state of an input and an output, ``[tokens, model]`` each."""
        cosines = torch.cosine_similarity(batch[0].float(), batch[1].float(), dim=-1).double()
        return {"count": count(len(cosines)), "total": cosines.sum(), "square": cosines.square().sum()}

    def finish(self, state: State) -> dict[str, Tensor]:
        """Mean and variance of the cosine over tokens."""
        mean = state["total"] / state["count"]
        return {"cosine_mean": mean, "cosine_variance": (state["square"] / state["count"] - mean.square()).clamp(min=0)}
