"""The order in which whole layers or parts of layers go, and how far the model diverges without them.

What single removals cost does not add up: of two layers that do the same, either can go alone, but not both. So `joint`
removes the layer or part without which the model diverges least, measures all others again without it, and goes on. A
step costs one pass for every removal that is left, of which only the layers behind it are run.

`cosine` is the plain baseline: layers that change the direction of their input least go first, by 1 - cosine between
input and output (block influence, Men et al. 2024, ShortGPT). What the model diverges without them is measured too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from libprune.engine.architecture import Architecture, Block
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns, mean_columns
from libprune.pipeline.artifacts import same_origin, write_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Depth
from libprune.pipeline.terminal import note
from libprune.statistics.sensitivity import LAYER, Removal, removable

if TYPE_CHECKING:
    from libprune.collection.calibration import Calibration
    from libprune.collection.resumable import Collection


Frozen = tuple[int, int]
"""How many of the first and of the last layers keep everything."""


def removals(architecture: Architecture, of: str, frozen: Frozen = (0, 0)) -> list[Removal]:
    """Every removal that may come into the order, layer by layer; nothing of frozen layers.

    Args:
        of: `layers` or `parts`.
    """
    layers = range(frozen[0], architecture.layers - frozen[1])
    if of == "layers":
        return [(layer, LAYER) for layer in layers]
    return [(layer, part) for layer in layers for part in removable(architecture, layer)]


def blocks_of(architecture: Architecture, removal: Removal) -> list[Block]:
    """The blocks that a removal takes away."""
    layer, what = removal
    return [(layer, part) for part in (architecture.parts_of(layer) if what == LAYER else [what])]


def plan_without(architecture: Architecture, gone: Sequence[Removal]) -> Plan:
    """The plan that takes some layers or parts away and keeps everything else."""
    removed = {block for removal in gone for block in blocks_of(architecture, removal)}
    return Plan({block: np.full(architecture.units(block[1]), block not in removed) for block in architecture.blocks()})


def most_removals(possible: int, asked: int | None) -> int:
    """How many removals are put into order: as many as asked for, or half of those that are possible."""
    return min(possible, max(1, possible // 2) if asked is None else asked)


def measurements(possible: int, section: Depth) -> int:
    """How many removals `joint` measures in all its steps."""
    steps = range(most_removals(possible, section.removals))
    return sum(min(possible - step, section.candidates or possible) if step else possible for step in steps)


def order_table(
    order: Sequence[Removal],
    divergences: Float[np.ndarray, "steps sequences"],
    single: NDArray[np.float64],
    change: NDArray[np.float64],
) -> Columns:
    """A table with one row a step: what goes, and how far the model diverges once it is gone, nats per token.

    Args:
        divergences: without all removals up to each, by sequence.
        single: mean divergence without this removal alone, ``[steps]``; NaN where it was not measured.
        change: 1 - cosine between the input and the output of the layer in the dense model, ``[steps]``.
    """
    return {
        "step": 1 + np.arange(len(order)),
        "layer_idx": np.array([layer for layer, _ in order], dtype=np.int64),
        "removed": np.array([what for _, what in order], dtype=np.str_),
        **mean_columns("divergence", divergences),
        "single_divergence": single,
        "change": change,
    }


def empty_table() -> Columns:
    """A table of an order without removals."""
    return order_table([], np.zeros((0, 1)), np.zeros(0), np.zeros(0))


def order_of(architecture: Architecture, table: Columns) -> list[tuple[frozenset[Block], float]]:
    """What is gone after each step and the divergence by then, nats per token; begins with nothing gone and 0.0."""
    gone: frozenset[Block] = frozenset()
    order = [(gone, 0.0)]
    for layer, what, divergence in zip(*(table[key].tolist() for key in KEYS), strict=True):
        gone |= frozenset(blocks_of(architecture, (layer, what)))
        order.append((gone, divergence))
    return order


KEYS = ("layer_idx", "removed", "divergence")
"""The columns that make the order."""


def read_change(layout: Layout, layers: int, origin: Mapping[str, object]) -> NDArray[np.float64]:
    """1 - cosine between the input and the output of each layer, mean over tokens, ``[layers]``.

    Args:
        layout: of the artifacts.
        layers: number of layers.
        origin: the model and, where it must be known, the text that it was measured on.

    Raises:
        ArtifactError: if it is missing, or was measured on another model or text.
    """
    from libprune.pipeline.shards import read_meta, read_tensor  # needs torch, which a stage without work does not load

    same_origin(layout.activations, read_meta(layout.activations, "activations"), origin)
    read = (read_tensor(layout.activations, layer, "block.cosine_mean", "activations") for layer in range(layers))
    return 1 - np.array([float(cosine) for cosine in read])


def order_identity(kind: str, frozen: Frozen) -> dict[str, object]:
    """What an order was made by, as its table says; of another kind, or with other layers frozen, it does not count."""
    return {"order": kind, "frozen": list(frozen)}


def measure_depth(layout: Layout, compute: Compute, section: Depth, kind: str, frozen: Frozen) -> Columns | None:
    """Put layers or parts into the order in which they go, and write the table.

    Args:
        section: how many calibration sequences, which are the last ones, and what goes.
        kind: `joint` or `cosine`.

    Returns:
        The table; None in all processes but the first.

    Raises:
        LibpruneError: if an artifact is missing or foreign, nothing can go, the disk has no room, or a divergence is
            not finite.
    """
    from libprune.collection.calibration import set_up  # needs torch, which reading the table does not
    from libprune.collection.resumable import collecting
    from libprune.statistics.divergence import Divergence
    from libprune.statistics.losses import LOSSES, SequenceLosses, measuring

    run = set_up(layout, compute, section.sequences, last=True)
    architecture = run.architecture
    change = read_change(layout, architecture.layers, {key: run.meta[key] for key in ("model", "tokens")})
    first = _that_can_go(architecture, removals(architecture, section.of, frozen))
    steps = most_removals(len(first), section.removals)
    identity = {**order_identity(kind, frozen), "of": section.of}
    if kind == "cosine":
        order = by_cosine(architecture, first, change)[:steps]
        plans = {f"the first {n} of the order": plan_without(architecture, order[:n]) for n in range(1, len(order) + 1)}
        with measuring(run, "depth", layout.depth, plans, identity, Divergence(run.model)) as losses:
            if losses is None:
                return None
            table = order_table(order, losses.changed, np.full(len(order), np.nan), _of_layers(order, change))
            write_table(layout.depth, table, run.meta | identity)
            return table
    slots = -(-len(first) // run.world.size) * run.world.size
    groups = [{LOSSES: SequenceLosses(steps * slots, len(run.sequences))}]
    joint = Joint(architecture, first, section.candidates)
    identity |= {"candidates": section.candidates}
    facts = {**identity, "steps": steps, "sequences": len(run.sequences)}
    with collecting(run, "depth", layout.depth, groups, 1, facts, steps * slots, run.sequences.tokens) as work:
        _measure_jointly(run, work, joint, slots, steps)
        if not run.world.first:
            return None
        single = np.array([joint.single[removal] for removal in joint.gone])
        table = order_table(joint.gone, np.array(joint.found), single, _of_layers(joint.gone, change))
        write_table(layout.depth, table, run.meta | identity)
        return table


def _of_layers(order: Sequence[Removal], change: NDArray[np.float64]) -> NDArray[np.float64]:
    return change[[layer for layer, _ in order]]


def _that_can_go(architecture: Architecture, wanted: Sequence[Removal]) -> list[Removal]:
    """The removals that can go first.

    Raises:
        LibpruneError: if there is none.
    """
    found = [removal for removal in wanted if not why_not(architecture, [removal])]
    if not found:
        reason = why_not(architecture, wanted[:1]) if wanted else "all layers are frozen, or hold no such part"
        raise LibpruneError(f"allocate.depth finds nothing that can go as a whole: {reason}; set it to none")
    return found


def why_not(architecture: Architecture, gone: Sequence[Removal]) -> str:
    """Why a model cannot lose these layers or parts, in words that follow a colon; empty if it can."""
    from libprune.engine.surgery import require_sliceable  # needs torch, which reading the table does not

    plan = plan_without(architecture, gone)
    if not plan.layers:
        return "one layer must stay"
    try:
        require_sliceable(architecture, plan)
    except LibpruneError as error:
        return str(error)
    return ""


def by_cosine(architecture: Architecture, wanted: Sequence[Removal], change: NDArray[np.float64]) -> list[Removal]:
    """The removals in ascending order of how much the layer changes its input, as far as each can go after the others.

    Args:
        change: 1 - cosine, ``[layers]``.
    """
    order: list[Removal] = []
    for removal in sorted(wanted, key=lambda removal: float(change[removal[0]])):
        if not why_not(architecture, [*order, removal]):
            order.append(removal)
    return order


@dataclass
class Joint:
    """A joint order while it is being found: what goes next is decided by what was measured without all before.

    Attributes:
        wanted: the removals that the order is made of.
        most: how many of them a step measures at most, after the first; None: all that are left.
        gone: the order so far.
        found: for each step the divergence of every sequence, ``[sequences]``, nats per token.
        single: the mean divergence without each removal alone.
    """

    architecture: Architecture
    wanted: Sequence[Removal]
    most: int | None = None
    gone: list[Removal] = field(default_factory=list)
    found: list[Float[np.ndarray, " sequences"]] = field(default_factory=list)
    single: dict[Removal, float] = field(default_factory=dict)
    _added: dict[Removal, float] = field(default_factory=dict)

    def next(self) -> list[Removal]:
        """The removals that the next step measures; none once nothing more can go."""
        left = [one for one in self.wanted if one not in self.gone]
        left = [one for one in left if not why_not(self.architecture, [*self.gone, one])]
        if not self.gone or self.most is None:
            return left
        least = sorted(left, key=lambda removal: self._added[removal])[: self.most]
        return [one for one in left if one in least]

    def take(self, measured: Sequence[Removal], divergences: Float[np.ndarray, "removals sequences"]) -> None:
        """Take the one of least mean divergence away; of equals the first.

        Args:
            measured: what `next` has given.
            divergences: without each of them and all that is gone, nats per token.
        """
        means = divergences.mean(1)
        before = float(self.found[-1].mean()) if self.found else 0.0
        if not self.gone:
            self.single = dict(zip(measured, means.tolist(), strict=True))
        self._added |= {one: float(mean) - before for one, mean in zip(measured, means, strict=True)}
        best = int(means.argmin())
        self.gone.append(measured[best])
        self.found.append(divergences[best])


def _measure_jointly(run: "Calibration", work: "Collection[Any]", joint: Joint, slots: int, steps: int) -> None:
    """Find a joint order; what the sums hold already is not measured again.

    Every step has as many rows in the sums as the first one needs, rounded up to a multiple of the processes. So all
    processes come to the end of a step together, and tell each other what they have measured.
    """
    import torch

    from libprune.engine.surgery import masked
    from libprune.models.compute import require_finite
    from libprune.statistics.divergence import Divergence
    from libprune.statistics.losses import LOSSES, Prefix

    model, architecture, world = run.model, run.architecture, run.world
    sequences, divergence = run.sequences.to(run.device), Divergence(run.model)
    rows = work.accumulator.state(0, LOSSES)["rows"]
    dense = Prefix(model, architecture, sequences, run.at_once, [], divergence)
    require_finite(dense.losses, run.first, "the divergence of the dense model")

    def close_steps(until: int) -> None:
        while len(joint.gone) < until and (measured := joint.next()):
            first = len(joint.gone) * slots
            own = rows[first : first + len(measured)].numpy()
            joint.take(measured, np.sum(world.gathered(own), axis=0))

    for step, numbers in groupby(work.steps(), key=lambda number: number // slots):
        close_steps(step)
        measured = joint.next() if len(joint.gone) == step else []
        layers = [layer for layer, _ in measured]
        with masked(model, architecture, plan_without(architecture, joint.gone)):
            prefix = Prefix(model, architecture, sequences, run.at_once, layers, divergence) if measured else dense
            for number in numbers:
                index = number % slots
                if index - index % world.size >= len(measured):
                    continue  # no process has one left in this round
                removal = measured[min(index, len(measured) - 1)]
                values = prefix.losses_of(plan_without(architecture, [removal]))
                require_finite(values, run.first, f"the divergence without {name_of(removal)} in step {step + 1}")
                work.accumulator.update(0, LOSSES, values, torch.tensor(number))
    close_steps(steps)


def name_of(removal: Removal) -> str:
    """A removal in words."""
    layer, what = removal
    return f"layer {layer}" if what == LAYER else f"the {what} of layer {layer}"


def print_depth(table: Columns) -> None:
    """Print the order with the divergence after each step."""
    note(f"{'step':>5} {'removed':<28}{'divergence':>12}{'± error':>10}{'alone':>10}{'1 - cosine':>12}")
    columns = ("step", *KEYS, "standard_error", "single_divergence", "change")
    for step, layer, what, *values in zip(*(table[key].tolist() for key in columns), strict=True):
        divergence, error, single, change = values
        note(f"{step:>5} {name_of((layer, what)):<28}{divergence:>12.4f}{error:>10.4f}{single:>10.4f}{change:>12.4f}")
