"""Statistics of mixtures of experts: of each expert's own rows, and of how a router uses the experts.

A row is a token on its way through one expert (`libprune.engine.stacks.Routing`). Rows come sorted by expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from libprune.collection.records import (
    COUNT,
    HELD_OUT_SEQUENCES,
    HELD_OUT_TOKENS,
    Field,
    State,
    Statistic,
    count,
    counted,
)


@dataclass(frozen=True)
class Stacked(Statistic):
    """A statistic of the rows of each expert by itself; its tensors have the experts as first dimension.

    An expert that no token was routed to has zeros.

    Attributes:
        copies: number of experts.
        each: the statistic of the rows ``[rows, width]`` of one expert.
    """

    copies: int
    each: Statistic

    @property
    def fields(self) -> Mapping[str, Field]:
        """The fields of each expert, one behind the other, and which experts had rows."""
        each = self.each.fields.items()
        own = {name: Field((self.copies, *f.shape), f.dtype, f.join, f.host) for name, f in each}
        return own | {_ROWS: Field((self.copies,), torch.int64, host=True)}

    def measure(self, *batch: Tensor) -> State:
        """The state of rows ``[rows, width]``, given with the number of rows of each expert."""
        state = self.init()
        self.update(state, *batch)
        return state

    def update(self, state: State, *batch: Tensor) -> None:
        """Add rows ``[rows, width]``, given with the number of rows of each expert."""
        x, counts = batch
        for copy, rows in enumerate(x.split(counts.tolist())):
            if len(rows):
                self.each.update(self._one(state, copy), rows)
        state[_ROWS] += counts

    def merge(self, one: State, two: State) -> None:
        """Join the second state to the first, expert by expert."""
        for copy in two[_ROWS].nonzero().flatten().tolist():
            self.each.merge(self._one(one, copy), self._one(two, copy))
        one[_ROWS] += two[_ROWS]

    def finish(self, state: State) -> dict[str, Tensor]:
        """The tensors of each expert, stacked."""
        if state[_ROWS].is_meta:  # shapes alone are asked for, and hundreds of experts have the same
            first = self.each.finish(self._one(state, 0))
            return {name: tensor.new_empty(self.copies, *tensor.shape) for name, tensor in first.items()}
        stacked = self.finish(self.init("meta"))
        stacked = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in stacked.items()}
        for copy in state[_ROWS].nonzero().flatten().tolist():  # one by one, beside which nothing else is held
            for name, tensor in self.each.finish(self._one(state, copy)).items():
                stacked[name][copy] = tensor
        return stacked

    def _one(self, state: State, copy: int) -> State:
        """A view of the state of one expert."""
        return {name: state[name][copy] for name in self.each.fields}


_ROWS = "rows_of_copies"


@dataclass(frozen=True)
class Squares(Statistic):
    """The mean square of each feature of rows."""

    width: int

    @property
    def fields(self) -> Mapping[str, Field]:
        """Rows, and the sum of squares ``[width]``."""
        return {"count": COUNT, "total": Field((self.width,))}

    def measure(self, *batch: Tensor) -> State:
        """The state of rows ``[rows, width]``."""
        return {"count": count(len(batch[0])), "total": batch[0].float().square().sum(0).double()}

    def finish(self, state: State) -> dict[str, Tensor]:
        """The mean over rows, ``[width]``."""
        return {"": (state["total"] / state["count"]).float()}


@dataclass(frozen=True)
class RoutedHeldOut(Statistic):
    """Inputs of experts at some tokens of the first held-out sequences, as `HeldOut` keeps those of other maps.

    Each token has a place of its own in every expert, so that batches and processes join exactly.
    """

    copies: int
    width: int

    @property
    def fields(self) -> Mapping[str, Field]:
        """Rows by expert, ``[copies, HELD_OUT_SEQUENCES * HELD_OUT_TOKENS, width]``, and how many are filled."""
        places = HELD_OUT_SEQUENCES * HELD_OUT_TOKENS
        return {"rows": Field((self.copies, places, self.width), torch.float32), "count": COUNT}

    def measure(self, *batch: Tensor) -> State:
        """The state of rows ``[rows, width]``, given with the expert and the place of each."""
        state = self.init()
        self.update(state, *batch)
        return state

    def update(self, state: State, *batch: Tensor) -> None:
        """Put rows ``[rows, width]`` into their places, given with the expert and the place of each."""
        x, experts, places = batch
        rows = state["rows"]
        at = (one.to(rows.device, non_blocking=True) for one in (experts, places))
        rows[tuple(at)] = x.float().to(rows.device)
        state["count"] += len(x)

    def finish(self, state: State) -> dict[str, Tensor]:
        """The rows of every expert, zero where a kept token did not go through it; and the number of filled rows."""
        return {"": state["rows"], "tokens": state["count"]}


@dataclass(frozen=True)
class Routed(Statistic):
    """How a mixture uses its experts: how often each is chosen, and how large what it adds is.

    `reap` is the mean, over the tokens routed to the expert, of the router's weight times the norm of the expert's
    output (Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression").
    """

    copies: int

    @property
    def fields(self) -> Mapping[str, Field]:
        """Tokens of the text, tokens of each expert, and the sum of norms of what it added; ``[copies]``."""
        return {"count": COUNT, "tokens": Field((self.copies,), torch.int64), "norms": Field((self.copies,))}

    def measure(self, *batch: Tensor) -> State:
        """The state of what rows add ``[rows, output]``, given with their experts and the number of tokens."""
        added, experts, tokens = batch
        norms = torch.zeros(self.copies, dtype=torch.float64, device=added.device)
        norms.index_add_(0, experts, added.float().norm(dim=1).double())
        return {"count": tokens, "tokens": counted(experts, self.copies), "norms": norms}

    def finish(self, state: State) -> dict[str, Tensor]:
        """`frequency`, the share of tokens that go through each expert, and `reap`; 0 for an expert never chosen."""
        return {
            "frequency": state["tokens"] / state["count"].double(),
            "reap": state["norms"] / state["tokens"].clamp(min=1),
        }
