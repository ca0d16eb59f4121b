"""Whether gradients vanish and which layers lose too much, and what to do about it, in plain words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.allocation.gradient_fix import Factors, factors_of, require_defined, rescaled, resolve
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.errors import ArtifactError
from libprune.engine.family import families
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns
from libprune.pipeline.artifacts import Scores, read_table, same_origin
from libprune.pipeline.layout import Layout
from libprune.pipeline.methods import METHODS
from libprune.pipeline.sections import Allocate
from libprune.statistics.gradient_health import MILD, gradient_ratio, verdict

HALF, MANY, FIRST = 0.5, 0.2, 5
"""The share of its parameters above which a layer loses too much, the share of such layers that is too many, and the
number of layers at the input that matter most."""


@dataclass(frozen=True)
class Fixed:
    """The scores under a gradient fix.

    Attributes:
        scores: the importance of the units.
        fix: the fix that was applied; what `auto` came to.
        ratio: the gradient ratio between layers, as collected.
        ratio_after: the same with every layer's gradients times its factor.
    """

    scores: Scores
    fix: str
    ratio: float
    ratio_after: float


def fixed_scores(layout: Layout, scores: Scores, params: Allocate) -> Fixed:
    """Diagnose the collected gradients and apply the asked fix to the scores.

    Raises:
        LibpruneError: if gradients are missing or foreign, or the fix is not defined for these scores.
    """
    if "gradient_orders" not in scores.meta:
        raise ArtifactError(f"{layout.scores} was written by an older libprune; run `dvc repro score`")
    orders = scores.meta["gradient_orders"]
    require_defined(params.gradient_fix, scores.meta["criterion"], orders, scores.meta["scaling"], params.method)
    rows, tensors = (_gradients(layout, name, scores) for name in ("layers", "tensors"))
    ratio = gradient_ratio(rows)
    fix = resolve(params.gradient_fix, ratio)
    if fix == "none":
        return Fixed(scores, fix, ratio, ratio)
    factors: Factors = factors_of(fix, tensors, scores.architecture.layers, params.depth_weights)
    after = gradient_ratio(rows | {"mean_abs": rows["mean_abs"] * factors[rows["layer_idx"]]})
    return Fixed(scores.with_columns(rescaled(scores.table, orders, factors)), fix, ratio, after)


def _gradients(layout: Layout, name: str, scores: Scores) -> Columns:
    path = layout.gradients / f"{name}.parquet"
    table, meta = read_table(path, "gradients")
    same_origin(path, meta, scores.origin)
    return table


def shares_lost(architecture: Architecture, plan: Plan) -> NDArray[np.float64]:
    """The share of its parameters that each layer loses, ``[layers]``."""
    prices = cost.prices(architecture, "parameters")
    shares = []
    for layer in range(architecture.layers):
        own = {(layer, part): plan.keep[layer, part] for part in architecture.parts_of(layer)}
        whole = Plan({block: np.zeros_like(keep) for block, keep in own.items()})
        shares.append(prices.removed(Plan(own)) / prices.removed(whole))
    return np.array(shares)


def over_pruned(lost: NDArray[np.float64], freeze_first: int = 0, freeze_last: int = 0) -> list[int]:
    """The layers that stay and lose over half of their parameters, and clearly more than the layers do on average.

    The second condition is for large ratios, where all layers lose half; layers that are frozen or gone do not count.
    """
    layers = np.arange(len(lost))
    counted = (lost < 1) & (layers >= freeze_first) & (layers < len(lost) - freeze_last)
    usual = float(lost[counted].mean()) if counted.any() else 0.0
    return [int(layer) for layer in layers[counted] if lost[layer] > max(HALF, 1.1 * usual)]


def advise(fixed: Fixed, plan: Plan, params: Allocate) -> dict[str, Any]:
    """What the plan's metadata and the report say of gradients and layers.

    Args:
        fixed: the scores that the plan was made from.
        plan: which units stay.
        params: how they were chosen.

    Returns:
        JSON: `gradient_ratio` and `gradient_ratio_after_fix` (null: infinite), `verdict`, `fix`,
        `over_pruned_layers` and `advice`, a list of sentences.
    """
    architecture = fixed.scores.architecture
    lost = shares_lost(architecture, plan)
    over = over_pruned(lost, params.freeze_first, params.freeze_last)
    return {
        "gradient_ratio": _finite(fixed.ratio),
        "gradient_ratio_after_fix": _finite(fixed.ratio_after),
        "verdict": verdict(fixed.ratio),
        "fix": fixed.fix,
        "over_pruned_layers": over,
        "advice": [
            *_about_gradients(fixed, params),
            *_about_layers(over, lost, params),
            *held_whole(architecture, not plan.uniform or params.shape == "per_layer"),
        ],
    }


def _finite(ratio: float) -> float | None:
    return ratio if np.isfinite(ratio) else None


def _about_gradients(fixed: Fixed, params: Allocate) -> list[str]:
    between, orders = METHODS[params.method].between, fixed.scores.meta["gradient_orders"]
    advice = []
    if any(orders.values()) and between and fixed.fix == "none" and fixed.ratio >= MILD:
        advice.append(f"gradient ratio {fixed.ratio:,.0f}: {verdict(fixed.ratio)}; try allocate.gradient_fix=auto")
    if fixed.fix != "none" and fixed.ratio_after > fixed.ratio:
        advice.append(
            f"allocate.gradient_fix={fixed.fix} widens the gradient ratio from {fixed.ratio:,.1f} to "
            f"{fixed.ratio_after:,.1f}; compare with none"
        )
    if fixed.fix != "none" and not between:
        advice.append(
            f"allocate.method={params.method} settles how much each layer loses without comparing scores between "
            f"layers, so allocate.gradient_fix={fixed.fix} changes little"
        )
    return advice


def _about_layers(over: Sequence[int], lost: NDArray[np.float64], params: Allocate) -> list[str]:
    if not over:
        return []
    named = ", ".join(f"{layer} ({100 * lost[layer]:.0f} %)" for layer in over)
    advice = [f"layers that lose over half of their parameters, and clearly more than the others: {named}"]
    if len(over) > MANY * len(lost):
        others = "" if METHODS[params.method].alike else ", or compare with allocate.method=uniform"
        advice.append(
            f"these are more than {100 * MANY:.0f} % of the layers; lower allocate.ratio, raise "
            f"allocate.min_groups and allocate.min_channels{others}"
        )
    if early := [layer for layer in over if layer < FIRST]:
        frozen = max(early) + 1
        compare = f"; compare with allocate.freeze_first={frozen}" if frozen <= len(lost) // 3 else ""
        advice.append(
            f"{len(early)} of the first {min(FIRST, len(lost))} layers, which the others build on, are among "
            f"them{compare}"
        )
    return advice


def held_whole(architecture: Architecture, per_layer: bool) -> list[str]:
    """For each part of which no single unit can go, a sentence that says why.

    Args:
        per_layer: whether the result may have a modeling file of its own.
    """
    sentences = []
    for part, shape in architecture.parts.items():
        if shape.coupled:
            norms = " and ".join(shape.coupled)
            sentences.append(f"no {part} unit can go alone: {norms} of {architecture.family} couple all of them")
        elif not per_layer and not any(map(shape.says, range(1, architecture.units(part)))):
            why = families()[architecture.family].config.unsaid(shape.outer or shape.axis)
            sentences.append(
                f"the stock config of {architecture.family} cannot say fewer {part} units{f' ({why})' if why else ''}; "
                "allocate.shape=per_layer can"
            )
    return sentences
