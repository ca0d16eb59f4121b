"""The text that the pruned model is trained on, and what the dense model predicts on it, as artifacts."""

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from libprune.collection.calibration import own_device
from libprune.collection.resumable import ROOMS, only_one, work_identity
from libprune.engine.architecture import Architecture
from libprune.models.folder import load_config, own_model, require_positions
from libprune.models.memory import require_room
from libprune.models.parallel import World, join_world
from libprune.models.sequences import Sequences
from libprune.models.tokens import Ids, read_tokens, require_known, write_tokens
from libprune.pipeline.artifacts import read_architecture, same_origin
from libprune.pipeline.atomic import remove, writing_folder
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Recover, Tokenize
from libprune.pipeline.terminal import CONTINUES, Bar, gigabytes, note, say
from libprune.recovery.losses import TopPredictions
from libprune.recovery.predictions import (
    BYTES,
    attention_mask,
    describe_teacher,
    model_inputs,
    sequences_at_once,
    shard_path,
    top_predictions,
    write_predictions,
)
from libprune.recovery.teacher_model import load_teacher, prediction_origin, require_taught, settle_teacher
from libprune.texts.self_text import SelfText
from libprune.texts.training import draw_training, originals, require_unseen


def teach_layout(layout: Layout, compute: Compute, params: Recover, tokenize: Tokenize) -> None:
    """Draw the text to train on and, if `recover.top_k` asks for it, store what the dense model predicts there.

    Args:
        layout: holds the model, its description and the evaluation windows; both artifacts are written into it.
        compute: how the dense model is run.
        params: the text, and how many predictions are stored.
        tokenize: the calibration text, whose documents are the default.

    Raises:
        LibpruneError: if an artifact is missing or foreign, a text cannot be read, is too short or holds the text to
            evaluate on, or the disk has no room.
    """
    world, architecture = join_world(), read_architecture(layout)
    if world.first:
        _draw(layout, architecture, compute, params, tokenize)
    world.barrier()
    sequences, meta = read_tokens(layout.recovery_tokens, architecture.fingerprint, stage="teacher")
    origin = prediction_origin(layout, architecture, params, meta)
    if params.top_k is None:
        if world.first:
            with writing_folder(layout.teacher) as folder:
                describe_teacher(folder, {**origin, "top_k": None}, 0)
        return
    _Storing(layout, architecture, compute, params, sequences, origin, world).run()


def _draw(layout: Layout, architecture: Architecture, compute: Compute, params: Recover, tokenize: Tokenize) -> None:
    require_taught(architecture, params)
    config = load_config(own_model(layout, architecture))
    require_positions(config, architecture, {"recover.length": params.length})
    judged, about = read_tokens(layout.evaluation_tokens, architecture.fingerprint)
    tokenizer = AutoTokenizer.from_pretrained(layout.model, local_files_only=True, trust_remote_code=False)
    writer = SelfText(layout, architecture, tokenizer, compute.device, compute.dtype)
    read = _read_before(layout, architecture, about)
    text = draw_training(tokenize, params, tokenizer, config, architecture.head, writer.sample, read)
    require_unseen(text, judged, tokenizer)
    require_known(text.sequences, architecture.sizes["vocab"], tokenizer)
    sequences = replace(text.sequences, pooling=architecture.pooling)
    meta = {"model": architecture.fingerprint, "calibration": about["calibration"]}
    meta |= {"held_out": text.held_out, "text": text.names, "sources": text.sources, "read_before": text.read_before}
    write_tokens(layout.recovery_tokens, sequences, meta)
    writer.forget()
    say(text.sentence())


def _read_before(layout: Layout, architecture: Architecture, evaluated: Mapping[str, Any]) -> list[Ids]:
    """The tokens of each sequence that the statistics or the repair read, as they stand in the text."""
    calibration, about = read_tokens(layout.calibration_tokens, architecture.fingerprint)
    repair, drawn = read_tokens(layout.repair_tokens, architecture.fingerprint)
    same_origin(layout.calibration_tokens, about, {"tokens": evaluated["calibration"]})
    same_origin(layout.repair_tokens, drawn, {"calibration": evaluated["calibration"]})
    return originals(calibration) + originals(repair)


@dataclass(frozen=True)
class _Storing:
    """The storing of predictions: what is to be stored, and the processes that do it."""

    layout: Layout
    architecture: Architecture
    compute: Compute
    params: Recover
    sequences: Sequences
    origin: dict[str, str]
    world: World

    def run(self) -> None:
        """Store the predictions, file by file; those of an earlier run that was stopped are kept."""
        work = self.layout.work / "teacher"
        with only_one(work.with_suffix(".lock")) if self.world.first else nullcontext():
            self.world.barrier()
            device, dtype = own_device(self.compute, self.world)
            about = {**self.origin, "top_k": self.params.top_k, "temperature": self.params.temperature}
            about |= {"compute_dtype": str(dtype).removeprefix("torch.")}
            ways = {"device": device.type, "at_once": self._at_once, "passes": self._passes}
            home = work / work_identity((*ROOMS, "recovery"), about | ways)
            if self.world.first:
                self._announce(home)
            self._write(home, device, dtype, about)
            self.world.barrier()
            if self.world.first:
                self._finish(home, about)
                remove(work)
            self.world.barrier()

    @property
    def _k(self) -> int:
        """Predictions of each position."""
        assert self.params.top_k is not None, "only asked for where predictions are stored"
        return self.params.top_k

    @property
    def _positions(self) -> int:
        """Predicted positions of each sequence."""
        return 1 if self.architecture.head == "sequence_classification" else self.sequences.length

    @property
    def _at_once(self) -> int:
        """Sequences in a file."""
        return sequences_at_once(self._positions, self._k)

    @property
    def _passes(self) -> int:
        """Sequences in a forward pass."""
        return max(1, self.compute.batch_tokens // self.sequences.length)

    @property
    def _shards(self) -> int:
        """Number of files."""
        return -(-len(self.sequences) // self._at_once)

    def _announce(self, home: Path) -> None:
        """Print what will be written; stop before any work if the disk is too full."""
        each = self._positions * self._k * BYTES
        size, files = each * len(self.sequences), list(home.glob("*.safetensors"))
        missing = size - each * self._at_once * len(files)
        note(
            f"teacher: {gigabytes(size)} will be written to {self.layout.teacher}, {each:,} bytes a sequence, "
            f"{self._k * BYTES:,} a position"
        )
        advice = "store fewer predictions (recover.top_k), or none (null)"
        require_room({home: max(0, missing)}, "teacher", advice)
        if files:
            say(f"{CONTINUES}: {len(files)} of {self._shards} files are there")

    def _write(self, home: Path, device: torch.device, dtype: torch.dtype, about: dict[str, Any]) -> None:
        """Write the files that this process has to; where the weights are shared out, all processes run all passes."""
        world = self.world
        mine = range(self._shards) if world.sharded else range(world.rank, self._shards, world.size)
        missing = [number for number in mine if not shard_path(home, number).exists()]
        world.barrier()  # where the weights are shared out, all processes must miss the same
        if not missing:
            return
        compute = settle_teacher(self.architecture, self.params, self.compute, world, device, dtype)
        model = load_teacher(self.layout, self.architecture, self.params, compute, world, device, dtype)
        for number in Bar(missing, desc="teacher", unit="file", disable=not world.first):
            rows = self.sequences[number * self._at_once : (number + 1) * self._at_once]
            starts = range(0, len(rows), self._passes)
            parts = [self._top(model, rows[start : start + self._passes], device) for start in starts]
            if world.first or not world.sharded:
                write_predictions(shard_path(home, number), parts, about)

    def _top(self, model: PreTrainedModel, rows: Sequences, device: torch.device) -> TopPredictions:
        mask = attention_mask(rows)
        inputs = model_inputs(rows.ids.to(device), None if mask is None else mask.to(device))
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
        known = self.architecture.sizes["vocab"] if self.architecture.head != "sequence_classification" else None
        return top_predictions(logits[..., :known], self._k, self.params.temperature)  # no other rows have tokens

    def _finish(self, home: Path, about: dict[str, Any]) -> None:
        with writing_folder(self.layout.teacher) as folder:
            for number in range(self._shards):
                shutil.move(shard_path(home, number), shard_path(folder, number))
            describe_teacher(folder, about, self._at_once)
