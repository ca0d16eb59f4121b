"""The statistics: small frozen records that say how a sum starts, grows, joins another, and what is stored of it.

A state is a dict of tensors, one a field. `merge` is associative, so that one pass, two joined
halves, and any batch size give the same result up to rounding; everything that the collecting
stages keep between batches is made of these records.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Field:
    """One tensor of a state. ``join`` says how two of them become one, element by element."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    join: Literal["sum", "min", "max"] = "sum"

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def start(self) -> float:
        """The value that changes nothing when joined."""
        return {"sum": 0.0, "min": float("inf"), "max": float("-inf")}[self.join]


COUNT = Field((), torch.int64)


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
        """What is stored, by name; "" stands for the statistic itself. Also works on meta tensors."""

    def init(self, device: str = "cpu") -> State:
        """The state of no batch."""
        return {name: torch.full(f.shape, f.start, dtype=f.dtype, device=device) for name, f in self.fields.items()}

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
    """A number of tokens or sequences, as a state holds it."""
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
        """Of s, ``[sequences, tokens, units]``."""
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
        """Means over sequences and tokens, and what follows from them; ``[units]`` each, float64.

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
        """Of a sum over some sequences, and their number."""
        return {"count": batch[1], "total": batch[0]}

    def finish(self, state: State) -> dict[str, Tensor]:
        """The mean over sequences."""
        return {"": (state["total"] * (self.factor / state["count"].double())).to(self.dtype)}


@dataclass(frozen=True)
class Pending(Statistic):
    """The gradient of a batch that takes several passes, until the last of them; nothing of it is stored."""

    shape: tuple[int, ...]

    @property
    def fields(self) -> Mapping[str, Field]:
        """The sum so far; 0 between batches."""
        return {"total": Field(self.shape, torch.float32)}

    def measure(self, *batch: Tensor) -> State:
        """Of one pass's gradient."""
        return {"total": batch[0]}

    def finish(self, state: State) -> dict[str, Tensor]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class BatchRows(Statistic):
    """Mean |g|, standard deviation and norm of one parameter's gradient in every batch."""

    batches: int

    @property
    def fields(self) -> Mapping[str, Field]:
        """One row a batch, ``[batches, 3]``; 0 where a batch was not seen."""
        return {"rows": Field((self.batches, 3))}

    def measure(self, *batch: Tensor) -> State:
        """Of a batch's summed gradient, its sequences, and its number."""
        gradient, sequences, number = batch[0].flatten().float(), int(batch[1]), int(batch[2])
        sums = torch.stack([gradient.abs().sum(), gradient.sum(), gradient.dot(gradient)]).double().cpu()
        size, mean = sums[:2] / (sequences * gradient.numel())
        square = sums[2] / sequences**2
        rows = torch.zeros(self.batches, 3, dtype=torch.float64)
        deviation = (square / gradient.numel() - mean.square()).clamp(min=0).sqrt()
        rows[number] = torch.stack([size, deviation, square.sqrt()])
        return {"rows": rows}

    def finish(self, state: State) -> dict[str, Tensor]:
        """The rows."""
        return {"": state["rows"]}


@dataclass(frozen=True)
class Samples(Statistic):
    """Mean of weighted samples and its standard error, from sums of values and of their squares."""

    width: int

    @property
    def fields(self) -> Mapping[str, Field]:
        """Sums of weights, of squared weights, of weighted values and squares, and the number of samples."""
        vector = Field((self.width,))
        return {"count": COUNT, "weight": Field(()), "weight_square": Field(()), "total": vector, "square": vector}

    def measure(self, *batch: Tensor) -> State:
        """Of one sample ``[width]`` and its weight."""
        value, weight = batch[0].double(), batch[1].double()
        return {
            "count": count(1),
            "weight": weight,
            "weight_square": weight.square(),
            "total": weight * value,
            "square": weight * value.square(),
        }

    def finish(self, state: State) -> dict[str, Tensor]:
        """Weighted mean, and its standard error with Kish's effective sample size; NaN of one sample."""
        mean = state["total"] / state["weight"]
        variance = (state["square"] / state["weight"] - mean.square()).clamp(min=0)
        samples = state["weight"].square() / state["weight_square"]
        return {"mean": mean, "standard_error": (variance / (samples - 1)).sqrt()}
