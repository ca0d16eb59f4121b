"""A search on a made-up model, whose judge counts what it is asked."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from libprune.allocation.ladders import Ladders
from libprune.allocation.methods import Depth, allocate_search
from libprune.allocation.search import Refined, refine
from libprune.engine.plan import Plan
from libprune.pipeline.sections import Allocate
from tests.support.shapes import Shape, ladders_of

SHAPE = Shape(ffn=16)


class CountingJudge:
    """A made-up divergence; remembers what it was asked, and stops after so many plans."""

    def __init__(self, shape: Shape, seed: int, interacting: bool = False, stop: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.weights = {block: rng.random() for block in shape.architecture().blocks()}
        self.interacting, self.stop = interacting, stop
        self.seen: list[Plan] = []

    def value(self, plan: Plan) -> float:
        """Weighted squares of the removed shares; interacting blocks also multiply with those after them."""
        shares = {block: float((~keep).mean()) for block, keep in plan.keep.items()}
        alone = sum(self.weights[block] * share**2 for block, share in shares.items())
        values = list(shares.values())
        pairs = sum(one * two for one, two in itertools.pairwise(values))
        return alone + (3 * pairs if self.interacting else 0.0)

    def __call__(self, plan: Plan) -> float:
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen.append(plan)
        return self.value(plan)

    @property
    def keys(self) -> list[bytes]:
        return [b"".join(keep.tobytes() for keep in plan.keep.values()) for plan in self.seen]


def start_of(shape: Shape, params: Allocate, seed: int) -> tuple[Ladders, Depth, int]:
    """Ladders, the depths that the search begins with, and the target."""
    rng = np.random.default_rng(seed)
    architecture, scores = shape.architecture(), shape.table(1.0 + rng.permutation(len(shape.unit_costs())))
    ladders, target = ladders_of(architecture, scores, params), round(params.ratio * shape.decoder)
    return ladders, allocate_search(architecture, ladders, target, params, shape.evidence("search", seed)), target


def search(
    judge: CountingJudge,
    params: Allocate,
    seed: int = 0,
    record: Path | None = None,
    rivals: dict[str, Depth] | None = None,
) -> Refined:
    """From the integer programme's plan of the `SHAPE`; without a record of an earlier run unless one is given."""
    ladders, depth, target = start_of(SHAPE, params, seed)
    curves = SHAPE.evidence("search", seed)["levels"]
    with tempfile.TemporaryDirectory() as folder:
        path = record or Path(folder) / "new" / "record.jsonl"
        starts = {"search": depth} | (rivals or {})
        return refine(judge, SHAPE.architecture(), ladders, curves, starts, target, params, path)


def asked(**changes: object) -> Allocate:
    return Allocate(**{"method": "search", "shape": "per_layer", "ratio": 0.4, "evaluations": 30, **changes})


cases = st.fixed_dictionaries(
    {
        "ratio": st.floats(0.05, 0.7),
        "min_groups": st.integers(0, 2),
        "min_channels": st.integers(0, 3),
        "channel_multiple": st.integers(1, 3),
        "freeze_first": st.integers(0, 1),
        "depth": st.sampled_from(["none", "units"]),
        "evaluations": st.integers(0, 30),
        "seed": st.integers(0, 9),
    }
)
