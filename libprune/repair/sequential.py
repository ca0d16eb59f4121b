"""Sequential repair: every consumer fitted to what the pruned and repaired layers before it hand on.

Two streams of hidden states go through the model layer by layer: h of the dense model, and h^ of the
pruned one. A consumer's new weights see the pruned stream's inputs, and their target is not only what
the dense consumer gave but also the drift that the layers before it have left in the residual stream:

    y = W x + drift (h - h^) / c,   W' = argmin E|y - W' x^_K|^2 + lambda |(W' - W_K) D^1/2|^2

c is what the layer multiplies the consumer's output by before it adds it to the stream: 1 in most models, and measured
on the dense one. A layer that does more with it, such as a norm, takes no drift back.

A few tokens, often the first of a sequence, have a drift that is hundreds of times larger than that of the others. It
is small beside their states, and no later layer can predict it. In squares it outweighs all other tokens; so each
token's drift is cut (`libprune.repair.drift`). What the dense consumer gave is not cut: later layers need these states.

Where each unit depends on its own token alone, what computes the units can be fitted too: `libprune.repair.producers`.
All weights of a layer can be trained after its fits, before the next layer begins: `libprune.repair.trained_layers`.
The experts of a mixture are fitted together, on the tokens that the pruned router sends them; see
`libprune.repair.experts`.

Cost for each layer: the layer once in the dense model; in the pruned one the layer once, and once
more up to every consumer after the first. Memory on the host: four times the hidden states of the
text, six times where the training of a layer looks ahead, and the inputs of one consumer; with producers
also what `libprune.repair.producers.Flow` holds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from libprune.collection.stream_axes import Narrowed
from libprune.collection.stream_norms import watch_norms
from libprune.engine.architecture import Architecture, Map
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import hooked, masked, oriented
from libprune.models.layers import first_output, set_parameters, values_of
from libprune.models.memory import Keep, in_memory
from libprune.repair.drift import capped, factors_of
from libprune.repair.experts import Rows, fit_experts
from libprune.repair.least_squares import (
    Fit,
    Moments,
    fit_consumer,
    fit_place,
    new_parameters,
    pruned_consumers,
    waiting,
)
from libprune.repair.producers import (
    Flow,
    Producer,
    changed_weight,
    fit_producers,
    outputs_as_leaves,
    producers_of,
    slopes_of,
)
from libprune.repair.streams import Batch, Streams
from libprune.repair.trained_layers import LayerTraining, Training


class SequentialRepair:
    """The repair of a model, layer by layer, on what a text makes of the dense and of the pruned model.

    Call `step` for every layer in turn. The model's consumers get their new weights as it goes, so
    that under the plan's mask it is the repaired model in the end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        plan: Plan,
        batches: Sequence[Batch],
        damping: float | None,
        drift: float | None = None,
        cap: float | None = None,
        steps: int = 0,
        own_inputs: bool = False,
        narrow: Narrowed | None = None,
        training: Training | None = None,
        keep: Keep = in_memory,
    ) -> None:
        """Begin before the first layer.

        Args:
            model: the dense model, on its device; its consumers' weights will be changed.
            plan: what is removed.
            batches: the text.
            damping: as in `libprune.repair.least_squares.fit_consumer`.
            drift: how much of the drift each consumer takes back, 1 for all of it; None: all of it in layers that only
                add what their consumers give to the residual stream, nothing in others.
            cap: the longest drift of a token, in medians over the tokens of its sequence; None for no limit.
            steps: as in `libprune.repair.producers.fit_producers`, of parts where that can be; 0: what computes units
                stays.
            own_inputs: fit only mixtures that lose experts, each on what the dense model gives it: `local` repair.
            narrow: the weights for a narrower residual stream, along whose axes the model lies; what reads the stream
                gets them, and every consumer is fitted. None where the plan leaves the stream as wide as it is.
            training: how all weights of a layer with fits are trained after them; the fits that it gives are taken as
                they are. None: no layer is trained.
            keep: puts what waits on the host, such as states and new weights, where it takes no memory.

        Raises:
            LibpruneError: if layers are to be trained, and no sequence is held out to judge them by.
        """
        self._keep = keep
        self._own_inputs, self._narrow = own_inputs, narrow
        self._model, self._architecture, self._plan = model, architecture, plan
        self._batches, self._damping, self._drift, self._cap, self._steps = batches, damping, drift, cap, steps
        self._kept = {c.module: kept for c, kept in _fitted_consumers(architecture, plan, own_inputs)}
        self._streams = Streams(model, architecture, batches, keep)
        self._given = {} if training is None else training.given
        self._training = None
        if training is not None:
            self._training = LayerTraining(self._streams, plan, training, self._kept, keep)

    def step(self, layer: int, known: Mapping[str, Tensor] | None = None) -> list[Fit]:
        """Repair one layer and take both streams through it.

        Args:
            layer: which; each in turn.
            known: new weights of this layer's consumers by name, from an earlier run that was interrupted; they
                are taken as they are.

        Returns:
            A fit for every consumer that the plan prunes; none for known ones.

        Raises:
            LibpruneError: if the drift is to be taken back, and the layers of this architecture do more
                with what a consumer gives than to add it to the residual stream.
        """
        streams, consumers = self._streams, self._architecture.consumers_in(layer)
        streams.begin(layer)
        modules = [self._model.get_submodule(consumer.module) for consumer in consumers]
        self._scales = list[dict[str, Tensor]]()
        with hooked(self._model) as handles:
            handles += watch_norms(self._model, self._architecture, layer, self._keep_scale)
            ran = [self._run_dense(layer, number, modules) for number in range(len(self._batches))]
        after, outputs = [state for state, _ in ran], [given for _, given in ran]
        factors = factors_of(streams.dense[0], after[0], outputs[0])
        drift = float(factors is not None) if self._drift is None else self._drift
        if drift and factors is None:
            raise LibpruneError(
                f"slice.drift takes back what is left in the residual stream, but {self._architecture.layers_path}."
                f"{layer} does more with the outputs of {consumers[0].module} than to add them, or a multiple; set "
                "slice.drift to auto"
            )
        fitted = known is None and any(consumer.module in self._kept for consumer in consumers)
        training = self._training if fitted else None
        ahead = None if training is None else training.ahead(layer, after)
        multiples, fits = factors or (1.0,) * len(consumers), list[Fit]()
        states: list[Tensor] | None = None
        with masked(self._model, self._architecture, self._plan):
            self._set({} if self._narrow is None else self._narrow.of_layer(layer))
            self._set(known or {})
            for index, consumer in enumerate(consumers if known is None else []):
                states = None
                if consumer.module in self._given:
                    fits.append(self._given[consumer.module])
                    self._set(new_parameters(fits[-1:]))
                elif consumer.module in self._kept:
                    refit = self._refit_stack if consumer.stack else self._refit
                    fit, states = refit(layer, consumers, index, outputs, drift, multiples)
                    fits.append(fit)
            if training is not None:
                fits, states = training.train(layer, fits, after, ahead), None
            if states is None or factors is None or not streams.gives(layer, states[0]):
                states = streams.behind(layer)  # as where the weights of this layer are known beforehand
        streams.go_on(after, after if self._own_inputs else states)
        return [waiting(fit, self._keep) for fit in fits]

    def _set(self, tensors: Mapping[str, Tensor]) -> None:
        set_parameters(self._model, tensors, self._keep)

    def _run_dense(self, layer: int, number: int, watched: Sequence[nn.Module]) -> tuple[Tensor, list[Tensor]]:
        """The stream behind a layer of the dense model and the outputs of modules in it, for a batch, on the host."""
        self._scales.append({})
        state, given = self._streams.run(layer, number, watched, dense=True)
        return self._streams.wait(first_output(state)), [self._streams.wait(output) for output in given]

    def _keep_scale(self, consumer: Map, x: Tensor, scale: Tensor) -> None:
        """Keep by how much the norm behind a consumer divides each token of the batch that runs."""
        self._scales[-1][consumer.module] = scale.cpu()

    @torch.no_grad()
    def _refit(
        self,
        layer: int,
        consumers: Sequence[Map],
        index: int,
        outputs: Sequence[Sequence[Tensor]],
        share: float,
        factors: Sequence[float],
    ) -> tuple[Fit, list[Tensor]]:
        """Fit one consumer and set its weights; also the residual stream behind it, for every batch."""
        consumer = consumers[index]
        module = self._model.get_submodule(consumer.module)
        kept = self._kept[consumer.module]
        # without held-out text nothing says where a fit ends and noise begins
        any_held_out = any(batch.held_out for batch in self._batches)
        producers = producers_of(self._architecture, consumer, kept) if self._steps and any_held_out else ()
        seen: Sequence[_Seen] = [
            self._see(layer, number, consumers[: index + 1], outputs[number], share, factors, producers)
            for number in range(len(self._batches))
        ]
        weight = oriented(consumer, module.get_parameter("weight").detach()).float().cpu()
        fit = None
        if all(batch.slopes for batch in seen):
            fit, seen = self._fit_producers(layer, consumer, weight, seen, producers)
        trains = self._training is not None  # held-out sequences judge a training, and no fit before it may see them
        fit = fit or self._fit(consumer, weight, seen, refit=not trains)
        self._set(new_parameters([fit]))
        device = module.get_parameter("weight").device
        return fit, [
            self._streams.wait(batch.pruned.to(device) + factors[index] * module(batch.x.to(device))) for batch in seen
        ]

    @torch.no_grad()
    def _refit_stack(
        self,
        layer: int,
        consumers: Sequence[Map],
        index: int,
        outputs: Sequence[Sequence[Tensor]],
        share: float,
        factors: Sequence[float],
    ) -> tuple[Fit, list[Tensor]]:
        """Fit the experts of a mixture and set their weights; also the residual stream behind them, for every batch."""
        consumer, kept = consumers[index], self._kept[consumers[index].module]
        *before, module = (self._model.get_submodule(c.module) for c in consumers[: index + 1])
        like = self._model.get_parameter(consumer.weight).detach()
        stays = kept.view(consumer.copies(self._architecture.sizes), -1).to(like.device)
        wait, batches, routes, streams = self._streams.wait, [], [], []
        for number, batch in enumerate(self._batches):
            (x, routing), given = self._streams.run(layer, number, before, until=module)
            pruned, drift = self._drifted(number, given, outputs[number], factors)
            x = x.masked_fill(~stays[routing.experts], 0)
            target = outputs[number][index].to(drift.device).float() + share / factors[index] * drift
            target = target.flatten(0, -2) - module(torch.zeros_like(x), routing).float()
            rows = (wait(x), routing.tokens.cpu(), routing.counts, wait(target))
            batches.append(Rows(*rows, batch.held_out))
            routes.append(routing)
            streams.append(wait(pruned))
        weight = oriented(consumer, like.float()).cpu()
        fit = fit_experts(consumer, weight, kept, batches, self._damping, like.device, like)
        self._set(new_parameters([fit]))
        states = [
            wait(stream.to(like.device) + factors[index] * module(rows.x.to(like), routing).view_as(stream))
            for stream, rows, routing in zip(streams, batches, routes, strict=True)
        ]
        return fit, states

    def _see(
        self,
        layer: int,
        number: int,
        consumers: Sequence[Map],
        outputs: Sequence[Tensor],
        share: float,
        factors: Sequence[float],
        producers: Sequence[Producer],
    ) -> "_Seen":
        """Run a batch up to the last of some consumers; record what this one gets and should give."""
        *before, module = (self._model.get_submodule(consumer.module) for consumer in consumers)
        with outputs_as_leaves(self._model, producers) as watched:
            x, given = self._streams.run(layer, number, before, until=module, differentiable=bool(producers))
        with torch.enable_grad():
            slopes = slopes_of(x[..., self._kept[consumers[-1].module]], producers, watched) if producers else ()
        x, given = x.detach(), [output.detach() for output in given]
        pruned, drift = self._drifted(number, given, outputs, factors)
        own = _without_bias(module, outputs[len(given)].to(drift.device))
        y = own.float() + share / factors[len(given)] * drift
        inputs = tuple(watched[producer.entry.module][0].flatten(0, -2) for producer in producers if slopes)
        wait = self._streams.wait
        return _Seen(wait(x), wait(y), wait(pruned), tuple(map(wait, inputs)), tuple(map(wait, slopes)))

    def _drifted(
        self, number: int, given: Sequence[Tensor], outputs: Sequence[Tensor], factors: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """The pruned stream of a batch behind some consumers of a layer, and what it lacks of the dense one, cut.

        Args:
            number: of the batch.
            given: what these consumers gave in the pruned model.
            outputs: what they and those behind them gave in the dense model.
            factors: as of `factors_of`.
        """
        device = self._batches[number].ids.device
        pruned, dense = self._streams.pruned[number].to(device), self._streams.dense[number].to(device)
        for factor, now, then in zip(factors, given, outputs, strict=False):
            pruned, dense = pruned + factor * now, dense + factor * then.to(device)
        return pruned, capped(dense.float() - pruned.float(), self._cap)

    def _fit_producers(
        self, layer: int, consumer: Map, weight: Tensor, seen: Sequence["_Seen"], producers: Sequence[Producer]
    ) -> tuple[Fit | None, Sequence["_Seen"]]:
        """Fit what computes a consumer's inputs, and the consumer again; no fit where that is no better."""
        kept, module = self._kept[consumer.module], self._model.get_submodule(consumer.module)
        first = self._fit(consumer, weight, seen, refit=False)
        assert first.weight is not None
        fitted = oriented(consumer, first.weight)
        used = fitted[:, kept].to(module.get_parameter("weight"))
        flows = [
            Flow(pair.inputs, pair.slopes, _missed(pair, kept, used), batch.held_out)
            for batch, pair in zip(self._batches, seen, strict=True)
        ]
        change = fit_producers(flows, used, self._steps)
        del flows
        if not change.steps:
            return None, seen
        old = values_of(self._model, [producer.entry.weight for producer in producers])
        new = {
            producer.entry.weight: changed_weight(producer, old[producer.entry.weight], rows)
            for producer, rows in zip(producers, change.rows, strict=True)
        }
        self._set(new)
        numbers = range(len(self._batches))
        inputs = [self._streams.wait(self._streams.run(layer, number, until=module)[0]) for number in numbers]
        moved = [replace(pair, x=x, inputs=(), slopes=()) for pair, x in zip(seen, inputs, strict=True)]
        second = self._fit(consumer, fitted, moved, refit=True)
        if not second.held_out_after < first.held_out_after:
            self._set(old)
            return None, seen
        fit = replace(
            second,
            before=first.before,
            held_out_before=first.held_out_before,
            others={name: tensor.cpu() for name, tensor in new.items()},
        )
        return fit, moved

    def _fit(self, consumer: Map, weight: Tensor, seen: Sequence["_Seen"], refit: bool) -> Fit:
        kept = self._kept[consumer.module]
        sums = {flag: _Sums() for flag in (False, True)}
        for batch, pair, scales in zip(self._batches, seen, self._scales, strict=True):
            x, y = pair.x[..., kept].float(), pair.y
            if consumer.module in scales:
                x, y = (one * scales[consumer.module] for one in (x, y))
            sums[batch.held_out].add(x.to(batch.ids.device), y.to(batch.ids.device))
        fitted = sums[False].finish()
        place = fitted.gram.device
        kept_out = sums[True].finish(place) if sums[True].tokens else None
        return fit_consumer(consumer, weight.to(place), kept.to(place), fitted, kept_out, self._damping, refit)


def behind_what_is_gone(architecture: Architecture, plan: Plan) -> frozenset[str]:
    """The modules of the consumers in or behind the first part that is gone as a whole."""
    found, gone = set[str](), False
    for layer in range(architecture.layers):
        for part in architecture.parts_of(layer):
            gone |= plan.gone(layer, part)
            found |= {consumer.module for consumer in architecture.consumers(layer, part)} if gone else set()
    return frozenset(found)


def _fitted_consumers(
    architecture: Architecture, plan: Plan, own_inputs: bool
) -> Iterator[tuple[Map, Bool[Tensor, " input"]]]:
    """The consumers that are fitted, with the input positions that stay.

    Beside those that lose inputs these are the ones behind what is gone, which can give some of what it gave: behind a
    whole part or layer all of them, and in a layer whose mixture loses experts those of the later parts, such as a
    shared expert. Where the residual stream is narrower these are all but those of mixtures.
    """
    behind_gap = behind_what_is_gone(architecture, plan)
    pruned = {consumer.module: (consumer, kept) for consumer, kept in pruned_consumers(architecture, plan)}
    for layer in range(architecture.layers):
        parts = architecture.parts_of(layer)
        routed = [part for part in parts if architecture.parts[part].router and not plan.keep[layer, part].all()]
        behind = {part for part in parts if routed and parts.index(part) >= parts.index(routed[0])}
        for part in parts:
            for consumer in architecture.consumers(layer, part):
                drifted = plan.width is not None or consumer.module in behind_gap
                stays = (drifted and not consumer.stack) or (part in behind and part not in routed)
                if consumer.module in pruned and (consumer.part in routed or not own_inputs):
                    yield pruned.pop(consumer.module)
                elif stays and not own_inputs and not plan.gone(layer, part):
                    yield consumer, torch.ones(consumer.input.size(architecture.sizes), dtype=torch.bool)


@dataclass(frozen=True)
class _Seen:
    """What a batch shows of one consumer; on the host.

    Attributes:
        x: its inputs in the pruned model.
        y: what it is to give.
        pruned: the residual stream that its output is added to.
        inputs: of each map that computes x, ``[tokens, input]``.
        slopes: as of `libprune.repair.producers.slopes_of`; empty where these are not fitted.
    """

    x: Float[Tensor, "batch length input"]
    y: Float[Tensor, "batch length output"]
    pruned: Float[Tensor, "batch length model"]
    inputs: tuple[Tensor, ...]
    slopes: tuple[Tensor, ...]


def _missed(
    seen: _Seen, kept: Bool[Tensor, " input"], weight: Float[Tensor, "output kept"]
) -> Float[Tensor, "tokens output"]:
    """What weights leave of the target, float32, on the host."""
    x = seen.x[..., kept].to(weight.device).flatten(0, -2)
    return seen.y.flatten(0, -2) - (x.float() @ weight.float().T).cpu()


class _Sums:
    """Sums of products over batches; float32 on the device, as the products of a batch are."""

    def __init__(self) -> None:
        self.gram: Any = 0
        self.cross: Any = 0
        self.square: Any = 0.0
        self.tokens = 0

    def add(self, x: Float[Tensor, "*batch kept"], y: Float[Tensor, "*batch output"]) -> None:
        """Add the tokens of a batch."""
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        self.gram += x.T @ x
        self.cross += y.T @ x
        self.square = self.square + y.square().sum().double()
        self.tokens += len(x)

    def finish(self, place: torch.device | None = None) -> Moments:
        """Means per token, on a device; None: where the sums are, if a fit has room there, or else on the CPU."""
        place = place or fit_place(self.gram.device, self.gram)
        gram, cross = (total.to(place).double() / self.tokens for total in (self.gram, self.cross))
        return Moments(gram, cross, float(self.square) / self.tokens, self.tokens)


def _without_bias(module: nn.Module, output: Tensor) -> Tensor:
    bias = getattr(module, "bias", None)
    return output if bias is None else output - bias
