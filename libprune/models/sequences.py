"""Token sequences and the targets that a model predicts on them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from jaxtyping import Int
from torch import Tensor

from libprune.engine.heads import Pooling

NO_TARGET = -100
"""The target at a position without one; transformers uses the same number."""


@dataclass(frozen=True)
class Sequences:
    """Token sequences with their targets.

    Attributes:
        ids: token ids, ``[sequences, length]``; ids behind the end of a shorter sequence are never read.
        targets: None for the next token at every position but the last; ``[sequences, length]`` for one token at each
            position, `NO_TARGET` where there is none; ``[sequences]`` for one label of each sequence.
        lengths: tokens of each sequence, ``[sequences]``; None if all have the whole length.
        pooling: how the states of a sequence become its embedding, for models that give one; these have no targets.
    """

    ids: Int[Tensor, "sequences length"]
    targets: Int[Tensor, "sequences length"] | Int[Tensor, " sequences"] | None = None
    lengths: Int[Tensor, " sequences"] | None = None
    pooling: Pooling | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, chosen: slice | Tensor) -> "Sequences":
        """The chosen sequences."""
        targets, lengths = (None if part is None else part[chosen] for part in (self.targets, self.lengths))
        return Sequences(self.ids[chosen], targets, lengths, self.pooling)

    def to(self, device: torch.device) -> "Sequences":
        """The sequences on a device."""
        return replace(self, ids=self.ids.to(device), targets=None if self.targets is None else self.targets.to(device))

    def shortest_first(self) -> "Sequences":
        """The sequences in the order of their lengths, so that those of one length are neighbours."""
        return self if self.lengths is None else self[self.lengths.argsort(stable=True)]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together, without the ids behind the ends of shorter ones."""
        return self.ids.numel() if self.lengths is None else int(self.lengths.sum())

    @property
    def counted(self) -> int:
        """Number of targets that the loss of a sequence is the mean over, or 1 embedding; it is the same for all."""
        if self.pooling is not None:
            return 1
        if self.targets is None:
            return self.ids.shape[1] - 1
        return 1 if self.targets.ndim == 1 else int((self.targets[0] != NO_TARGET).sum())

    @property
    def predicted(self) -> Int[Tensor, "sequences length"] | Int[Tensor, " sequences"]:
        """The target of each position of the logits, `NO_TARGET` where there is none."""
        if self.targets is not None:
            return self.targets
        following = torch.full_like(self.ids, NO_TARGET)
        following[:, :-1] = self.ids[:, 1:]
        return following

    def passes(self, at_once: int) -> Iterator["Sequences"]:
        """All sequences in their order, at most `at_once` together, only neighbours of one length, without padding."""
        if self.lengths is None:
            yield from (self[start : start + at_once] for start in range(0, len(self), at_once))
            return
        for length, run in groupby(range(len(self)), key=self.lengths.tolist().__getitem__):
            members = list(run)
            same = self[members[0] : members[-1] + 1]
            whole = Sequences(same.ids[:, :length], same.targets, pooling=self.pooling)
            yield from whole.passes(at_once)


def joined(parts: Iterable[Sequences]) -> Sequences:
    """The sequences of several, at least one, behind each other; all are whole, of one length and for one head."""
    ordered = list(parts)
    targets = [part.targets for part in ordered if part.targets is not None]
    ids = torch.cat([part.ids for part in ordered])
    return Sequences(ids, torch.cat(targets) if targets else None, pooling=ordered[0].pooling)


Pass = tuple[int, int, Sequences]
"""The number of a batch, the index of its first sequence, and its sequences on the device."""
