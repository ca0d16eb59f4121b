"""Which units stay: a pruning decision, which needs no model."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.engine.architecture import WITH_LAYER, Architecture, Block


@dataclass(frozen=True)
class Plan:
    """For each (layer, part) which units are kept, as a boolean array ``[units]``.

    A part with no unit left contributes nothing to the residual stream; a layer with no part left
    is deleted.

    Attributes:
        keep: by block whether each unit stays.
        width: how many columns of the residual stream stay, of those that its axes order; None: all
            (`libprune.collection.stream_axes`).
    """

    keep: Mapping[Block, NDArray[np.bool_]]
    width: int | None = None

    @staticmethod
    def dense(architecture: Architecture) -> "Plan":
        """The plan that keeps everything."""
        return Plan({block: np.ones(architecture.units(block[1]), dtype=bool) for block in architecture.blocks()})

    def without(self, block: Block, units: Any) -> "Plan":
        """The plan that removes also these units of a block: a number, an array of numbers, or a slice."""
        keep = self.keep[block].copy()
        keep[units] = False
        return replace(self, keep={**self.keep, block: keep})

    def and_also(self, other: "Plan") -> "Plan":
        """The plan that removes also what another plan of the same model removes, but for columns."""
        return replace(self, keep={block: keep & other.keep[block] for block, keep in self.keep.items()})

    def kept(self, layer: int, part: str) -> int:
        """Number of units kept."""
        return int(self.keep[layer, part].sum())

    def counts(self, part: str) -> list[int]:
        """Numbers of units kept in each layer that is left and has the part."""
        return [self.kept(layer, of) for layer, of in self.keep if of == part and layer in self.layers]

    def sizes(self, architecture: Architecture, layer: int, least: int = 0) -> dict[str, int]:
        """The sizes of the axes that parts of a layer prune, by their names.

        Args:
            least: the units that a part is taken to keep, and the groups that these lie in, if it keeps fewer.
        """
        sizes: dict[str, int] = {}
        for owner, part in architecture.uses(layer):
            shape, keep = architecture.parts[part], self.keep[owner, part]
            groups = int(shape.groups_left(keep).sum()) if shape.outer else 0
            sizes |= shape.sizes(max(least, int(keep.sum())), max(least, groups))
        return sizes

    def gone(self, layer: int, part: str) -> bool:
        """Whether the whole part is removed."""
        return self.kept(layer, part) == 0

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that are left, by their index in the dense model."""
        return tuple(sorted({layer for layer, part in self.keep if not self.gone(layer, part)}))

    @cached_property
    def removed(self) -> frozenset[Block]:
        """Every (layer, part) that is removed whole, and `WITH_LAYER` of every layer that is deleted."""
        deleted = {layer for layer, _ in self.keep} - set(self.layers)
        gone = {block for block in self.keep if self.gone(*block)}
        return frozenset(gone | {(layer, WITH_LAYER) for layer in deleted})

    @property
    def column(self) -> NDArray[np.bool_]:
        """Whether each unit is kept, by layer and name of the part, ``[units of all blocks]``."""
        return np.concatenate([keep for _, keep in sorted(self.keep.items())])

    @property
    def digest(self) -> str:
        """Digest of the kept units of every block, and of the width, by which results name this plan."""
        digest = hashlib.sha256()
        for block, keep in sorted(self.keep.items()):
            digest.update(f"{block} {len(keep)} ".encode() + keep.tobytes())
        if self.width is not None:
            digest.update(f"width {self.width}".encode())
        return digest.hexdigest()[:16]

    @property
    def uniform(self) -> bool:
        """Whether all layers left have the same counts of each part, and all their parts, as stock configs need."""
        counts = [set(self.counts(part)) for part in {part for _, part in self.keep}]
        return bool(self.layers) and all(len(of_part) <= 1 and 0 not in of_part for of_part in counts)


def jaccard(kept: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Jaccard index of two kept sets: units that both keep over units that either keeps; 1 if neither keeps any.

    Args:
        kept: whether each unit is kept, ``[units]``.
        other: the same units under another decision, ``[units]``.
    """
    either = int(np.count_nonzero(kept | other))
    return int(np.count_nonzero(kept & other)) / either if either else 1.0
