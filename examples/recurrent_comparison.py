"""Pruning of a trained recurrent language model by one importance of its units after another."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from examples.byte_text import Parts, streams
from examples.recurrent_training import mean_loss
from libprune.engine.errors import SourceError
from libprune.experiments.agreement import Interval, paired_factor, ratio_interval
from libprune.pipeline.sections import Allocate, Score
from libprune.report.markdown import markdown_table

if TYPE_CHECKING:
    from torch import Tensor

    from libprune.networks import Network, Pruned, Samples
    from libprune.networks.recurrent import RecurrentLM

NetworkType = Literal["rnn", "snn", "mixed"]
Method = Literal["uniform", "global", "retention"]

CLASSICAL = {name: {"criterion": name} for name in ("hessian_trace", "magnitude", "taylor", "random")}
"""By name the params of the score section. The first is the criterion that the others are set beside: half the trace
of the empirical Fisher information; the last is the floor."""
VIEWS = ("weight_stats", "activation_stats", "gradient_flow", "cooperative")
_FUSED = {"criterion": " + ".join(VIEWS), "scaling": "rank"}
ENHANCED = {name: {"criterion": name} for name in VIEWS} | {
    "four views, simple": _FUSED | {"fusion": "simple"},
    "four views, adaptive": _FUSED | {"fusion": "adaptive"},
}
"""Likewise: mixed criteria and their fusions."""
SCORES: Mapping[str, Mapping[str, Any]] = CLASSICAL | ENHANCED
Setting = tuple[str, Method]
"""A key of `SCORES`, and an allocation."""
REFERENCE: Setting = ("hessian_trace", "uniform")
_COMPARABLE = ("hessian_trace", "taylor", "random")
SETTINGS: tuple[Setting, ...] = (
    *((name, "uniform") for name in SCORES),
    *((name, "global") for name in _COMPARABLE),
    ("hessian_trace", "retention"),
)
"""Views compare within an axis only, so that `global` could not rank them."""


@dataclass(frozen=True)
class Calibration:
    """How much of the training part the statistics are collected on.

    Attributes:
        sequences: windows, drawn at random.
        length: bytes that each is asked for.
    """

    sequences: int
    length: int

    def draw(self, training: "Tensor", seed: int) -> "Samples":
        """Windows of a text ``[bytes]``, each with the byte that follows every one of its own.

        Raises:
            SourceError: if the text is shorter than a window.
        """
        import torch

        from libprune.networks import Samples

        places = len(training) - self.length
        if places < 1:
            raise SourceError(
                f"the training part has {len(training):,} bytes, too few for sequences of {self.length}; give a longer "
                "text, or a smaller --length"
            )
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(places, (self.sequences, 1), generator=generator)
        windows = training[starts + torch.arange(self.length + 1)]
        return Samples(windows[:, :-1], windows[:, 1:])


@dataclass(frozen=True)
class Judge:
    """The loss of models on the evaluation part.

    Attributes:
        text: streams ``[batch, bytes]``.
        piece: bytes in one pass; the state goes on.
    """

    text: "Tensor"
    piece: int = 256

    @staticmethod
    def of(parts: Parts, batch: int, number: int) -> "Judge":
        """A judge by at most so many bytes of the evaluation part.

        Raises:
            SourceError: if it is too short for so many streams.
        """
        return Judge(streams(parts.evaluation[:number], batch))

    def loss(self, model: "RecurrentLM") -> float:
        """In nats a byte."""
        import torch

        with torch.no_grad():
            return mean_loss(model.eval(), self.text, self.piece)


@dataclass(frozen=True)
class Result:
    """What pruning came to.

    Attributes:
        importance: a key of `SCORES`.
        method: of allocation.
        seed: of calibration.
        ratio: perplexity over that of the dense model.
        parameters: that are left.
        kept: by axis, how many units are left of how many.
    """

    importance: str
    method: Method
    seed: int
    ratio: float
    parameters: int
    kept: Mapping[str, tuple[int, int]]


def network_type(model: "RecurrentLM") -> NetworkType:
    """The kind of a model, by its units."""
    from libprune.networks.recurrent import RecurrentLayer

    layers = [layer for layer in model.layers if isinstance(layer, RecurrentLayer)]
    if not any(layer.spiking for layer in layers):
        return "rnn"
    return "mixed" if any(layer.hidden for layer in layers) else "snn"


def network_of(model: "RecurrentLM", samples: "Samples", folder: Path) -> "Network":
    """The model, ready to be pruned.

    Args:
        model: a trained one.
        samples: to calibrate on.
        folder: for what is collected.
    """
    from libprune.networks import Network
    from libprune.networks.recurrent_family import family

    return Network(model, family(model), samples, folder)


def pruned(network: "Network", setting: Setting, ratio: float, repair: str, kind: NetworkType, seed: int) -> "Pruned":
    """The model without a share of its parameters.

    Args:
        network: as `network_of` made it.
        setting: importance and allocation.
        ratio: share of the parameters to remove.
        repair: `none`, `local`, `sequential` or `block`.
        kind: what `retention` takes the model for.
        seed: of the importance `random`.

    Raises:
        BudgetError: if the model is too small to lose so much.
    """
    importance, method = setting
    score = Score(**SCORES[importance], seed=seed)
    return network.prune(network.plan(score, Allocate(ratio=ratio, method=method, network_type=kind)), repair)


def results_of(
    model: "RecurrentLM", network: "Network", judge: Judge, ratio: float, repair: str, seed: int
) -> Iterator[Result]:
    """Prune by one setting after another.

    Args:
        model: the dense one.
        network: the same, on the calibration samples of a seed.
        judge: what the results are judged by.
        ratio: share of the parameters to remove.
        repair: `none`, `local`, `sequential` or `block`.
        seed: of the calibration samples.
    """
    dense, kind = judge.loss(model), network_type(model)
    for setting in SETTINGS:
        smaller = pruned(network, setting, ratio, repair, kind, seed)
        factor = math.exp(judge.loss(cast("RecurrentLM", smaller.network)) - dense)
        blocks = network.architecture.blocks()
        kept = {part: (smaller.plan.kept(layer, part), network.architecture.units(part)) for layer, part in blocks}
        yield Result(*setting, seed, factor, smaller.parameters, kept)


def table(results: Sequence[Result]) -> str:
    """One line for each setting: the perplexity over the dense one's, the factor to the reference over the same seeds,
    and what is left.
    """
    own: dict[Setting, dict[int, Result]] = {}
    for one in results:
        own.setdefault((one.importance, one.method), {})[one.seed] = one
    reference = _ratios(own[REFERENCE])
    rows = []
    for setting, seeds in own.items():
        ratios, left = _ratios(seeds), list(seeds.values())
        factor = None if setting == REFERENCE else paired_factor(ratios, reference)
        kept = [f"{axis} {_mean([r.kept[axis][0] for r in left])}/{of}" for axis, (_, of) in left[0].kept.items()]
        parameters = f"{_mean([one.parameters for one in left]):,}"
        overall = f"× {shown(ratio_interval(list(ratios.values())))}"
        rows.append((*setting, overall, shown(factor), parameters, ", ".join(kept)))
    return markdown_table(
        rows, ("importance", "allocation", "perplexity / dense", f"/ {REFERENCE[0]}", "parameters", "units kept")
    )


def _ratios(seeds: Mapping[int, Result]) -> dict[int, float]:
    return {seed: one.ratio for seed, one in seeds.items()}


def shown(interval: Interval | None) -> str:
    """A mean, and in brackets its interval, if it is known."""
    if interval is None:
        return ""
    bounds = f" ({_number(interval.low)} to {_number(interval.high)})" if interval.known else ""
    return _number(interval.mean) + bounds


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.0e}"


def _mean(values: Sequence[int]) -> int:
    return round(sum(values) / len(values))
