"""What a run will do and take, told before it: stages, minutes, memory and disk, by arithmetic and one measurement.

The work of a stage is counted in floating point operations, from the shapes and the params. Seconds follow from the
last run of the same stage in this project, in proportion to the work, or else from a small layer that is timed for a
moment. `docs/inspect.md` gives the formulas and how near they came.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from libprune.cli.footprint import Footprint, compute_device, compute_dtype, footprints
from libprune.cli.inspection import dense_architecture
from libprune.collection.offload import LIBRARIES, PassBytes, choose, consumer_inputs, held_activations, pass_bytes
from libprune.engine import cost
from libprune.engine.architecture import RESIDUAL, Architecture
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.models.compute import KEPT
from libprune.models.memory import fits_in_memory
from libprune.models.parallel import World
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import Params, load_params
from libprune.pipeline.story import read_memory
from libprune.pipeline.terminal import gigabytes, masked
from libprune.recovery.memory import working_bytes
from libprune.recovery.teacher_model import described_teacher, teacher_needs
from libprune.statistics.depth import measurements, most_removals
from libprune.statistics.depth import removals as removals_in_order
from libprune.statistics.levels import choose_levels
from libprune.statistics.sensitivity import removals

_STARTUP_SECONDS = 4.0
"""Measured: what a stage takes before and after its work, to load libraries and to write."""
_FORWARD = 0.7
"""Measured: the time of a pass without gradients, over that of as many operations in passes with gradients."""
_GRAM = 2.5
"""Measured: the time of an operation of a Gram matrix, in float32, over one of the model's own, in bfloat16."""
_DECODED = 50
"""Measured: the time of a token that is decoded alone, in tokens of a prompt."""
_DESCRIBED, _SOLVED = 28_000, 90
"""Measured: operations to describe a parameter of the dense model, and to fit a map, times its kept inputs cubed."""
_FITTED = 28
"""Measured: bytes that fitting the widest map holds, for each pair of its inputs."""
_TRAINED = 28
"""Bytes that a trained layer holds for each of its weights: seven times in float32, by `libprune.repair.blocks`."""
_SEQUENCES, _LENGTH, _HEAD, _WIDEST, _SECONDS = 4, 256, 64, 1024, 0.3
"""The timed layer: sequences, tokens of each, width of a head, most width, and how long its passes are repeated."""


@dataclass(frozen=True)
class Forecast:
    """What the stages of a run are expected to take.

    Attributes:
        work: floating point operations by stage.
        seconds: by stage; export is left out, whose programs are not known beforehand.
        recorded: stages whose time follows from an earlier run.
        memory: the most bytes that a process is expected to hold, and the stage that does.
        disk: the most bytes on the disk at once, beyond what is there.
    """

    work: Mapping[str, float]
    seconds: Mapping[str, float]
    recorded: frozenset[str]
    memory: tuple[int, str]
    disk: int


def forecast(
    architecture: Architecture,
    params: Params,
    stored: torch.dtype,
    stages: Sequence[str],
    costs: Mapping[str, Any],
    rate: float,
) -> Forecast:
    """Estimate what some stages of a run take.

    Args:
        stored: storage type of the dense model.
        stages: those that will run.
        costs: by stage, `seconds`, `work` and `memory` of its last run.
        rate: floating point operations a second.
    """
    work = {stage: amount for stage, amount in works(architecture, params).items() if stage in stages}
    known = {stage: costs[stage] for stage in work if costs.get(stage, {}).get("work")}
    seconds = {stage: _STARTUP_SECONDS + amount / rate for stage, amount in work.items()}
    seconds |= {stage: one["seconds"] * work[stage] / one["work"] for stage, one in known.items()}
    written = footprints(architecture, params, stored)
    held = {name: size for name, size in memory(architecture, params, stored, written).items() if name in stages}
    most = max(held, key=held.__getitem__, default="report")
    chosen = [stage for stage in written if stage.stage in stages]
    scratch = max((max(_scratch(params, stage.sums), stage.checkpoints) for stage in chosen), default=0)
    disk = sum(stage.written for stage in chosen) + scratch
    return Forecast(work, seconds, frozenset(known), (held.get(most, LIBRARIES), most), disk)


def _in_memory(params: Params, sums: int) -> bool:
    """Whether running sums of so many bytes will lie in memory, and not in files that are mapped from disk."""
    return params.compute.sums == "memory" or (params.compute.sums == "auto" and fits_in_memory(sums))


def _held_sums(params: Params, written: Sequence[Footprint]) -> dict[str, int]:
    """Bytes of the running sums of each stage that lie in memory."""
    return {stage.stage: stage.sums if _in_memory(params, stage.sums) else 0 for stage in written}


def _scratch(params: Params, sums: int) -> int:
    """Bytes on disk of running sums: two saved states, and the sums themselves where they are mapped."""
    return (2 if _in_memory(params, sums) else 3) * sums


def works(architecture: Architecture, params: Params) -> dict[str, float]:
    """Floating point operations of each stage, in those of a pass with gradients; 1 for those that take next to none.

    A multiply-accumulate is two operations, and a backward pass is two forward passes.
    """
    tokens, forward = params.tokenize, _forward(architecture)
    passed, length = _FORWARD * forward, tokens.calibration_length

    def sequences(asked: int | None) -> int:
        return min(asked or tokens.calibration_sequences, tokens.calibration_sequences)

    consumers = consumer_inputs(architecture)
    gram = _GRAM * sum(met * float(width) ** 2 for width, met, _ in consumers)
    fits = _SOLVED * (1 - (params.allocate.ratio or 0)) ** 3
    fits *= sum(copies * float(width) ** 3 for width, _, copies in consumers)
    rows = len(choose_levels(architecture, params.levels.number))
    levels = sequences(params.levels.sequences) * length * passed
    ordered = removals_in_order(architecture, params.depth.of)
    steps = most_removals(len(ordered), params.depth.removals)
    joint = steps + measurements(len(ordered), params.depth) / 2
    depth = {"joint": joint, "cosine": steps / 2}.get(params.allocate.depth, 0.0)
    recover, evaluate = params.recover, params.evaluate
    number = (1 + evaluate.rounds) * 2 * (evaluate.prompt_tokens + _DECODED * evaluate.decode_tokens)
    models = 2 if recover.method == "none" else 3
    number += models * evaluate.continuation_tokens * (_DECODED + evaluate.continuations)
    number += (3 * models - 2) * tokens.evaluation_windows * tokens.evaluation_length
    checked = (recover.checks + 1) * recover.held_out * recover.length
    learned = recover.method != "none" and recover.teacher is not None
    teaching = _FORWARD * _forward(described_teacher(architecture, recover)) if learned else passed
    taught = teaching if recover.runs_teacher else 0
    drawn, each = tokens.repaired_on
    fitted = min(params.slice.sequences or drawn, drawn) * each
    by_layer = fits + (2 * passed + gram) * fitted
    ahead = 2 if params.slice.block_ahead else 0  # forward, and backward to the input of the next layer
    trained = (3 + ahead) * params.slice.block_epochs * forward * fitted
    repaired = {"none": 0.0, "bias": 0.0, "local": fits, "block": by_layer + trained}.get(params.slice.repair, by_layer)
    draws = {"fisher": 3.0}.get(params.hessian.estimator, 3.0 * (1 + params.hessian.probes))
    return {
        "prepare": float(_DESCRIBED * architecture.total_parameters),
        "tokenize": 1.0,
        "gradients": 3 * forward * sequences(params.gradients.sequences) * length,
        "hessian": draws * forward * sequences(params.hessian.sequences) * length,
        "activations": (passed + gram) * sequences(params.activations.sequences) * length,
        "ablation": params.ablation.units * sequences(params.ablation.sequences) * length * passed / 2,
        "score": 1.0,
        "sensitivity": len(removals(architecture)) * sequences(params.sensitivity.sequences) * length * passed / 2,
        "depth": depth * sequences(params.depth.sequences) * length * passed + 1,
        "levels": rows * (levels / 2 + fits / max(1, len(consumers))),
        "width": _narrowing(architecture, params) * passed * length,
        "latency": float(params.latency.rounds * params.latency.widths * params.latency.tokens) * passed,
        "allocate": params.allocate.evaluations * (levels + fits) + 1,
        "slice": repaired + 1,
        "teacher": 1.0 if recover.top_k is None else recover.tokens * teaching,
        "recover": recover.tokens * (3 * forward + taught) + checked * (passed + taught),
        "evaluate": number * passed,
        "report": 1.0,
    }


def _forward(architecture: Architecture) -> float:
    """Floating point operations of a forward pass, for each token."""
    return 2.0 * cost.size(architecture, Plan.dense(architecture)).macs


def _narrowing(architecture: Architecture, params: Params) -> int:
    """Sequences that run in the width stage: all of them twice, and those measured, dense and at each width."""
    stored, section = params.tokenize.calibration_sequences, params.width
    measured = 1 if isinstance(params.allocate.width, int) else section.number
    return 2 * stored + (1 + measured) * min(section.sequences or stored, stored)


def memory(
    architecture: Architecture, params: Params, stored: torch.dtype, written: Sequence[Footprint]
) -> dict[str, int]:
    """Bytes that the process of each large stage holds at most: weights, sums, logits and activations."""
    total, computed = architecture.total_parameters, compute_dtype(params.compute)
    weights, dense = total * computed.itemsize, total * stored.itemsize
    batch = max(params.compute.batch_tokens, params.tokenize.calibration_length)
    needs = pass_bytes(architecture, batch, computed)
    logits, layer = needs.logits, needs.layer
    place = choose(params.compute, needs, compute_device(params.compute), World())
    if place == "disk":
        return _on_disk(architecture, params, needs, written)
    kept = layer + needs.states if params.compute.gradient_checkpointing or place != "none" else needs.kept
    windows = params.tokenize.evaluation_windows * params.tokenize.evaluation_length
    judged = min(KEPT, windows * architecture.sizes.get("vocab", 0) * computed.itemsize)
    sums = _held_sums(params, written)
    held = {
        "prepare": round(2.4 * dense),
        "gradients": 2 * weights + sums["gradients"] + 4 * logits + kept,
        "hessian": 2 * weights + sums["hessian"] + 4 * logits + kept,
        "activations": weights + sums["activations"] + round(2.5 * logits) + layer,
        **dict.fromkeys(("ablation", "sensitivity", "depth", "levels", "allocate"), 2 * weights + 4 * logits),
        "width": 2 * weights + 4 * logits + sums["width"],
        # the proof, by two processes
        "slice": max(2 * total * torch.float32.itemsize + LIBRARIES, weights + _experts_fit(architecture, params)),
        "recover": _training(architecture, params, needs, written),
        "export": 3 * dense,
        "evaluate": 2 * weights + 4 * logits + layer + judged,
    }
    return {stage: size + LIBRARIES for stage, size in held.items()}


def _experts_fit(architecture: Architecture, params: Params) -> int:
    """Bytes of the fit of a layer's experts, all together, where experts go whole (`libprune.repair.experts`)."""
    if params.prepare.experts != "whole" or params.slice.repair in {"none", "bias"}:
        return 0
    model = architecture.sizes.get(RESIDUAL, 0)
    sizes = [
        copies * (10 * model * width + 3 * width**2) for width, _, copies in consumer_inputs(architecture) if copies > 1
    ]
    return torch.float32.itemsize * max(sizes, default=0)


def _training(architecture: Architecture, params: Params, needs: PassBytes, written: Sequence[Footprint]) -> int:
    """Bytes that a training holds at most, with the model to learn from if that is in memory; 0 without a training."""
    recover, compute = params.recover, params.compute
    if recover.method == "none":
        return 0
    training = next(stage.training for stage in written if stage.stage == "recover")
    passes = working_bytes(held_activations(compute, needs), needs.logits)
    if recover.runs_teacher:
        teacher = teacher_needs(architecture, recover, compute, compute_dtype(compute))
        beside = training - teacher.weights + passes
        if choose(compute, teacher, compute_device(compute), World(), beside) == "disk":
            training -= teacher.weights
    return training + passes


def _on_disk(
    architecture: Architecture, params: Params, needs: PassBytes, written: Sequence[Footprint]
) -> dict[str, int]:
    """Bytes that the processes hold with weights on disk, beside pages of files, which the system can drop."""
    forward = needs.layer // 2 + needs.logits
    sums = _held_sums(params, written)
    read = 2 * torch.float32.itemsize * max(map(architecture.numel, architecture.parameters))

    def backward(stage: str, sequences: int | None) -> int:
        """The sums grow when the logits of a pass have gone; in the next pass they are still there."""
        last, loss = needs.layer + needs.states, 3 * needs.logits
        grown, tokens = needs.summed + sums[stage], params.tokenize
        number = min(sequences or tokens.calibration_sequences, tokens.calibration_sequences)
        single = number * tokens.calibration_length <= params.compute.batch_tokens
        return last + (max(loss, grown) if single else loss + grown)

    dequantised = read if params.prepare.model.endswith(".gguf") else 0
    fitted = _FITTED * max(width for width, _, _ in consumer_inputs(architecture)) ** 2
    sizes = dict.fromkeys(range(architecture.layers), 0)
    for layer, part in architecture.blocks():
        sizes[layer] += sum(map(architecture.numel, architecture.parameters_of(layer, part)))
    layers = 2 if params.slice.block_ahead else 1
    trained = layers * needs.layer + _TRAINED * max(sizes.values()) if params.slice.repair == "block" else 0
    held = {
        "prepare": needs.described + dequantised,
        "gradients": backward("gradients", params.gradients.sequences),
        "hessian": backward("hessian", params.hessian.sequences),
        "activations": needs.layer // 2 + sums["activations"] + needs.grams,
        **dict.fromkeys(("ablation", "sensitivity", "depth"), forward),
        **dict.fromkeys(("levels", "width", "allocate"), max(fitted, forward)),
        "slice": max(fitted, trained, _experts_fit(architecture, params)) + LIBRARIES,
        "recover": _training(architecture, params, needs, written),
        "evaluate": forward + needs.logits,
    }
    return {stage: size + LIBRARIES for stage, size in held.items()}


def measured_rate(architecture: Architecture, params: Params) -> float:
    """Floating point operations a second of a layer, forward and backward, in the type and on the device of passes.

    The layer is that of a Llama, with the model's width up to `_WIDEST`. The products of its six maps are counted.
    Products alone can be twice as fast as passes.
    """
    width = min(architecture.sizes.get(RESIDUAL, _WIDEST), _WIDEST)
    inner = min(max(size for size, _, _ in consumer_inputs(architecture)), 4 * width)
    options: dict[str, Any] = {"device": compute_device(params.compute), "dtype": compute_dtype(params.compute)}
    sizes = [(width, width), (width, width), (width, width), (inner, width), (inner, width), (width, inner)]
    maps = [torch.full(size, 0.01, **options).requires_grad_() for size in sizes]
    states = torch.linspace(-1, 1, width, **options).expand(_SEQUENCES, _LENGTH, width)
    head = next(size for size in range(min(_HEAD, width), 0, -1) if width % size == 0)

    def normed(given: Tensor) -> Tensor:
        exact = given.float()
        return (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)).to(given.dtype)

    def one_pass() -> float:
        query, key, out, gate, up, down = maps
        read = normed(states)
        ours, theirs = (linear(read, one).unflatten(-1, (-1, head)).transpose(1, 2) for one in (query, key))
        met = scaled_dot_product_attention(ours, theirs, theirs, is_causal=True).transpose(1, 2).flatten(-2)
        there = states + linear(met, out)
        read = normed(there)
        there = there + linear(silu(linear(read, gate)) * linear(read, up), down)
        found = torch.autograd.grad(there.float().square().sum(), maps)
        return float(found[0][0, 0])  # reading a number waits for the device

    one_pass()
    start, times = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        one_pass()
        times += 1
    counted = 6.0 * _SEQUENCES * _LENGTH * sum(map(math.prod, sizes))
    return times * counted / (time.perf_counter() - start)


def lines(architecture: Architecture, params: Params, found: Forecast, stages: Sequence[str], root: Path) -> list[str]:
    """The forecast in lines for the terminal.

    Args:
        stages: those that will run.
        root: the folder that is written to.
    """
    ratio, size = params.allocate.ratio, architecture.total_parameters / 1e6
    share = "the share that the scores allow" if ratio is None else f"{100 * ratio:g} %"
    of = {"decoder": "the decoder", "total": "the whole model"}[params.allocate.ratio_of]
    what = {"parameters": "parameters", "macs": "operations", "cache": "KV cache", "latency": "time"}
    asked = f"{share} of the {what[params.allocate.objective]} of {of}"
    if limits := params.allocate.budgets.asked:
        asked = (
            "what the budgets ask for (" + ", ".join(f"{name} to {100 * one:g} %" for name, one in limits.items()) + ")"
        )
    seconds = sum(found.seconds.values())
    free, whole = shutil.disk_usage(root).free, psutil.virtual_memory().total
    gone = [stage for stage in found.seconds if stage in found.recorded]
    basis = "from earlier runs here" if len(gone) == len(found.seconds) else "from a small layer that was timed"
    if 0 < len(gone) < len(found.seconds):
        basis = "from earlier runs here and a small layer that was timed"
    if params.prepare.vocabulary is not None and architecture.trimmed is None:
        asked = f"rows of the vocabulary will go, which are still counted here, and {asked}"
    late = "; the export comes on top" if "export" in stages else ""
    return [
        f"{masked(Path(params.prepare.model).name)}: {size:,.1f} million parameters; {asked} will go",
        f"{len(stages)} stages will run: {', '.join(stages)}",
        f"time:   about {_time(seconds)}, an estimate {basis}{late}",
        f"memory: about {gigabytes(found.memory[0])} in {found.memory[1]}, of {gigabytes(whole)} in this machine",
        f"disk:   up to {gigabytes(found.disk)}, where {gigabytes(free)} are free",
    ]


def _time(seconds: float) -> str:
    """A time in words; from an hour on in hours."""
    if seconds < 60:
        return "a minute" if seconds > 30 else "half a minute"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def main(words: Sequence[str]) -> None:
    """Print the forecast for a run as JSON: `lines` to be shown, and the `work` of each stage.

    Args:
        words: the params file, the folder of artifacts, the file of recorded costs, and the stages that will run.
    """
    file, artifacts, costs, *stages = words
    try:
        params = load_params(Path(file))
        architecture, stored = dense_architecture(params, Layout(Path(artifacts)), described="prepare" not in stages)
        record = read_memory(Path(costs))
        found = forecast(architecture, params, stored, stages, record, measured_rate(architecture, params))
        told = lines(architecture, params, found, stages, Path())
    except LibpruneError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(1) from None
    print(json.dumps({"lines": told, "work": found.work}))


if __name__ == "__main__":
    main(sys.argv[1:])
