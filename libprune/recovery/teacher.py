"""The text that the pruned model is trained on, and what the dense model predicts on it, as artifacts."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from tqdm import tqdm
from transformers import AutoTokenizer

from libprune.collection.calibration import place
from libprune.collection.resumable import ROOMS, only_one, work_identity
from libprune.engine.architecture import Architecture
from libprune.models.compute import resolve_device, resolve_dtype
from libprune.models.folder import load_config, load_model, require_positions
from libprune.models.memory import require_room
from libprune.models.parallel import World, join_world
from libprune.models.sequences import Sequences
from libprune.models.tokens import read_tokens, write_tokens
from libprune.pipeline.artifacts import read_architecture, require
from libprune.pipeline.atomic import remove, writing_folder
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Recover, Tokenize
from libprune.pipeline.terminal import gigabytes
from libprune.recovery.losses import TopPredictions
from libprune.recovery.predictions import (
    BYTES,
    LiveTeacher,
    attention_mask,
    describe_teacher,
    model_inputs,
    sequences_at_once,
    shard_path,
    top_predictions,
    write_predictions,
)
from libprune.texts.self_text import SelfText
from libprune.texts.training import draw_training, require_unseen


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
    origin = {"model": architecture.fingerprint, "tokens": meta["tokens"]}
    if params.top_k is None:
        if world.first:
            with writing_folder(layout.teacher) as folder:
                describe_teacher(folder, {**origin, "top_k": None}, 0)
        return
    _Storing(layout, architecture, compute, params, sequences, origin, world).run()


def _draw(layout: Layout, architecture: Architecture, compute: Compute, params: Recover, tokenize: Tokenize) -> None:
    config = load_config(require(layout.model, "prepare"))
    require_positions(config, architecture, {"recover.length": params.length})
    tokenizer = AutoTokenizer.from_pretrained(layout.model, local_files_only=True)
    writer = SelfText(layout, architecture, tokenizer, compute.device, compute.dtype)
    text = draw_training(tokenize, params, tokenizer, config, architecture.head, writer.sample)
    judged, _ = read_tokens(layout.evaluation_tokens, architecture.fingerprint)
    require_unseen(text.sequences, judged, text.names)
    meta = {"model": architecture.fingerprint, "held_out": text.held_out, "text": text.names, "sources": text.sources}
    write_tokens(layout.recovery_tokens, text.sequences, meta)
    writer.forget()
    typer.echo(text.sentence())


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
        world, layout, length, k = self.world, self.layout, self.sequences.length, self.params.top_k or 0
        device = resolve_device(self.compute.device, world.local_rank)
        dtype = resolve_dtype(self.compute.dtype, device)
        positions = 1 if self.architecture.head == "sequence_classification" else length
        at_once, size = sequences_at_once(positions, k), len(self.sequences) * positions * k * BYTES
        about = {**self.origin, "top_k": k, "temperature": self.params.temperature}
        about |= {"compute_dtype": str(dtype).removeprefix("torch.")}
        work = layout.root.parent / ".work" / "teacher"
        home = work / work_identity((*ROOMS, "recovery"), {**about, "device": device.type, "at_once": at_once})
        with only_one(work.with_suffix(".lock")) if world.first else nullcontext():
            if world.first:
                each = f"{positions * k * BYTES:,} bytes a sequence, {k * BYTES:,} a position"
                typer.echo(f"teacher: {gigabytes(size)} will be written to {layout.teacher}, {each}")
                require_room({work: size}, "teacher", "store fewer predictions (recover.top_k), or none (null)")
            model = place(load_model(layout.model, dtype), self.architecture, self.compute, world, device)
            shards = -(-len(self.sequences) // at_once)
            if world.first and (there := len(list(home.glob("*.safetensors")))):
                typer.echo(f"continues from a saved state: {there} of {shards} files are there")
            self._write(LiveTeacher(model, hidden=False), home, shards, at_once, about, device)
            world.barrier()
            if world.first:
                with writing_folder(layout.teacher) as folder:
                    for number in range(shards):
                        shard_path(folder, number).hardlink_to(shard_path(home, number))
                    describe_teacher(folder, about, at_once)
                remove(work)
            world.barrier()

    def _write(
        self, teacher: LiveTeacher, home: Path, shards: int, at_once: int, about: dict[str, Any], device: torch.device
    ) -> None:
        """Write the files that this process has to; where the weights are shared out, all processes run all passes."""
        world, passes = self.world, max(1, self.compute.batch_tokens // self.sequences.length)
        mine = range(shards) if world.sharded else range(world.rank, shards, world.size)
        with tqdm(total=len(mine), desc="teacher", unit="file", disable=not world.first) as bar:
            for number in mine:
                rows = self.sequences[number * at_once : (number + 1) * at_once]
                if not shard_path(home, number).exists():
                    parts = []
                    for first in range(0, len(rows), passes):
                        parts.append(self._top(teacher, rows[first : first + passes], device))
                    if world.first or not world.sharded:
                        write_predictions(shard_path(home, number), parts, about)
                bar.update()

    def _top(self, teacher: LiveTeacher, rows: Sequences, device: torch.device) -> TopPredictions:
        mask = attention_mask(rows)
        inputs = model_inputs(rows.ids.to(device), None if mask is None else mask.to(device))
        said = teacher.predict(rows.ids[:, 0], inputs).predictions
        assert isinstance(said, torch.Tensor) and self.params.top_k is not None
        return top_predictions(said, self.params.top_k, self.params.temperature)
