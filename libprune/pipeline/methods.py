"""What can be chosen: a record of every allocation method and of every repair.

A record says what the method computes, which artifacts it reads and what it demands of the scores. Stages that have
nothing to do without a method, the price of a setting, and the messages that refuse a setting all read these records.
They lie here, and name their functions by text, because stages that measure nothing must not load, nor depend on, the
code of allocation and repair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from libprune.pipeline.sections import ORDERS


@dataclass(frozen=True)
class Method:
    """How an allocation decides how many units each block loses.

    Attributes:
        function: module and name of what computes the depths, `libprune.allocation.methods.Allocation`.
        computes: what it does, for the reader.
        source: where the method comes from.
        reads: artifacts that it needs beside the scores: `activations`, `sensitivity`, `levels`.
        between: whether it ranks the scores of different blocks against each other, for which they must compare.
        scalings: values of `score.scaling` that make scores comparable enough for it, if it ranks between blocks.
        weighs: whether it decides what blocks are worth by measurements of its own.
        alike: whether all layers lose the same number of units.
        rival: whether a search also measures this method's plan, to start from it.
        improves: whether it can go on by measuring whole plans (`allocate.evaluations`).
        finds_ratio: whether it can say how much may go where `allocate.ratio` is null.
        collapses: whether it can remove whole layers first (`allocate.collapse_below`).
        modules: whether networks that are not transformers have it.
        programme: whether an integer programme chooses, which knows several budgets (`allocate.budgets`).
        splits: whether it divides a budget between the parts as `allocate.split` says.
    """

    function: str
    computes: str
    source: str
    reads: tuple[str, ...] = ()
    between: bool = False
    scalings: tuple[str, ...] = ("zscore", "minmax", "rank")
    weighs: bool = False
    alike: bool = False
    rival: bool = False
    improves: bool = False
    finds_ratio: bool = False
    collapses: bool = False
    modules: bool = False
    programme: bool = False
    splits: bool = False

    @property
    def allocate(self) -> Callable[..., Any]:
        """The function that computes the depths, loaded by its name."""
        return load(self.function)


METHODS: dict[str, Method] = {
    "functional": Method(
        "libprune.allocation.methods:allocate_functional",
        computes="layers that change their input less lose more",
        source="FANG, functional allocation",
        reads=("activations",),
        rival=True,
        splits=True,
    ),
    "global": Method(
        "libprune.allocation.methods:allocate_global",
        computes="the lowest scores of all layers go",
        source="Molchanov et al. 2019, one ranking of all units",
        between=True,
        rival=True,
        modules=True,
    ),
    "uniform": Method(
        "libprune.allocation.methods:allocate_uniform",
        computes="every layer loses the same number of units",
        source="the plain case, as Wanda-sp in An et al. 2024",
        alike=True,
        rival=True,
        modules=True,
        splits=True,
    ),
    "retention": Method(
        "libprune.allocation.methods:allocate_retention",
        computes="blocks whose importance lies in few units lose more",
        source="conventions, see libprune.allocation.retention",
        finds_ratio=True,
        modules=True,
    ),
    "hgsp": Method(
        "libprune.allocation.methods:allocate_hgsp",
        computes="the lowest scores of all layers go, weighed by the measured loss of their layer or block",
        source="H-GSP, hierarchical global structured pruning",
        reads=("sensitivity",),
        between=True,
        scalings=("rank",),
        weighs=True,
        collapses=True,
    ),
    "search": Method(
        "libprune.allocation.methods:allocate_search",
        computes="the least measured divergence of whole levels of blocks, then of whole plans",
        source="EvoPress, Sieberling et al. 2024; Tyr-the-Pruner, Li et al. 2025",
        reads=("levels",),
        weighs=True,
        improves=True,
        programme=True,
    ),
}
"""The allocation methods by their value of `allocate.method`. The plans that a search starts from are measured in this
order."""

WORTH_READS: dict[str, tuple[str, ...]] = {
    "none": (),
    "functional": ("activations",),
    "sensitivity": ("sensitivity",),
}
"""The artifacts that each value of `allocate.worth` reads."""


RIVALS = tuple(name for name, method in METHODS.items() if method.rival)
"""Methods whose plans a search measures first; what they read beside the scores comes from one forward pass."""


def allocation_reads(
    method: str, worth: str = "none", times: bool = False, evaluations: int = 0, depth: str = "none"
) -> tuple[str, ...]:
    """The artifacts that allocation needs beside the scores, in alphabetical order.

    Args:
        method: `allocate.method`.
        worth: `allocate.worth`.
        times: whether `allocate.objective` or a budget is a time.
        evaluations: `allocate.evaluations`; with some, a search also needs what the methods of `RIVALS` read.
        depth: `allocate.depth`.
    """
    ordered = ("depth",) if depth in ORDERS else ()
    timed = ("latency",) if times else ()
    searches = METHODS[method].improves and evaluations
    rivals = [artifact for name in RIVALS for artifact in METHODS[name].reads] if searches else []
    return tuple(sorted({*METHODS[method].reads, *WORTH_READS[worth], *timed, *ordered, *rivals}))


def methods_that_read(artifact: str) -> str:
    """The names of the allocation methods that need an artifact, for a sentence."""
    return " or ".join(name for name, method in METHODS.items() if artifact in method.reads)


@dataclass(frozen=True)
class Repair:
    """How the weights that stay are changed to make up for what goes.

    Attributes:
        function: module and name of what computes the fits, `libprune.repair.repairs.Repairing`; None for no repair.
        computes: what it does, for the reader.
        source: where the method comes from.
        reads: artifacts that it needs beside the plan and the dense weights.
        params: keys of the section `slice` that mean something to it.
        layer_by_layer: whether it runs the pruned model on a text, and fits each layer on the outputs of those before
            it. Such a repair fits what lies behind a whole layer or part that is gone; with others, that is rescaled.
    """

    function: str | None
    computes: str
    source: str
    reads: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    layer_by_layer: bool = False

    @property
    def repair(self) -> Callable[..., Any]:
        """The function that computes the fits, loaded by its name; for `none`, one that gives none."""
        return load(self.function) if self.function else lambda *_: []


REPAIRS: dict[str, Repair] = {
    "none": Repair(None, computes="weights stay as they are", source=""),
    "bias": Repair(
        "libprune.repair.repairs:bias_fits",
        computes="the mean of what a consumer no longer reads goes into its bias",
        source="An et al. 2024, FLAP",
        reads=("activations",),
    ),
    "local": Repair(
        "libprune.repair.repairs:local_fits",
        computes="least squares on each consumer's weights, from Gram matrices of the dense model's inputs",
        source="Frantar & Alistarh 2022, structured optimal brain compression",
        reads=("activations",),
        params=("damping", "fisher_share"),
    ),
    "sequential": Repair(
        "libprune.repair.repairs:sequential_fits",
        computes="least squares layer by layer, on what the pruned layers before hand on",
        source="Frantar & Alistarh 2022, on the inputs of the pruned model",
        params=("damping", "drift", "drift_cap", "producer_steps", "sequences"),
        layer_by_layer=True,
    ),
    "block": Repair(
        "libprune.repair.repairs:block_fits",
        computes="as `local`, then all weights of each layer by gradient steps, to give the dense layer's output",
        source="Li et al. 2021, BRECQ, on the inputs of the pruned model",
        reads=("activations",),
        params=("damping", "drift", "drift_cap", "sequences", "block_epochs", "block_rate", "block_ahead"),
        layer_by_layer=True,
    ),
}
"""The repairs by their value of `slice.repair`."""


def load(function: str) -> Callable[..., Any]:
    """The function that a record names as `module:name`."""
    loaded: Callable[..., Any] = resolve_name(function)
    return loaded
