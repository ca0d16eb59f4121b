"""Widths that other programs want: multiples that blocks of quantized weights fill, and counts that devices divide."""

from collections.abc import Mapping

from libprune.engine.architecture import Architecture
from libprune.engine.plan import Plan
from libprune.pipeline.sections import Allocate

MULTIPLES = (256, 128, 64, 32)
"""Multiples of channels that `allocate.channel_multiple: auto` chooses from, the largest first.

Blocks of llama.cpp's k-quants hold 256 weights, those of its other types 32; the Marlin kernels for four-bit weights
take multiples of 128 inputs and 64 outputs; groups of 32 and 128 weights are usual elsewhere.
"""
WITHIN = 0.01
"""How far the share removed at such a multiple may lie from the one asked for: one point."""
STEP = 0.5
"""How much of the channels that a layer loses on average one step of such a multiple may be at most.

A layer that is to lose 307 channels loses 256 or 512 of them in steps of 256: layers can then no longer lose different
shares, and attention makes up for what the channels cannot give. docs/least-loss.md has what this costs.
"""


def channel_parts(architecture: Architecture) -> list[str]:
    """The parts of a language model whose units can go in multiples: not attention, nor what norms couple."""
    parts = architecture.parts if architecture.layered else {}
    return [part for part, shape in parts.items() if not architecture.grouped(part) and not shape.coupled]


def fitting_multiples(architecture: Architecture) -> list[int]:
    """The `MULTIPLES` that the dense model's channels are a multiple of, the largest first; a network has none."""
    widths = _widths(architecture)
    return [multiple for multiple in MULTIPLES if widths and all(width % multiple == 0 for width in widths)]


def fine_enough(architecture: Architecture, multiple: int, share: float) -> bool:
    """Whether steps of a multiple are small beside what a layer loses, so that layers can lose different shares.

    Args:
        share: how much of the objective the layers are to lose.
    """
    return multiple <= STEP * share * min(_widths(architecture))


def _widths(architecture: Architecture) -> list[int]:
    return [architecture.units(part) for part in channel_parts(architecture)]


def tensor_parallel_sizes(architecture: Architecture, plan: Plan) -> list[int]:
    """The numbers of devices that tensor parallelism can divide the model over, ascending.

    They divide the query heads and the channels, also those inside of each expert, and divide the key-value heads or
    are a multiple of them (vLLM, vllm/model_executor/models/llama.py, which then gives devices copies of the heads).

    Args:
        plan: alike in all layers.
    """
    kept = {part: plan.kept(layer, part) for layer in plan.layers for part in architecture.parts_of(layer)}
    left = {axis: size for layer in plan.layers for axis, size in plan.sizes(architecture, layer).items()}
    groups = [count for part, count in kept.items() if architecture.parts[part].units == "groups"]
    heads = [part for part in kept if architecture.parts[part].units == "heads"]
    channels = [_width(architecture, p, kept) for p in kept if architecture.parts[p].units not in {"groups", "heads"}]
    divided = [count * architecture.sizes.get("q", 1) for count in groups] + channels + [kept[part] for part in heads]
    groups += [left[architecture.parts[part].outer] for part in heads]
    return [
        size
        for size in range(1, min(divided) + 1)
        if all(count % size == 0 for count in divided)
        and all(count % size == 0 or size % count == 0 for count in groups)
    ]


def _width(architecture: Architecture, part: str, kept: Mapping[str, int]) -> int:
    """The channels of a part of which so much is kept; of whole experts those of each, or of all if all are used."""
    if architecture.parts[part].units == "channels":
        return kept[part]
    sizes = {**architecture.sizes, architecture.parts[part].axis: kept[part]}
    return architecture.consumers(architecture.with_part(part)[0], part)[0].each_input(sizes)


def explain_multiple(architecture: Architecture, asked: Allocate, multiple: int, removed: float) -> str | None:
    """A sentence on what `allocate.channel_multiple: auto` came to and why; None where nothing was to be chosen.

    Args:
        asked: the params, as they are written.
        multiple: what was chosen.
        removed: the share of the objective that the plan removes.
    """
    parts = channel_parts(architecture)
    if asked.channel_multiple != "auto" or not parts:
        return None
    *larger, last = map(str, MULTIPLES)
    known, width = f"{', '.join(larger)} and {last}", " and ".join(f"{architecture.units(part):,}" for part in parts)
    if multiple == 1 and not asked.budgets.asked and not fitting_multiples(architecture):
        return f"keeps channels in no multiple: {width} is a multiple of none of {known}"
    met = _met(asked, multiple, removed)
    if asked.nested:
        met += f"; runs of the nested ratios are parts of this one with allocate.channel_multiple: {multiple}"
    if multiple > 1:
        return (
            f"keeps channels in multiples of {multiple}: the largest of {known} that {width} is a multiple of, that is "
            f"at most half of what a layer loses, and that {met}"
        )
    return (
        f"keeps channels in no multiple: none of {known} that {width} is a multiple of, and that is at most half of "
        f"what a layer loses, {met}"
    )


def _met(asked: Allocate, multiple: int, removed: float) -> str:
    """What the multiple of channels meets, or none does where it is 1."""
    if asked.budgets.asked:
        return "meets the tightest budget to within one point"
    if multiple > 1:
        alone = "single channels remove about as much"
        wanted = alone if asked.ratio is None else f"{100 * asked.ratio:g} % was asked for"
        return f"removes {100 * removed:.1f} % where {wanted} (within one point)"
    wanted = "what single channels remove" if asked.ratio is None else f"the {100 * asked.ratio:g} % asked for"
    return f"comes within one point of {wanted}"
