"""The dense, the pruned and the recovered model measured side by side, as metrics."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe import with_biases
from libprune.engine.errors import LibpruneError
from libprune.engine.heads import HeadName
from libprune.engine.plan import Plan
from libprune.models.compute import resolve_device, resolve_dtype
from libprune.models.folder import load_config, load_model, require_positions
from libprune.models.sequences import Sequences
from libprune.models.tokens import Ids, read_tokens
from libprune.pipeline.artifacts import read_architecture, read_plan, require, same_origin
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Evaluate
from libprune.results.continuations import Beginnings, choose_beginnings, decode_greedily, show_continuations
from libprune.results.perplexity import Losses, accuracy, estimate_perplexity, estimate_ratio, label_hits, window_losses
from libprune.results.record import read_provenance, read_recovered
from libprune.results.speed import Speed, SpeedComparison, compare_speed
from libprune.results.tasks import zero_shot


def evaluate_result(layout: Layout, compute: Compute, params: Evaluate) -> dict[str, Any]:
    """Evaluate a pruned model, and a recovered one if there is one, beside the dense model.

    Returns:
        The content of `artifacts/evaluation.json`, which is all that the report needs.

    Raises:
        LibpruneError: if an artifact is missing or foreign.
    """
    architecture = read_architecture(layout)
    plan, plan_meta = read_plan(layout, architecture)
    provenance = read_provenance(require(layout.pruned, "slice"))
    same_origin(layout.pruned, provenance["plan"], plan_meta)
    recovered = read_recovered(layout.recovered, provenance)
    windows, tokens_meta = read_tokens(layout.evaluation_tokens, architecture.fingerprint)
    windows, config, writes = windows.shortest_first(), load_config(layout.model), architecture.head == "causal_lm"
    prompt_tokens, decode_tokens = min(params.prompt_tokens, windows.ids.numel()), params.decode_tokens if writes else 0
    require_positions(config, architecture, {"evaluate.prompt_tokens + decode_tokens": prompt_tokens + decode_tokens})
    if params.tasks and not writes:
        raise LibpruneError("evaluate.tasks are questions to models that write; set it to [] for this one")
    run = _Run(layout, architecture.head, windows, compute, params, remote=plan_meta["shape"] == "per_layer")
    measured, speed = run.compare(prompt_tokens, decode_tokens)
    if recovered is not None:
        measured["recovered"] = run.measure("recovered", run.load(layout.recovered))

    left, _ = with_biases(architecture, config, provenance["biases_added"])
    losses = {name: one.losses for name, one in measured.items()}
    written = {name: one.written for name, one in measured.items()}
    return {
        "plan": plan_meta,
        "pruning": {name: provenance[name] for name in ("slice", "repair", "proof", "versions")},
        "model": {
            "type": config.model_type,
            "head": architecture.head,
            "sizes": dict(architecture.sizes),
            "biases": [part for part in left.parts if _biased(left, part)],
        },
        "units": {part: architecture.units(part) for part in architecture.parts},
        "kept": [{part: plan.kept(layer, part) for part in architecture.parts} for layer in range(architecture.layers)],
        "dense": _one(architecture, Plan.dense(architecture), losses["dense"], speed.dense, run.dtype),
        "pruned": _one(left, plan, losses["pruned"], speed.pruned, run.dtype) | _removed(architecture, left, plan),
        "perplexity_ratio": _ratio(losses["dense"], losses["pruned"]),
        "recovered": None if recovered is None else _recovered(losses["dense"], losses["recovered"]),
        "recovery": None if recovered is None else recovered["recovery"],
        "tasks": {task: {name: one.tasks[task] for name, one in measured.items()} for task in measured["dense"].tasks},
        "continuations": show_continuations(run.tokenizer, run.beginnings, written) if writes else [],
        "speed": {name: value for name, value in asdict(speed).items() if name not in {"dense", "pruned"}},
        "protocol": {
            "text": tokens_meta["source"],
            "windows": len(windows),
            "length": windows.ids.shape[1],
            "prompt_tokens": prompt_tokens,
            "decode_tokens": decode_tokens,
            "rounds": params.rounds,
            "continuation_tokens": run.beginnings.prompts.shape[1],
            "dtype": str(run.dtype).removeprefix("torch."),
            "device": str(run.device),
        },
    }


@dataclass(frozen=True)
class _Measured:
    """Measurements on one model: losses by window, accuracies by task, and the token ids of its continuations."""

    losses: Losses
    tasks: dict[str, dict[str, float]]
    written: Ids


@dataclass(frozen=True)
class _Run:
    """What all models are measured on, and where they run."""

    layout: Layout
    head: HeadName
    windows: Sequences
    compute: Compute
    params: Evaluate
    remote: bool

    @cached_property
    def device(self) -> torch.device:
        return resolve_device(self.compute.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        return resolve_dtype(self.compute.dtype, self.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.layout.model, local_files_only=True)
        return tokenizer

    @cached_property
    def beginnings(self) -> Beginnings:
        return choose_beginnings(self.windows.ids.numpy(), self.params.continuations, self.params.continuation_tokens)

    def load(self, folder: Path) -> PreTrainedModel:
        """Load a model on the device; the code of a folder runs only if its layers differ in width."""
        remote = self.remote and folder != self.layout.model
        return load_model(folder, self.dtype, trust_remote_code=remote).to(self.device)

    def compare(self, prompt_tokens: int, decode_tokens: int) -> tuple[dict[str, _Measured], SpeedComparison]:
        """Measure the dense and the pruned model, and time them alternately; both are gone from memory afterwards."""
        dense, pruned = self.load(self.layout.model), self.load(self.layout.pruned)
        prompt = self.windows.ids.reshape(1, -1)[:, :prompt_tokens].to(self.device)
        measured = {name: self.measure(name, model) for name, model in (("dense", dense), ("pruned", pruned))}
        return measured, compare_speed(dense, pruned, prompt, decode_tokens, self.params.rounds)

    def measure(self, name: str, model: PreTrainedModel) -> _Measured:
        """Measure the losses of a model, its accuracies, and let it continue the beginnings."""
        params, tokens, tasks = self.params, self.compute.batch_tokens, dict[str, dict[str, float]]()
        losses, beginnings = window_losses(model, self.windows, tokens, name), self.beginnings
        if params.tasks:
            given = (params.tasks, params.task_folder, params.task_limit, params.task_batch)
            tasks = zero_shot(model, self.tokenizer, *given)
        if self.head == "sequence_classification":
            tasks = {"labels": accuracy(label_hits(model, self.windows, tokens, name))}
        writes = self.head == "causal_lm" and len(beginnings.windows)
        length = beginnings.prompts.shape[1]
        written = decode_greedily(model, beginnings.prompts, length) if writes else np.zeros((0, length), np.int64)
        return _Measured(losses, tasks, written)


def _recovered(dense: Losses, recovered: Losses) -> dict[str, Any]:
    """The figures of the recovered model; its size and its speed are those of the pruned one."""
    return _perplexity(recovered) | {"perplexity_ratio": _ratio(dense, recovered)}


def _perplexity(losses: Losses) -> dict[str, float]:
    estimate = estimate_perplexity(losses)
    return {"perplexity": estimate.value, "perplexity_se": estimate.error}


def _ratio(dense: Losses, other: Losses) -> dict[str, float]:
    ratio = estimate_ratio(dense, other)
    return {"value": ratio.value, "se": ratio.error}


def _biased(architecture: Architecture, part: str) -> bool:
    """Whether the maps that read the units of a part have biases."""
    names = {parameter.name for parameter in architecture.parameters}
    return any(consumer.bias in names for consumer in architecture.consumers(0, part))


def _one(architecture: Architecture, plan: Plan, losses: Losses, speed: Speed, dtype: torch.dtype) -> dict[str, Any]:
    """The figures of the dense or the pruned model."""
    size = cost.size(architecture, plan)
    return _perplexity(losses) | {
        "decoder_parameters": size.decoder,
        "total_parameters": size.total,
        "bytes": size.total * dtype.itemsize,
        "cache_bytes": size.cache * dtype.itemsize,
        "macs_per_token": size.macs,
        "prefill": speed.prefill,
        "decode": speed.decode,
    }


def _removed(architecture: Architecture, pruned: Architecture, plan: Plan) -> dict[str, float]:
    """The removed shares of parameters and operations.

    ``pruned`` is the dense model's architecture with the biases that the repair has added.
    """
    dense, left = cost.size(architecture, Plan.dense(architecture)), cost.size(pruned, plan)
    return {
        "decoder_share_removed": 1 - left.decoder / dense.decoder,
        "total_share_removed": 1 - left.total / dense.total,
        "macs_share_removed": 1 - left.macs / dense.macs,
    }


def headline_metrics(result: dict[str, Any]) -> dict[str, Any]:
    """The few figures of `metrics/evaluation.json`, which `dvc metrics diff` and `dvc exp show` print."""
    shares = ("decoder_share_removed", "total_share_removed", "macs_share_removed")
    recovered, recovery = result["recovered"], result["recovery"]
    trained = {name: recovery[name] for name in ("tokens", "seconds", "trained_parameters")} if recovery else {}
    return {
        "dense": {name: result["dense"][name] for name in ("perplexity", "perplexity_se")},
        "pruned": {name: result["pruned"][name] for name in ("perplexity", "perplexity_se", *shares)},
        "perplexity_ratio": result["perplexity_ratio"],
        **({"recovered": recovered | trained} if recovered else {}),
        **({"tasks": result["tasks"]} if result["tasks"] else {}),
        "speed": {name: result["speed"][name] for name in ("prefill_ratio", "decode_ratio")},
    }
