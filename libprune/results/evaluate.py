"""The dense and the pruned model measured side by side, as metrics."""

from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe import with_biases
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.models.compute import resolve_device, resolve_dtype
from libprune.models.folder import load_config, load_model, require_positions
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, read_plan, require, same_origin
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Evaluate
from libprune.results.continuations import continue_windows
from libprune.results.perplexity import Losses, accuracy, estimate_perplexity, estimate_ratio, label_hits, window_losses
from libprune.results.record import read_provenance
from libprune.results.speed import Speed, compare_speed
from libprune.results.tasks import zero_shot


def evaluate_result(layout: Layout, compute: Compute, params: Evaluate) -> dict[str, Any]:
    """Evaluate a pruned model beside its dense model.

    Returns:
        The content of `artifacts/evaluation.json`, which is all that the report needs.

    Raises:
        LibpruneError: if an artifact is missing or foreign.
    """
    architecture = read_architecture(layout)
    plan, plan_meta = read_plan(layout, architecture)
    provenance = read_provenance(require(layout.pruned, "slice"))
    same_origin(layout.pruned, provenance["plan"], plan_meta)
    windows, tokens_meta = read_tokens(layout.evaluation_tokens, architecture.fingerprint)
    windows, config, writes = windows.shortest_first(), load_config(layout.model), architecture.head == "causal_lm"
    prompt_tokens, decode_tokens = min(params.prompt_tokens, windows.ids.numel()), params.decode_tokens if writes else 0
    require_positions(config, architecture, {"evaluate.prompt_tokens + decode_tokens": prompt_tokens + decode_tokens})
    if params.tasks and not writes:
        raise LibpruneError("evaluate.tasks are questions to models that write; set it to [] for this one")
    device = resolve_device(compute.device)
    dtype = resolve_dtype(compute.dtype, device)
    dense = load_model(layout.model, dtype).to(device)
    pruned = load_model(layout.pruned, dtype, trust_remote_code=plan_meta["shape"] == "per_layer").to(device)

    left, _ = with_biases(architecture, config, provenance["biases_added"])
    models = {"dense": dense, "pruned": pruned}
    losses = [window_losses(model, windows, compute.batch_tokens, name) for name, model in models.items()]
    prompt = windows.ids.reshape(1, -1)[:, :prompt_tokens].to(device)
    speed = compare_speed(dense, pruned, prompt, decode_tokens, params.rounds)
    ratio = estimate_ratio(losses[0], losses[1])
    tokenizer = AutoTokenizer.from_pretrained(layout.model, local_files_only=True)
    tasks = _zero_shot(tokenizer, models, params) if params.tasks else {}
    if architecture.head == "sequence_classification":
        hits = {name: label_hits(model, windows, compute.batch_tokens, name) for name, model in models.items()}
        tasks = {"labels": {name: accuracy(right) for name, right in hits.items()}}
    written = params.continuations if writes else 0
    return {
        "plan": plan_meta,
        "pruning": {name: provenance[name] for name in ("slice", "repair", "proof", "versions")},
        "model": {
            "type": pruned.config.model_type,
            "head": architecture.head,
            "sizes": dict(architecture.sizes),
            "biases": [part for part in left.parts if _biased(left, part)],
        },
        "units": {part: architecture.units(part) for part in architecture.parts},
        "kept": [{part: plan.kept(layer, part) for part in architecture.parts} for layer in range(architecture.layers)],
        "dense": _one(architecture, Plan.dense(architecture), losses[0], speed.dense, dtype),
        "pruned": _one(left, plan, losses[1], speed.pruned, dtype) | _removed(architecture, left, plan),
        "perplexity_ratio": {"value": ratio.value, "se": ratio.error},
        "tasks": tasks,
        "continuations": continue_windows(models, tokenizer, windows.ids.numpy(), written, params.continuation_tokens),
        "speed": {name: value for name, value in asdict(speed).items() if name not in {"dense", "pruned"}},
        "protocol": {
            "text": tokens_meta["source"],
            "windows": len(windows),
            "length": windows.ids.shape[1],
            "prompt_tokens": prompt.shape[1],
            "decode_tokens": decode_tokens,
            "rounds": params.rounds,
            "continuation_tokens": min(params.continuation_tokens, windows.ids.shape[1] // 2),
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
        },
    }


def _zero_shot(
    tokenizer: PreTrainedTokenizerBase, models: dict[str, PreTrainedModel], params: Evaluate
) -> dict[str, Any]:
    """Zero-shot accuracy by task, then by model."""
    accuracies = {
        name: zero_shot(model, tokenizer, params.tasks, params.task_folder, params.task_limit, params.task_batch)
        for name, model in models.items()
    }
    return {task: {name: figures[task] for name, figures in accuracies.items()} for task in params.tasks}


def _biased(architecture: Architecture, part: str) -> bool:
    """Whether the maps that read the units of a part have biases."""
    names = {parameter.name for parameter in architecture.parameters}
    return any(consumer.bias in names for consumer in architecture.consumers(0, part))


def _one(architecture: Architecture, plan: Plan, losses: Losses, speed: Speed, dtype: torch.dtype) -> dict[str, Any]:
    """The figures of one of the two models."""
    estimate, size = estimate_perplexity(losses), cost.size(architecture, plan)
    return {
        "perplexity": estimate.value,
        "perplexity_se": estimate.error,
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
    return {
        "dense": {name: result["dense"][name] for name in ("perplexity", "perplexity_se")},
        "pruned": {name: result["pruned"][name] for name in ("perplexity", "perplexity_se", *shares)},
        "perplexity_ratio": result["perplexity_ratio"],
        **({"tasks": result["tasks"]} if result["tasks"] else {}),
        "speed": {name: result["speed"][name] for name in ("prefill_ratio", "decode_ratio")},
    }
