"""Made-up curves: plans of a model without weights, and experiments that have measured some of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from libprune.curves.measured import Measured
from libprune.curves.plans import Curve, Planned
from libprune.curves.table import Drawn
from libprune.engine import cost
from libprune.engine.plan import Plan
from libprune.pipeline.sections import Allocate
from tests.support.evaluated import EVALUATION
from tests.support.shapes import Shape
from tests.support.swept import row

SHAPE = Shape(layers=4, kv=10, ffn=1000, model=50)
TENTHS = tuple(number / 10 for number in range(1, 10))


def made_up(
    ratios: Sequence[float] = TENTHS, predicts: bool = True, skipped: Mapping[float, str] | None = None
) -> Curve:
    """Plans that remove these shares of the units of every block; the divergence is the fourth power of the share.

    Args:
        ratios: the shares.
        predicts: whether divergences are known.
        skipped: by ratio without a plan, why.
    """
    architecture = SHAPE.architecture()

    def planned(ratio: float) -> Planned:
        keep = {block: np.arange(len(keep)) >= round(ratio * len(keep)) for block, keep in dense.keep.items()}
        size = cost.size(architecture, Plan(keep))
        divergence = 4 * ratio**4 if predicts else None
        shares = {"divergence": divergence, "importance": ratio / 2}
        return Planned(ratio, Plan(keep), "uniform", ratio, size, 2 * size.total, 2 * size.cache, 0, None, **shares)

    dense = Plan.dense(architecture)
    method = "search" if predicts else "uniform"
    params = Allocate(method=method)
    return Curve(params, architecture, planned(0.0), tuple(map(planned, ratios)), skipped or {}, {})


def measured(ratio: float, value: float, error: float = 0.01, after: float | None = None, **speed: Any) -> Measured:
    """The result of an experiment of this ratio.

    Args:
        ratio: the share removed.
        value: the perplexity ratio.
        error: one standard error of it.
        after: the ratio after recovery, if it was trained.
        speed: keys of the speed that differ.
    """
    experiment = replace(row(f"curve-{ratio:g}", value, error, after=after), size=round(1e6 * (1 - ratio)))
    return Measured(experiment, EVALUATION | {"speed": EVALUATION["speed"] | speed})


def drawn(values: Mapping[float, float], curve: Curve | None = None, error: float = 0.01) -> Drawn:
    """A curve of which these ratios have been measured, with these perplexity ratios."""
    found = {ratio: measured(ratio, value, error) for ratio, value in values.items()}
    return Drawn("a <b>model</b>", curve or made_up(), found, ())
