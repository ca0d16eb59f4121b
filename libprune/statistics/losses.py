"""Losses of a model that is changed from some layer on, without running the layers before it again.

Everything before the first changed layer computes what it computes in the unchanged model. So what
the layers before chosen layers return is kept from one run, and a measurement runs only from its
layer to the end. Cost: from layer l of N, (N - l) / N of the layers, and the head; averaged over
changes spread evenly over the layers, about half of changes x passes over the text.

Memory, on the host: sequences x length x width of the model x kept layers x bytes of the model's dtype.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.collection.calibration import Calibration
from libprune.collection.records import Field, State, Statistic
from libprune.collection.resumable import Collection, collecting
from libprune.engine.architecture import Architecture
from libprune.engine.plan import Plan
from libprune.engine.surgery import hooked, masked
from libprune.models.compute import require_finite, sequence_losses
from libprune.models.layers import copy_output, layers_of, replaced, skipped
from libprune.models.sequences import Sequences
from libprune.pipeline.terminal import gigabytes, note
from libprune.statistics.divergence import Divergence

LOSSES = "losses"
"""The name of `SequenceLosses` among the statistics."""

Measure = Callable[[int, Sequences], Tensor]
"""From the number of a pass and its sequences to a value for each sequence."""


class Prefix:
    """What the layers before chosen layers return, kept from one run of a model over a text.

    It holds for models whose layers hand nothing to later layers but what they return, and units
    that these use, behind which no layer's input is kept. The model may be masked when this is
    made, and changed further afterwards.

    Attributes:
        losses: the model's mean-token loss of every sequence, ``[sequences]``, nats, float64.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        sequences: Sequences,
        at_once: int,
        layers: Iterable[int],
        measure: Measure | None = None,
    ) -> None:
        """Run the model over the text once.

        Args:
            sequences: on the model's device.
            at_once: sequences in one pass.
            layers: those that measurements will start from; nothing needs to be kept for the first.
            measure: gives the value of each sequence; None for the mean-token loss, in nats, and of a model that gives
                embeddings for their distance. Its first call for each pass is on the model as it is now.
        """
        self._model, self._architecture = model, architecture
        self._layers = layers_of(model, architecture)
        self._passes = list(sequences.passes(at_once))
        self._measure = measure or _loss_of(model, sequences)
        read = (layer for part in architecture.parts for layer in architecture.read(part))
        first_read = min(read, default=architecture.layers)  # what later layers read of it must be computed
        self._kept: dict[int, list[Any]] = {layer: [] for layer in layers if 0 < layer <= first_read}
        with hooked(model) as handles:
            for layer, outputs in self._kept.items():
                handles.append(self._layers[layer - 1].register_forward_hook(partial(_keep_output, outputs)))
            self.losses = self.losses_from(0)

    def losses_of(self, plan: Plan) -> Float[Tensor, " sequences"]:
        """Losses of the model masked by a plan, ``[sequences]``, nats, float64."""
        first = first_changed(plan)
        if first is None:
            return self.losses
        with masked(self._model, self._architecture, plan):
            return self.losses_from(first)

    def losses_from(self, layer: int) -> Float[Tensor, " sequences"]:
        """Losses of the model as it is now, changed in no layer before the given one, ``[sequences]``, nats, float64.

        Runs from the nearest layer, at or before the given one, whose input was kept.
        """
        start = max((kept for kept in self._kept if kept <= layer), default=0)
        with torch.no_grad():
            return torch.cat([self._pass(start, number) for number in range(len(self._passes))])

    def _pass(self, start: int, number: int) -> Float[Tensor, " batch"]:
        sequences = self._passes[number]
        if start == 0:
            return self._measure(number, sequences).double().cpu()
        with skipped(self._layers[:start], self._kept[start][number], sequences.ids.device):
            return self._measure(number, sequences).double().cpu()


def _loss_of(model: PreTrainedModel, sequences: Sequences) -> Measure:
    """The loss by which changes are measured: of an embedding its distance from that of the model as it is now."""
    if sequences.pooling is not None:
        return Divergence(model)
    return lambda number, batch: sequence_losses(model, batch)


def first_changed(plan: Plan) -> int | None:
    """The first layer that a plan removes something from; None if it keeps everything."""
    if plan.width is not None:
        return 0
    return min((layer for (layer, _), keep in plan.keep.items() if not keep.all()), default=None)


def _keep_output(outputs: list[Any], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a layer that keeps a copy of its output on the host."""
    outputs.append(copy_output(output, "cpu"))


@dataclass(frozen=True)
class SequenceLosses(Statistic):
    """The loss of every sequence under each of several changes of a model, nats."""

    changes: int
    sequences: int

    @property
    def fields(self) -> Mapping[str, Field]:
        """The table ``[changes, sequences]`` on the host, whose rows are 0 until their change is measured."""
        return {"rows": Field((self.changes, self.sequences), host=True)}

    def measure(self, *batch: Tensor) -> State:
        """The state that holds the losses ``[sequences]`` of one change, given with its number."""
        state = self.init()
        self.update(state, *batch)
        return state

    def update(self, state: State, *batch: Tensor) -> None:
        """Add one change's losses."""
        losses, number = batch
        state["rows"][int(number)] += losses

    def finish(self, state: State) -> dict[str, Tensor]:
        """All losses, ``[changes, sequences]``, nats."""
        return {"": state["rows"]}


@dataclass(frozen=True)
class Losses:
    """What every sequence loses under each of several changes of a model, and without any; float64.

    Attributes:
        changed: one row a change, ``[changes, sequences]``, nats per token, or what else was measured.
        dense: the same number for the dense model, ``[sequences]``.
    """

    changed: Float[np.ndarray, "changes sequences"]
    dense: Float[np.ndarray, " sequences"]


@contextmanager
def measuring(
    run: Calibration,
    stage: str,
    target: Path,
    plans: Mapping[str, Plan],
    identity: Mapping[str, Any],
    measure: Measure | None = None,
    weights_of: Callable[[str], Mapping[str, Tensor]] = lambda name: {},
    rooms: Sequence[str] = (),
) -> Iterator[Losses | None]:
    """Measure the losses under every plan, going on where a killed run of the same stage stopped.

    The context is for writing the result: only when it ends are the saved losses removed.

    Args:
        target: the artifact that will be written.
        plans: what is removed, by a name for messages.
        identity: what the losses depend on beside the model, the text and the number of its sequences.
        measure: what is measured, if not the loss; see `Prefix`.
        weights_of: weights that take the place of the model's own under the plan of a name.
        rooms: packages of libprune, beside those that every collecting stage runs, whose code is used.

    Yields:
        The losses, in the first process; None in the others.

    Raises:
        StatisticsError: naming the plan and the sequence whose loss is not finite.
    """
    sequences = run.sequences
    groups = [{LOSSES: SequenceLosses(len(plans), len(sequences))}]
    identity = {**identity, "sequences": len(sequences)}
    with collecting(run, stage, target, groups, 1, identity, len(plans), sequences.tokens, rooms) as work:
        dense = _add_losses(run, work, plans, measure, weights_of)
        first = work.merge()
        yield Losses(work.accumulator.finish(0)[LOSSES].numpy(), dense.numpy()) if first else None


def _add_losses(
    run: Calibration,
    work: Collection,
    plans: Mapping[str, Plan],
    measure: Measure | None,
    weights_of: Callable[[str], Mapping[str, Tensor]],
) -> Float[Tensor, " sequences"]:
    """Add the losses under every plan that the sums do not hold yet, and return those of the dense model."""
    names = list(plans)
    left = names[work.accumulator.done * run.world.size + run.world.rank :: run.world.size]
    layers = {first_changed(plans[name]) or 0 for name in left}
    sequences = run.sequences.to(run.device)
    _announce_states(run, layers)
    prefix = Prefix(run.model, run.architecture, sequences, run.at_once, layers, measure)
    require_finite(prefix.losses, run.first, "the loss of the dense model")
    for number in work.steps():
        with replaced(run.model, weights_of(names[number])):
            losses = prefix.losses_of(plans[names[number]])
        require_finite(losses, run.first, f"the loss without {names[number]}")
        work.accumulator.update(0, LOSSES, losses, torch.tensor(number))
    return prefix.losses


def _announce_states(run: Calibration, layers: set[int]) -> None:
    width, each = run.architecture.sizes["model"], next(run.model.parameters()).element_size()
    size = len(layers - {0}) * run.sequences.tokens * width * each
    if run.world.first:
        note(f"states before {len(layers)} layers are kept in {gigabytes(size)} of memory")
