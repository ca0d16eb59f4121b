"""Finding the axes of a model's residual stream, and the divergence of the model at several widths along them.

Cost: three forward passes over the calibration text, and one over the measured sequences for every width. Memory: two
matrices as wide as the stream, in float32, for each of its norms.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from libprune.collection.calibration import Calibration, held_out, require_own_weights, set_up
from libprune.collection.stream import (
    Norm,
    Stream,
    read_stream,
    require_described,
    require_narrowable,
    unit_states,
    watch,
)
from libprune.collection.stream_axes import Axes, choose_kind, find_axes, turn_model, write_axes
from libprune.engine.architecture import RESIDUAL, Architecture
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import hooked
from libprune.engine.tables import Columns
from libprune.models.folder import load_config
from libprune.models.parallel import World
from libprune.narrowing.table import width_table
from libprune.pipeline.artifacts import write_table
from libprune.pipeline.atomic import writing_folder
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Width
from libprune.pipeline.terminal import Bar
from libprune.statistics.divergence import Divergence
from libprune.statistics.losses import measuring


def choose_widths(architecture: Architecture, config: PreTrainedConfig, section: Width, asked: int | str) -> list[int]:
    """The widths to measure, the widest first: the one asked for, or such as the config of the model can say.

    Args:
        section: how many, or which.
        asked: the value of `allocate.width`.

    Raises:
        LibpruneError: if the model or a width that was named cannot be had.
    """
    require_described(architecture)
    whole = architecture.sizes[RESIDUAL]
    named = [asked] if isinstance(asked, int) else [] if isinstance(section.widths, int) else list(section.widths)
    for width in named:
        require_narrowable(architecture, config, width)
    if named:
        return sorted(set(named), reverse=True)
    multiples = range(whole // 2 // section.multiple * section.multiple, whole, section.multiple)
    fitting = [width for width in multiples if width and _fits(architecture, config, width)]
    if not fitting:
        raise LibpruneError(
            f"no multiple of width.multiple = {section.multiple} between half of {whole} columns and all of them can "
            "be said by the config of this model; lower it"
        )
    assert isinstance(section.widths, int)
    chosen = np.linspace(0, len(fitting) - 1, min(section.widths, len(fitting))).round().astype(int)
    return [fitting[index] for index in chosen[::-1]]


def _fits(architecture: Architecture, config: PreTrainedConfig, width: int) -> bool:
    try:
        require_narrowable(architecture, config, width)
    except LibpruneError:
        return False
    return True


@torch.no_grad()
def collect_axes(run: Calibration, asked: str) -> Axes:
    """Find the axes, and turn the model of the run to them.

    Args:
        run: all calibration sequences.
        asked: the value of `width.axes`.

    Raises:
        LibpruneError: if the model's stream cannot be narrowed, or not along such axes.
    """
    stream = read_stream(run.model, run.architecture)
    kind, read = choose_kind(asked, stream), set(stream.readers.values()) | {stream.tied}
    whole = run.architecture.sizes[RESIDUAL]
    moments = torch.zeros(whole, whole, device=run.device)

    def add(norm: Norm, x: Tensor, output: Tensor) -> None:
        nonlocal moments
        if norm.module in read:
            unit = unit_states(x.flatten(0, -2), norm.centred)
            moments = moments + unit.T @ unit

    for _ in _passes(run, stream, add, "axes"):
        pass
    parameters = {name: run.model.get_parameter(norm.weight).detach() for name, norm in stream.norms.items()}
    gain_of = {name: parameters[name].float().cpu() + norm.shift for name, norm in stream.norms.items()}
    order, turn, gains = find_axes(kind, run.world.summed(moments).cpu(), gain_of)
    axes = Axes(stream, order, turn, gains, {}, {}, {})
    turn_model(run.model, run.architecture, axes, run.keep)
    ratios, grams = _along(run, stream, read)
    return replace(axes, ratios=ratios, grams=grams[False], held_out=grams[True])


def _passes(run: Calibration, stream: Stream, take: Any, name: str) -> Iterator[bool]:
    """Run the calibration text, shared out over the processes; say of each pass beforehand whether it is held out."""
    out = held_out(0, len(run.sequences))
    groups = [(run.sequences[~out], False)] + ([(run.sequences[out], True)] if out.any() else [])
    batches = [(batch, flag) for group, flag in groups for batch in group.passes(run.at_once)]
    batches = batches[run.world.rank :: run.world.size]
    with hooked(run.model) as handles:
        handles += watch(run.model, stream, take)
        for batch, flag in Bar(batches, desc=name, unit="pass"):
            yield flag
            run.model(input_ids=batch.ids.to(run.device), use_cache=False)


def _along(run: Calibration, stream: Stream, read: set[str | None]) -> tuple[dict[str, Tensor], dict[bool, Any]]:
    """By norm the ratios of root mean squares, and the moments of its outputs, fitted to and held out."""
    whole = run.architecture.sizes[RESIDUAL]
    counts = torch.arange(1, whole + 1, device=run.device)
    sums, tokens = dict[str, Any](), dict[str, int]()
    grams: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    seen: dict[bool, dict[str, int]] = {False: {}, True: {}}
    flag = False

    def add(norm: Norm, x: Tensor, output: Tensor) -> None:
        x, output = x.flatten(0, -2).float(), output.flatten(0, -2).float()
        squares = x.square().cumsum(-1) / counts
        if norm.centred:
            squares = squares - (x.cumsum(-1) / counts).square()
        roots = squares.clamp_min(0).sqrt()
        name = norm.module
        sums[name] = sums.get(name, 0) + (roots / roots[:, -1:].clamp_min(1e-12)).sum(0)
        tokens[name] = tokens.get(name, 0) + len(x)
        if name in read:
            grams[flag][name] = grams[flag].get(name, 0) + output.T @ output
            seen[flag][name] = seen[flag].get(name, 0) + len(x)

    for held in _passes(run, stream, add, "moments"):
        flag = held
    ratios = {
        name: _mean(run.world, sums.get(name), tokens.get(name, 0), (whole,), run.device) for name in stream.norms
    }
    means = {
        key: {
            name: mean
            for name in stream.norms
            if name in read
            and (mean := _mean(run.world, found.get(name), seen[key].get(name, 0), (whole, whole), run.device))
            is not None
        }
        for key, found in grams.items()
    }
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}, means


def _mean(
    world: World, total: Tensor | None, tokens: int, shape: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """The mean over the tokens of all processes, on the CPU; None where there are none."""
    own = torch.zeros(shape, device=device) if total is None else total
    number = int(world.summed(torch.tensor(tokens)))
    return (world.summed(own) / number).cpu() if number else None


def measure_widths(layout: Layout, compute: Compute, section: Width, asked: int | str) -> Columns | None:
    """Find the axes and the divergence at every width, and write both.

    Returns:
        The table; None in all processes but the first.

    Raises:
        LibpruneError: if an artifact is missing or foreign, the model cannot be narrower, its weights do not lie whole
            on the device, or a divergence is not finite.
    """
    run = set_up(layout, compute, None)
    require_own_weights(run)
    widths = choose_widths(run.architecture, load_config(layout.model), section, asked)
    axes = collect_axes(run, section.axes)
    if run.world.first:
        with writing_folder(layout.width_axes) as folder:
            write_axes(folder, axes, run.meta)
    number = min(section.sequences or len(run.sequences), len(run.sequences))
    last = replace(run, sequences=run.sequences[-number:])
    dense = Plan.dense(run.architecture)
    plans = {f"all but {width} columns": replace(dense, width=width) for width in widths}
    own = dict(run.model.named_parameters())
    divergence = Divergence(run.model)
    parameters = {p.name: p for p in run.architecture.parameters}

    def mended(name: str) -> Mapping[str, Tensor]:
        width = plans[name].width
        assert width is not None
        touched = [*axes.stream.readers, *(norm.weight for norm in axes.stream.norms.values())]
        return {
            key: axes.mended(key, own[key].detach(), tuple(map(str, parameters[key].dims)), width, repair=True)
            for key in touched
        }

    identity = {"widths": widths, "axes": axes.digest}
    rooms = ("narrowing",)
    with measuring(last, "width", layout.widths, plans, identity, divergence, mended, rooms) as losses:
        if losses is None:
            return None
        table = width_table(run.architecture, widths, losses.changed)
        write_table(layout.widths, table, run.meta | {"measured": number, "axes": axes.kind})
        return table
