"""Made-up architectures, scores and measurements, for the tests of allocation; no model is needed."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st

from libprune.allocation.ladders import Ladders, build_ladders
from libprune.allocation.methods import Evidence
from libprune.engine.architecture import Architecture, Block, Parameter, PartShape
from libprune.engine.axes import parse_expr
from libprune.engine.cost import prices
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns, unit_index
from libprune.pipeline.methods import METHODS
from libprune.pipeline.sections import Allocate


@dataclass(frozen=True)
class Shape:
    """A decoder without weights: `gates` matrices into the MLP, one out of it."""

    layers: int = 3
    kv: int = 4
    q: int = 2
    d: int = 2
    ffn: int = 12
    model: int = 5
    gates: int = 2
    bias: bool = False
    expressible: tuple[int, ...] | None = None

    @property
    def units(self) -> dict[str, int]:
        """Of each part in one layer."""
        return {"attention": self.kv, "mlp": self.ffn}

    @property
    def group_cost(self) -> int:
        return self.d * (2 * self.q + 2) * self.model + self.bias * self.d * (self.q + 2)

    @property
    def channel_cost(self) -> int:
        return (self.gates + 1) * self.model + self.bias * self.gates

    @property
    def overhead(self) -> int:
        """The norm before a part, and the bias of its consumer."""
        return (1 + self.bias) * self.model

    @property
    def decoder(self) -> int:
        return self.layers * (self.kv * self.group_cost + self.ffn * self.channel_cost + 2 * self.overhead)

    def removable(self, params: Allocate) -> dict[str, int]:
        """Units of each part that one layer can lose at most."""
        multiple = single(params).channel_multiple
        kept = -(-params.min_channels // multiple) * multiple
        return {"attention": max(0, self.kv - params.min_groups), "mlp": max(0, self.ffn - kept)}

    def reachable(self, params: Allocate) -> int:
        """Parameters that floors of at least 1, multiples and frozen layers let go."""
        left = self.removable(params)
        layer = left["attention"] * self.group_cost + left["mlp"] * self.channel_cost
        return layer * len(self.unfrozen(params))

    def unfrozen(self, params: Allocate) -> range:
        return range(params.freeze_first, self.layers - params.freeze_last)

    def architecture(self) -> Architecture:
        return _architecture(self)

    def unit_costs(self) -> np.ndarray:
        layer = [self.group_cost] * self.kv + [self.channel_cost] * self.ffn
        return np.array(layer * self.layers)

    def table(self, score: np.ndarray) -> Columns:
        """The importance table of the given scores, one a unit."""
        costs, score = self.unit_costs(), np.asarray(score, dtype=float)
        return {**unit_index(self.architecture()), "importance": score * costs, "cost": costs, "score": score}

    def evidence(self, method: str, seed: int = 0) -> Evidence:
        """Made-up measurements for a method; empty for those that need none."""
        rng = np.random.default_rng(seed)
        if method == "functional":
            return {"activations": rng.random(self.layers)}
        if method == "hgsp":
            kinds = ("layer", *self.units)
            return {"sensitivity": {kind: rng.normal(0.2, 0.3, self.layers) for kind in kinds}}
        return {"levels": self.curves(rng)} if method == "search" else {}

    def curves(self, rng: np.random.Generator) -> dict[Block, np.ndarray]:
        """For every block a divergence by units removed that starts at 0 and never falls, level in places.

        Of many units it is a straight line between eight levels, as what was measured is.
        """
        counts = {(layer, part): units for layer in range(self.layers) for part, units in self.units.items()}
        rises = {block: rng.exponential(size=count) * (rng.random(count) < 0.8) for block, count in counts.items()}
        curves = {block: np.concatenate([[0.0], np.cumsum(rise)]) for block, rise in rises.items()}
        for block, count in counts.items():
            if count > 32:
                levels = np.linspace(0, count, 9).round().astype(int)
                curves[block] = np.interp(np.arange(count + 1), levels, curves[block][levels])
        return curves


@cache
def _architecture(shape: Shape) -> Architecture:
    gates = {f"mlp.gate{i}": "ffn|model" for i in range(shape.gates)}
    heads = {"q": "kv q d|model", "k": "kv d|model", "v": "kv d|model", "o": "model|kv q d"}
    parts = {"attention": {"norm": "model", **heads}, "mlp": {"norm2": "model", **gates, "down": "model|ffn"}}
    outside = Parameter("embedding", (parse_expr("vocab"), parse_expr("model")), None, None)
    blocks = [
        parameter
        for layer in range(shape.layers)
        for part, modules in parts.items()
        for name, text in modules.items()
        for parameter in _parameters(f"layers.{layer}.{name}", text, layer, part, shape.bias)
    ]
    return Architecture(
        family="llama",
        sizes={axis: getattr(shape, axis) for axis in ("kv", "q", "d", "ffn", "model")} | {"vocab": 7},
        layers=shape.layers,
        layers_path="layers",
        parts={
            "attention": PartShape("kv", "attn", shape.expressible, units="groups"),
            "mlp": PartShape("ffn", "mlp", None),
        },
        parameters=(outside, *blocks),
        maps=(),
        cache=parse_expr("kv d + kv d"),
        head="causal_lm",
        head_macs=7 * shape.model,
    )


def _parameters(name: str, text: str, layer: int, part: str, bias: bool) -> list[Parameter]:
    dims = tuple(parse_expr(side) for side in text.split("|"))
    weight = Parameter(f"{name}.weight", dims, layer, part)
    return [weight, Parameter(f"{name}.bias", dims[:1], layer, part)] if bias and len(dims) > 1 else [weight]


EQUAL_COSTS = Shape(q=1, d=1, gates=3)
"""A group and a channel cost the same, so that a global order is the order of the scores."""


def ladders_of(architecture: Architecture, scores: Columns, params: Allocate) -> Ladders:
    """The ladders under the prices of the asked objective."""
    return build_ladders(architecture, scores, single(params), prices(architecture, params.objective))


def single(params: Allocate) -> Allocate:
    """The params with what `channel_multiple: auto` means for a shape of fewer than 32 channels."""
    return params.model_copy(update={"channel_multiple": 1}) if params.channel_multiple == "auto" else params


@st.composite
def shapes(draw):
    small = st.integers(1, 3)
    kv = draw(st.integers(1, 4))
    counts = draw(st.sets(st.integers(1, kv)))
    return Shape(
        layers=draw(st.integers(1, 3)),
        kv=kv,
        q=draw(small),
        d=draw(small),
        ffn=draw(st.integers(1, 9)),
        model=draw(st.integers(1, 6)),
        gates=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        expressible=draw(st.sampled_from([None, tuple(sorted(counts | {kv}))])),
    )


@st.composite
def requests(draw, method: str):
    """A shape, distinct scores, params whose ratio floors and frozen layers leave in reach, and a seed of evidence."""
    shape = draw(shapes())
    params = Allocate(
        method=method,
        shape="per_layer",
        split=draw(st.sampled_from(["importance", "proportional"])),
        rank_by=draw(st.sampled_from(["score", "importance"])),
        min_groups=draw(st.integers(1, 3)),
        min_channels=draw(st.integers(1, 6)),
        channel_multiple=draw(st.integers(1, 4)),
        freeze_first=draw(st.integers(0, 1)),
        freeze_last=draw(st.integers(0, 1)),
    )
    if method == "hgsp":
        weights = {"temperature": draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))}
        weights |= {"threshold": draw(st.sampled_from([0.0, 0.1, "blockwise", "layerwise", "percentile:25"]))}
        params = params.model_copy(update=weights)
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    scores = (1 + rng.permutation(len(shape.unit_costs()))) / 8
    assume(params.min_channels + params.channel_multiple <= shape.ffn)
    ratio = draw(st.floats(0.05, 1)) * shape.reachable(params) / shape.decoder
    assume(0 < ratio < 1)
    assume(method != "search" or ratio * shape.decoder > 0.5)  # a target of 0 has a test of its own, in test_search.py
    return shape, scores, params.model_copy(update={"ratio": ratio}), seed


def drawn(data: st.DataObject, method: str) -> tuple[Shape, Columns, Allocate, Evidence]:
    shape, scores, params, seed = data.draw(requests(method))
    return shape, shape.table(scores), params, shape.evidence(method, seed)


def removed_parameters(shape: Shape, plan: Plan) -> int:
    """What a plan removes, from the costs written out above."""
    total = 0
    for (_, part), keep in plan.keep.items():
        unit = shape.group_cost if part == "attention" else shape.channel_cost
        total += int((~keep).sum()) * unit + (0 if keep.any() else shape.overhead)
    return total


def plan_without(architecture: Architecture, layer: int, part: str, *units: int) -> Plan:
    keep = dict(Plan.dense(architecture).keep)
    keep[layer, part] = ~np.isin(np.arange(architecture.units(part)), units)
    return Plan(keep)


META = {"criterion": "wanda", "fusion": "none", "comparable": True, "scaling": "none"}


every_method = pytest.mark.parametrize("method", METHODS)
