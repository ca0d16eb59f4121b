"""From a pruned folder to a recovered one: train it on what the dense model predicts, write it, prove that it loads."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from libprune.collection.accumulator import discard
from libprune.collection.calibration import own_device
from libprune.collection.offload import held_activations, pass_bytes
from libprune.collection.resumable import ROOMS, mention_others, only_one, work_identity
from libprune.engine.architecture import Architecture
from libprune.engine.describe import stored_tensors
from libprune.models.folder import load_model
from libprune.models.memory import recompute_layers, require_room
from libprune.models.parallel import World, join_world
from libprune.models.sequences import Sequences
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, require, same_origin
from libprune.pipeline.atomic import remove, writing_folder
from libprune.pipeline.digests import text_digest
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Recover
from libprune.pipeline.terminal import gigabytes, note
from libprune.recovery.curve import Recovery
from libprune.recovery.idle import write_figures
from libprune.recovery.memory import CHECKPOINTS, checkpoint_bytes, training_bytes, working_bytes
from libprune.recovery.predictions import LiveTeacher, StoredTeacher, Teacher, read_about
from libprune.recovery.student import finished_weights, load_student, prepare, trained_parameters
from libprune.recovery.teacher_model import load_teacher, prediction_origin, require_taught, settle_teacher
from libprune.recovery.training import Outcome, Schedule, Training, make_schedule
from libprune.results.card import write_card
from libprune.results.folder import save_weights
from libprune.results.proof import reference_logits, verify_folder
from libprune.results.record import Record, copy_files, read_whole, versions, write_provenance

_CHECKED_SEQUENCES, _CHECKED_LENGTH = 2, 64


def recover_layout(layout: Layout, compute: Compute, params: Recover, metrics: Path | None = None) -> Recovery | None:
    """Train the pruned model of a layout, write the recovered one and prove that it loads.

    A training that was stopped goes on from its last checkpoint; checkpoints of other settings are kept. The weights
    that are written are those of the step with the lowest loss on the held-out sequences; where no step lowered it,
    they stay as slice wrote them.

    Args:
        layout: holds the pruned model, the text to train on, and the dense model or its stored predictions; the
            recovered model is written into it.
        compute: where and in which type the models are run.
        params: how the model is trained; `method` is not `none`.
        metrics: the folder for the figures and the learning curve; None if they are not to be written.

    Returns:
        What the training came to; None in all processes but the first.

    Raises:
        LibpruneError: if an artifact is missing or foreign, the loss is not finite, the disk has no room, or the
            result fails its proof.
    """
    world = join_world()
    work = layout.work / "recover"
    with only_one(work.with_suffix(".lock")) if world.first else nullcontext():
        world.barrier()
        run = _set_up(layout, compute, params, world)
        home = work / run.identity
        if world.first:
            for left in work.glob(".discarded-*"):  # a process that was killed cannot clear up
                remove(left)
            mention_others(home, world)
        outcome, trained = _train(run, home)
        recovery = None
        if world.first:
            recovery = run.recovery(outcome, trained)
            with writing_folder(layout.recovered) as folder:
                weights = finished_weights(run.record, params, outcome.checkpoint)
                write_weights(folder, run.record, weights)
                write_recovery(folder, run.record, recovery, run.prove(folder, weights))
            if metrics is not None:
                write_figures(metrics, recovery.metrics(), recovery.curve)
            discard(home)  # last, or a run that is stopped before would train again
        world.barrier()
    return recovery


@dataclass(frozen=True)
class _Run:
    """What a training needs, and where it runs."""

    layout: Layout
    architecture: Architecture
    record: Record
    sequences: Sequences
    text: dict[str, Any]
    schedule: Schedule
    compute: Compute
    params: Recover
    world: World
    device: torch.device
    dtype: torch.dtype

    @property
    def origin(self) -> dict[str, str]:
        """What predictions to learn from are made from."""
        return prediction_origin(self.layout, self.architecture, self.params, self.text)

    @property
    def identity(self) -> str:
        """A digest of what checkpoints depend on."""
        facts = {
            "params": self.params.model_dump(mode="json"),
            "pruned": text_digest(self.record.provenance),
            **self.origin,
            "compute_dtype": str(self.dtype),
            "checkpointing": self.compute.gradient_checkpointing,
            "processes": self.world.size,
            "sharded": self.world.sharded,
            "device": self.device.type,
            "at_once": self.schedule.at_once,
        }
        return work_identity((*ROOMS, "recovery"), facts)

    def beside_teacher(self, trained: int, whole: int) -> int:
        """Bytes that the training is going to take of the memory of its device, beside the model to learn from.

        Args:
            trained: number of trained parameters.
            whole: number of all parameters of the pruned model, which lie in the memory of the host already.
        """
        tokens = max(self.compute.batch_tokens, self.params.length)
        needs = pass_bytes(self.architecture, tokens, self.dtype)
        there = training_bytes(0, whole, self.params) if self.device.type == "cpu" else 0
        passes = working_bytes(held_activations(self.compute, needs), needs.logits)
        return training_bytes(trained, whole, self.params) - there + passes

    def teacher(self, beside: int) -> Teacher | None:
        """The dense model where it runs, its stored predictions, or None where the loss compares with neither.

        Args:
            beside: what the training takes, in bytes.
        """
        if self.params.top_k is not None:
            origin = self.origin | {"top_k": self.params.top_k, "temperature": self.params.temperature}
            return StoredTeacher(require(self.layout.teacher, "teacher"), origin)
        read_about(require(self.layout.teacher, "teacher"), self.origin)
        if not self.params.compares:
            return None
        where = (self.world, self.device, self.dtype)
        compute = settle_teacher(self.architecture, self.params, self.compute, *where, beside)
        model = load_teacher(self.layout, self.architecture, self.params, compute, *where)
        first = len(self.sequences) - self.text["held_out"]
        hidden, on_disk = self.params.hidden_states > 0, compute.offload == "disk"
        return LiveTeacher(model, hidden=hidden, held_out=first, on_disk=on_disk)

    def training(self, teacher: Teacher | None) -> Training:
        """The training with what it learns from."""
        return Training(
            teacher=teacher,
            sequences=self.sequences,
            held_out=self.text["held_out"],
            layers=self.record.plan.layers,
            params=self.params,
            schedule=self.schedule,
            device=self.device,
            dtype=self.dtype,
            world=self.world,
        )

    def recovery(self, outcome: Outcome, trained: int) -> Recovery:
        """What the training came to."""
        number = len(self.sequences) - self.text["held_out"]
        return Recovery.of(outcome, self.params, self.schedule, number, self.sequences.length, self.text, trained)

    def prove(self, folder: Path, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Check that the folder, loaded in a fresh process, computes what the pruned model does with these weights.

        Returns:
            The largest difference of a logit, and the largest logit.
        """
        ids = self.sequences.ids[:_CHECKED_SEQUENCES, :_CHECKED_LENGTH]
        model = load_model(self.record.folder, torch.float32, trust_remote_code=self.record.remote)
        with torch.no_grad():
            for name, tensor in stored_tensors(model).items():
                tensor.copy_(weights[name])
        expected, head = reference_logits(model, ids), self.architecture.head
        proof = verify_folder(folder, ids, expected, self.record.remote, head)
        return {"logit_difference": proof.difference, "logit_scale": proof.scale}


def _set_up(layout: Layout, compute: Compute, params: Recover, world: World) -> _Run:
    architecture = read_architecture(layout)
    require_taught(architecture, params)
    record = read_whole(layout.pruned, layout, {"model": architecture.fingerprint})
    sequences, text = read_tokens(layout.recovery_tokens, architecture.fingerprint, stage="teacher")
    same_origin(layout.recovery_tokens, text, {"calibration": record.provenance.get("tokens")})
    device, dtype = own_device(compute, world)
    schedule = make_schedule(params, compute.batch_tokens, sequences.length, world.size)
    return _Run(layout, architecture, record, sequences, text, schedule, compute, params, world, device, dtype)


def _train(run: _Run, home: Path) -> tuple[Outcome, int]:
    """Train, and return what it came to and the number of trained parameters."""
    student = load_student(run.record, run.params)
    whole = sum(parameter.numel() for parameter in student.parameters())
    if run.compute.gradient_checkpointing:
        recompute_layers(student, run.architecture)
    model = prepare(student, run.params)
    trained = sum(parameter.numel() for parameter in trained_parameters(model).values())
    training = run.training(run.teacher(run.beside_teacher(trained, whole)))
    if run.world.first:
        _announce(run, home, trained, whole, training.teacher.held() if training.teacher else 0)
    return training.run(model, home), trained


def _announce(run: _Run, home: Path, trained: int, whole: int, teacher: int) -> None:
    """Print what will be trained on what, and what it needs; stop before any work if the disk is too full."""
    schedule, length = run.schedule, run.sequences.length
    number = len(run.sequences) - run.text["held_out"]
    step, scratch = schedule.sequences * length, CHECKPOINTS * checkpoint_bytes(trained, run.params)
    note(
        f"recover: {trained:,} of {whole:,} parameters, {schedule.steps:,} steps of {step:,} tokens "
        f"({schedule.steps * schedule.sequences / number:.1f} times the {number:,} sequences of {run.text['text']})"
    )
    memory = training_bytes(trained, whole, run.params) + teacher
    beside = " and the model to learn from" if teacher else ""
    note(
        f"recover: {gigabytes(memory)} of memory for weights, gradients, optimizer states{beside}, without "
        f"activations; up to {gigabytes(scratch)} of checkpoints in {home.parent}"
    )
    there = sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
    require_room({home: max(0, scratch - there)}, "recover", "free some, or train less (recover.method: lora)")


def write_weights(folder: Path, record: Record, weights: Mapping[str, Tensor]) -> None:
    """Write a recovered model into an empty folder: the files of the pruned one with other weights, but no record.

    Args:
        folder: an existing, empty folder.
        record: the record of the pruned folder.
        weights: by the names of the parameters and buffers, in the types in which they are stored.
    """
    copy_files(record, folder)
    save_weights(folder, None if record.remote else record.stock_model, weights)


def write_recovery(folder: Path, record: Record, recovery: Recovery, proof: Mapping[str, float]) -> None:
    """Write the record and the model card of a recovered folder: of the pruned one, with what the training came to.

    Args:
        folder: the folder, with all of its other files.
        record: the record of the pruned folder.
        recovery: what the training came to.
        proof: how far the reloaded logits differ, as `artifacts/recovered/libprune.json` has it.
    """
    made = {key: value for key, value in record.provenance.items() if key != "files"}
    write_provenance(folder, made | versions() | {"recovery": recovery.as_json() | {"proof": dict(proof)}})
    write_card(folder)
