"""The dense, the pruned and the recovered model measured side by side, as metrics."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from libprune.collection.calibration import place
from libprune.collection.offload import pass_bytes, scratch_of, settle
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe import with_biases
from libprune.engine.errors import LibpruneError, StatisticsError
from libprune.engine.heads import writes
from libprune.engine.plan import Plan
from libprune.models.compute import KEPT, resolve_device, resolve_dtype
from libprune.models.folder import load_config, load_model, own_model, require_positions
from libprune.models.parallel import World
from libprune.models.sequences import Sequences
from libprune.models.tokens import Ids, read_tokens
from libprune.pipeline.artifacts import read_architecture, read_plan, same_origin
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Evaluate
from libprune.pipeline.terminal import Bar
from libprune.results.continuations import Beginnings, choose_beginnings, decode_greedily, show_continuations
from libprune.results.draft import Beside, Overlap, draft_figures
from libprune.results.perplexity import Losses, accuracy, estimate_perplexity, estimate_ratio, label_hits, window_losses
from libprune.results.record import read_record, read_recovered, read_whole
from libprune.results.routing import Choices, routing_changes, watched
from libprune.results.similarity import Embeddings, similarity, window_embeddings
from libprune.results.speed import Speed, SpeedComparison, compare_speed
from libprune.results.tasks import zero_shot
from libprune.vocabulary.price import vocabulary_figures


def evaluate_result(layout: Layout, compute: Compute, params: Evaluate) -> dict[str, Any]:
    """Evaluate a pruned model, and a recovered one if there is one, beside the dense model.

    Returns:
        The content of `artifacts/evaluation.json`, which is all that the report needs.

    Raises:
        LibpruneError: if an artifact is missing or foreign, or the params ask for what the model cannot do.
    """
    run = _set_up(layout, compute, params)
    measured, speed = run.measure_all()
    written = {name: one.written for name, one in measured.items()}
    tasks = measured["dense"].tasks
    return {
        **_facts(run),
        **_figures(run, measured, speed),
        "tasks": {task: {name: one.tasks[task] for name, one in measured.items()} for task in tasks},
        **_routing(run, measured),
        "continuations": show_continuations(run.tokenizer, run.beginnings, written) if run.writes else [],
        "speed": {name: value for name, value in asdict(speed).items() if name not in {"dense", "pruned"}},
        **_vocabulary(run),
        "protocol": _protocol(run),
    }


def _set_up(layout: Layout, compute: Compute, params: Evaluate) -> "_Run":
    """Read all artifacts but the models, and refuse what cannot be measured before anything is."""
    architecture = read_architecture(layout)
    plan, plan_meta = read_plan(layout, architecture)
    provenance = read_whole(layout.pruned, layout, plan_meta).provenance
    recovered = read_recovered(layout, provenance)
    windows, meta = read_tokens(layout.evaluation_tokens, architecture.fingerprint)
    same_origin(layout.evaluation_tokens, meta, {"calibration": provenance.get("tokens")})
    config, windows = load_config(own_model(layout, architecture)), windows.shortest_first()
    made = (architecture, config, plan, provenance, recovered)
    run = _Run(layout, compute, params, *made, windows, meta["source"], meta["tokens"])
    timed = {"evaluate.prompt_tokens + decode_tokens": run.prompt_tokens + run.decode_tokens}
    require_positions(config, architecture, timed)
    if params.tasks and not run.writes:
        raise LibpruneError("evaluate.tasks are questions to models that write; set it to [] for this one")
    return run


@dataclass(frozen=True)
class _Measured:
    """Measurements on one model.

    Attributes:
        losses: by window; none of models that give embeddings.
        embeddings: of the windows, by models that give some.
        tasks: accuracies by task.
        written: token ids of its continuations.
        overlap: of its predictions with the dense model's; None of the dense model, and of models that do not write.
        choices: the experts that the tokens of the windows went through.
    """

    losses: Losses
    embeddings: Embeddings | None
    tasks: dict[str, dict[str, float]]
    written: Ids
    overlap: Overlap | None
    choices: Choices


@dataclass(frozen=True)
class _Run:
    """What all models are measured on, where they run, and how they were made."""

    layout: Layout
    compute: Compute
    params: Evaluate
    architecture: Architecture
    config: PreTrainedConfig
    plan: Plan
    provenance: dict[str, Any]
    recovered: dict[str, Any] | None
    windows: Sequences
    text: str
    tokens: str

    @property
    def writes(self) -> bool:
        """Whether the models write, and do not only read."""
        return writes(self.architecture.head)

    @property
    def embeds(self) -> bool:
        """Whether the models give embeddings."""
        return self.architecture.head == "embedding"

    @property
    def prompt_tokens(self) -> int:
        return min(self.params.prompt_tokens, self.windows.ids.numel())

    @property
    def decode_tokens(self) -> int:
        return self.params.decode_tokens if self.writes else 0

    @cached_property
    def device(self) -> torch.device:
        return resolve_device(self.compute.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        return resolve_dtype(self.compute.dtype, self.device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.layout.model, local_files_only=True, trust_remote_code=False
        )
        return tokenizer

    @cached_property
    def beginnings(self) -> Beginnings:
        return choose_beginnings(self.windows.ids.numpy(), self.params.continuations, self.params.continuation_tokens)

    @cached_property
    def settled(self) -> Compute:
        """How models are run, with the place of their weights chosen; two of them run side by side."""
        tokens = max(self.compute.batch_tokens, self.windows.ids.shape[1])
        needs = pass_bytes(self.architecture, tokens, self.dtype)
        needs = replace(needs, weights=2 * needs.weights, kept=needs.layer)
        return settle(self.compute, needs, self.device, World())

    def load(self, folder: Path) -> PreTrainedModel:
        """Load a model where it will run; the code of a folder runs only if its layers differ in width."""
        remote = self.provenance["plan"]["shape"] == "per_layer" and folder != self.layout.model
        scratch = scratch_of(self.layout, self.settled)
        model = load_model(folder, self.dtype, trust_remote_code=remote, scratch=scratch)
        own = self.architecture if folder == self.layout.model else read_record(folder).architecture
        return place(model, own, self.settled, World(), self.device)

    def measure_all(self) -> tuple[dict[str, _Measured], SpeedComparison]:
        """Measure all models, and time the dense and the pruned one alternately; at most two are in memory at once."""
        with Bar(total=self.steps, desc="evaluate", unit="step") as bar:
            dense = self.load(self.layout.model)
            most = 0 if self.settled.offload == "disk" else KEPT  # memory is what there is too little of
            beside = Beside(dense, self.windows, self.compute.batch_tokens, most)
            measured = {"dense": self.measure("dense", dense, bar, beside)}
            pruned = self.load(self.layout.pruned)
            measured["pruned"] = self.measure("pruned", pruned, bar, beside)
            bar.set_description("evaluate: speed", refresh=False)
            prompt = self.windows.ids.reshape(1, -1)[:, : self.prompt_tokens].to(self.device)
            speed = compare_speed(dense, pruned, prompt, self.decode_tokens, self.params.rounds, bar.update)
            del pruned
            if self.recovered is not None:
                measured["recovered"] = self.measure("recovered", self.load(self.layout.recovered), bar, beside)
        return measured, speed

    @property
    def steps(self) -> int:
        """How often the progress bar moves: a window that a model reads, a round of timing, a model's continuations."""
        others, windows = 1 + (self.recovered is not None), len(self.windows)
        reading = 1 + (self.architecture.head == "sequence_classification")
        writing = self.writes and len(self.beginnings.windows) > 0
        return (1 + others) * (reading * windows + writing) + self.params.rounds + 1

    def measure(self, name: str, model: PreTrainedModel, bar: Bar, beside: Beside) -> _Measured:
        """Measure the losses of a model and its accuracies, and let it continue the beginnings.

        Args:
            name: of the model.
            model: on the device.
            bar: goes on with every window, and with the continuations.
            beside: the dense model, whose predictions those of a model that writes are compared with.
        """
        params, tokens, tasks = self.params, self.compute.batch_tokens, dict[str, dict[str, float]]()
        bar.set_description(f"evaluate: {name}", refresh=False)
        losses, embeddings, overlap, beginnings = np.zeros(0), None, None, self.beginnings
        plan = Plan.dense(self.architecture) if name == "dense" else self.plan
        with watched(model, self.architecture, plan) as choices:
            if self.embeds:
                embeddings = window_embeddings(model, self.windows, tokens, bar)
            elif self.writes:
                losses, overlap = beside.read(model, bar)
            else:
                losses = window_losses(model, self.windows, tokens, bar)
        if not np.isfinite(losses).all():
            raise StatisticsError(
                f"evaluate: the loss of the {name} model is not finite in window {np.isfinite(losses).argmin()}; try "
                "compute.dtype: float32, and check that the model is sound on this text"
            )
        if params.tasks:
            given = (params.tasks, params.task_folder, params.task_limit, params.task_batch)
            tasks = zero_shot(model, self.tokenizer, *given)
        if self.architecture.head == "sequence_classification":
            tasks = {"labels": accuracy(label_hits(model, self.windows, tokens, bar))}
        length = beginnings.prompts.shape[1]
        written = np.zeros((0, length), np.int64)
        if self.writes and len(beginnings.windows):
            written = decode_greedily(model, beginnings.prompts, length)
            bar.update()
        return _Measured(losses, embeddings, tasks, written, overlap, choices)


def _facts(run: _Run) -> dict[str, Any]:
    """How the models were made, and what is left of the dense one."""
    architecture, provenance = run.architecture, run.provenance
    left, recovered = _left(run), run.recovered
    recorded = ("tokens", "repair_text", "slice", "repair", "proof", "versions")
    return {
        "plan": provenance["plan"],
        "pruning": {name: provenance[name] for name in recorded},
        "recovery": None if recovered is None else recovered["recovery"],
        "model": {
            "type": run.config.model_type,
            "head": architecture.head,
            "sizes": dict(architecture.sizes),
            "biases": [part for part in left.parts if _biased(left, part)],
        },
        "units": {part: architecture.units(part) for part in architecture.parts},
        "unit_kinds": {part: shape.units for part, shape in architecture.parts.items()},
        "kept": [
            {part: run.plan.kept(layer, part) for part in architecture.parts_of(layer)}
            for layer in range(architecture.layers)
        ],
        **_groups(architecture, run.plan),
    }


def _groups(architecture: Architecture, plan: Plan) -> dict[str, Any]:
    """The groups of parts whose units are query heads, and how many each layer keeps; nothing of other models."""
    shapes = {part: shape for part, shape in architecture.parts.items() if shape.outer}
    if not shapes:
        return {}
    kept = [
        {
            part: int(shape.groups_left(plan.keep[layer, part]).sum())
            for part, shape in shapes.items()
            if (layer, part) in plan.keep
        }
        for layer in range(architecture.layers)
    ]
    return {"groups": {part: shape.groups for part, shape in shapes.items()}, "kept_groups": kept}


def _left(run: _Run) -> Architecture:
    """The dense model's architecture with the biases that the repair has added."""
    left, _ = with_biases(run.architecture, run.config, run.provenance["biases_added"])
    return left


def _protocol(run: _Run) -> dict[str, Any]:
    """How the figures were measured."""
    return {
        "text": run.text,
        "tokens": run.tokens,
        "windows": len(run.windows),
        "length": run.windows.length,
        "prompt_tokens": run.prompt_tokens,
        "decode_tokens": run.decode_tokens,
        "rounds": run.params.rounds,
        "continuation_tokens": run.beginnings.prompts.shape[1],
        "dtype": str(run.dtype).removeprefix("torch."),
        "device": str(run.device),
    }


def _figures(run: _Run, measured: Mapping[str, _Measured], speed: SpeedComparison) -> dict[str, Any]:
    """The figures of each model; size and speed of the recovered one are those of the pruned one."""
    dense = measured["dense"]
    quality = {name: _quality(dense, one) for name, one in measured.items()}
    ratios = {name: None if run.embeds else _ratio(dense.losses, one.losses) for name, one in measured.items()}
    drafts = {name: _draft(one, speed) for name, one in measured.items()}
    whole, left = run.architecture, _left(run)
    figures = {
        "dense": _one(whole, Plan.dense(whole), quality["dense"], speed.dense, run.dtype),
        "pruned": _one(left, run.plan, quality["pruned"], speed.pruned, run.dtype)
        | _removed(whole, left, run.plan)
        | {"draft": drafts["pruned"]},
        "perplexity_ratio": ratios["pruned"],
        "recovered": None,
    }
    if run.recovered is not None:
        compared = {"perplexity_ratio": ratios["recovered"], "draft": drafts["recovered"]}
        figures["recovered"] = quality["recovered"] | compared
    return figures


def _routing(run: _Run, measured: Mapping[str, _Measured]) -> dict[str, Any]:
    """What became of the dense model's routing; empty for models without mixtures."""
    others = {name: one.choices for name, one in measured.items() if name != "dense"}
    changes = routing_changes(measured["dense"].choices, others, run.architecture, run.plan)
    return {"routing": changes} if changes else {}


def _vocabulary(run: _Run) -> dict[str, Any]:
    """What went with the vocabulary, and what this costs; empty where all tokens stay."""
    found = vocabulary_figures(run.layout, run.architecture, run.windows, run.tokenizer)
    if found is None:
        return {}
    sizes = {when: number * run.dtype.itemsize for when, number in found["parameters"].items()}
    return {"vocabulary": found | {"bytes": sizes}}


def _draft(measured: _Measured, speed: SpeedComparison) -> dict[str, Any] | None:
    """What a model is worth as a draft for the dense one; None of the dense model, and of models that do not write."""
    if measured.overlap is None or speed.decode_ratio is None:
        return None
    return draft_figures(measured.overlap, 1 / speed.decode_ratio)


def _quality(dense: _Measured, other: _Measured) -> dict[str, float]:
    """The perplexity of a model, or how near its embeddings are to the dense model's, which has no such figure."""
    if dense.embeddings is not None and other.embeddings is not None:
        return {} if other is dense else similarity(dense.embeddings, other.embeddings)
    estimate = estimate_perplexity(other.losses)
    return {"perplexity": estimate.value, "perplexity_se": estimate.error}


def _ratio(dense: Losses, other: Losses) -> dict[str, float]:
    ratio = estimate_ratio(dense, other)
    return {"value": ratio.value, "se": ratio.error}


def _biased(architecture: Architecture, part: str) -> bool:
    """Whether the maps that read the units of a part have biases."""
    names = {parameter.name for parameter in architecture.parameters}
    return any(consumer.bias in names for consumer in architecture.consumers(architecture.with_part(part)[0], part))


def _one(
    architecture: Architecture, plan: Plan, quality: Mapping[str, float], speed: Speed, dtype: torch.dtype
) -> dict[str, Any]:
    """The figures of the dense or the pruned model."""
    size = cost.size(architecture, plan)
    return {
        **quality,
        "decoder_parameters": size.decoder,
        "total_parameters": size.total,
        "bytes": size.total * dtype.itemsize,
        "cache_bytes": size.cache * dtype.itemsize,
        "state_bytes": size.state * torch.float32.itemsize,
        "macs_per_token": size.macs,
        "prefill": speed.prefill,
        "decode": speed.decode,
    }


def _removed(architecture: Architecture, pruned: Architecture, plan: Plan) -> dict[str, float]:
    """The removed shares of parameters and operations, of all with those that went with rows of the vocabulary.

    ``pruned`` is the dense model's architecture with the biases that the repair has added.
    """
    dense, left = cost.size(architecture, Plan.dense(architecture)), cost.size(pruned, plan)
    return {
        "decoder_share_removed": 1 - left.decoder / dense.decoder,
        "total_share_removed": 1 - left.total / architecture.given_parameters,
        "macs_share_removed": 1 - left.macs / (dense.macs + (architecture.trimmed.macs if architecture.trimmed else 0)),
    }


_QUALITY = ("perplexity", "perplexity_se", "cosine", "cosine_se", "rank_correlation", "rank_correlation_se")


def headline_metrics(result: dict[str, Any]) -> dict[str, Any]:
    """The few figures of `metrics/evaluation.json`, which `dvc metrics diff` and `dvc exp show` print."""
    shares = ("decoder_share_removed", "total_share_removed", "macs_share_removed")
    dense, ratio = (
        {name: result["dense"][name] for name in _QUALITY if name in result["dense"]},
        result["perplexity_ratio"],
    )
    recovered, recovery = result["recovered"], result["recovery"]
    trained = {name: recovery[name] for name in ("tokens", "seconds", "trained_parameters")} if recovery else {}
    routing = result.get("routing")
    return {
        **({"dense": dense} if dense else {}),
        "pruned": {name: result["pruned"][name] for name in (*_QUALITY, *shares, "draft") if name in result["pruned"]},
        **({"perplexity_ratio": ratio} if ratio else {}),
        **({"recovered": recovered | trained} if recovered else {}),
        **({"routing": {name: routing[name] for name in ("removed_weight", "changed")}} if routing else {}),
        **({"tasks": result["tasks"]} if result["tasks"] else {}),
        "speed": {name: result["speed"][name] for name in ("prefill_ratio", "decode_ratio")},
    }
