"""Collecting that can be resumed: batches whose sums survive a kill, and the artifact that is made of them."""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic

import numpy as np
import torch
import transformers
import typer
from torch import Tensor

from libprune.collection.accumulator import (
    PENDING,
    ROWS,
    UNITS,
    Accumulator,
    Group,
    SavedSums,
    discard,
    read_states,
    state_bytes,
    stored_bytes,
)
from libprune.collection.calibration import Items, Run
from libprune.engine.architecture import Architecture
from libprune.engine.errors import LibpruneError, StatisticsError
from libprune.engine.tables import Columns, unit_index
from libprune.models.memory import fits_in_memory, fits_on, require_room
from libprune.models.parallel import World
from libprune.pipeline.artifacts import damage, write_table
from libprune.pipeline.atomic import remove, writing_folder
from libprune.pipeline.shards import write_shard
from libprune.pipeline.terminal import CONTINUES, Bar, gigabytes, note, say

ColumnsOf = Callable[[Architecture, Mapping[str, Tensor], Mapping[str, Tensor], int, str], Columns]
"""Per-unit columns of a block, from the layer's tensors, the weights, the layer and the part."""
RowsOf = Callable[[Architecture, Mapping[str, Tensor], int], Columns]
"""Rows of a further table, from a layer's tensors and the layer."""

_WORTH_SAYING = 10**9
"""Bytes below which the sums of a network are not announced."""


@dataclass
class Collection(Generic[Items]):
    """The sums of one collecting stage, and the batches that go into them.

    Attributes:
        items: number of calibration sequences, or of other items that the stage works through.
        size: items in a batch.
        tokens: tokens of an item, for the progress bar.
    """

    run: Run[Items]
    stage: str
    accumulator: Accumulator
    saved: SavedSums
    items: int
    size: int
    tokens: int

    def batches(self) -> Iterator[tuple[int, int, Items]]:
        """The batches of sequences or samples that the sums do not hold yet, on the device."""
        sequences = self.run.sequences
        for number in self.steps():
            first = number * self.size
            yield number, first, sequences[first : first + self.size].to(self.run.device)

    def passes(self) -> Iterator[tuple[int, int, Items]]:
        """The passes over those batches: a batch of sequences of several lengths is cut, its parts keep its number."""
        for number, first, batch in self.batches():
            for part in batch.passes(self.size):
                yield number, first, part
                first += len(part)

    def steps(self) -> Iterator[int]:
        """The numbers of the batches that the sums do not hold yet, with a progress bar; sums are saved in between.

        With N processes, each takes every N-th batch. If the weights are shared out, all processes must run equally
        often: a process that has no batch left repeats the last one without counting it.
        """
        world, sums = self.run.world, self.accumulator
        total = -(-self.items // self.size)
        with self._bar() as bar:
            for step in range(sums.done, -(-total // world.size)):
                number = step * world.size + world.rank
                sums.counting = number < total
                if sums.counting or world.sharded:
                    yield min(number, total - 1)
                sums.counting, sums.done = True, step + 1
                self._save_if_due()
                bar.update(self._seen() * self.tokens - bar.n)

    def merge(self) -> bool:
        """Join the sums of all processes in the first process; return whether this is the first."""
        world = self.run.world
        if world.size > 1:
            self.saved.save(self.accumulator, self._seen())
            world.barrier()
        if world.first:
            for rank in range(1, world.size):
                folder = _rank_folder(self.saved.folder.parent, World(rank, world.size))
                saved = SavedSums(folder, 0.0).path(self.accumulator.done, self._seen())
                for group, statistics in enumerate(self.accumulator.groups):
                    self.accumulator.merge(group, read_states(saved, group, statistics))
        world.barrier()
        return world.first

    @property
    def unfinished(self) -> bool:
        """Whether there are batches that the sums do not hold yet."""
        return self._seen() < self.items

    def _seen(self) -> int:
        """Items that the sums of all processes hold together."""
        return self.seen(self.accumulator.done)

    def seen(self, done: int) -> int:
        """Items in the sums of all processes together, after `done` batches in each."""
        return min(done * self.run.world.size * self.size, self.items)

    def _save_if_due(self) -> None:
        world = self.run.world
        if world.shared(self.saved.due()):
            self.saved.save(self.accumulator, self._seen())
            world.barrier()  # the older one must stay until every process has this one
            self.saved.keep_only(self.accumulator.done, self._seen())

    def resume(self, home: Path) -> None:
        """Load the newest saved state that every process has and that holds the first of the items.

        Raises:
            ArtifactError: if it cannot be read.
        """
        world = self.run.world
        folders = [_rank_folder(home, World(rank, world.size)) for rank in range(world.size)]
        common = set.intersection(*(set(SavedSums(folder, 0.0).available()) for folder in folders))
        fitting = {(done, items) for done, items in common if items == self.seen(done)}
        chosen = world.shared(max(fitting, default=None))
        if chosen is not None:
            done, items = chosen
            path = self.saved.path(done, items)
            with damage(path, self.stage):
                self.accumulator.load(path, done)
            world.barrier()
            self.saved.keep_only(done, items)
            if world.first:
                say(f"{CONTINUES}: {items} of {self.items} are done")

    def _bar(self) -> Any:
        total, done = self.items * self.tokens, self._seen() * self.tokens
        return Bar(
            total=total,
            initial=done,
            desc=self.stage,
            unit=self.run.unit,
            unit_scale=True,
            delay=self.run.patience,
            disable=not self.run.world.first,
        )


@contextmanager
def collecting(
    run: Run[Items],
    stage: str,
    target: Path,
    groups: Sequence[Group],
    size: int,
    identity: Mapping[str, Any],
    items: int | None = None,
    tokens: int | None = None,
    rooms: Sequence[str] = (),
) -> Iterator[Collection[Items]]:
    """Inside the context, collect sums that continue those of a killed run of the same stage on the same input.

    Args:
        target: the artifact that will be written.
        groups: the statistics of every layer and of the whole model.
        size: sequences, or other items, in a batch.
        identity: other settings that the sums depend on, beside the model, the text and the number of sequences.
        items: number of items, if these are not the calibration sequences.
        tokens: tokens of such an item.
        rooms: packages of libprune, beside those that every collecting stage runs, whose code makes the sums.

    Raises:
        LibpruneError: if the disk has no room, or a value is not finite.
    """
    seconds = _seconds_between()
    home = run.work / stage / sums_identity(run, {**identity, "batch_sequences": size}, ("statistics", *rooms))
    folder = _rank_folder(home, run.world)
    with only_one(run.work / f"{stage}.lock") if run.world.first else nullcontext():
        run.world.barrier()
        saved = SavedSums(folder, seconds)
        saved.clear_leftovers()
        live = folder / "live"
        remove(live)
        if run.world.first:
            for left in home.parent.glob(".discarded-*"):
                remove(left)
        run.world.barrier()
        states = state_bytes(groups)
        device = run.device if run.compute.sums == "auto" and fits_on(run.device, states) else torch.device("cpu")
        on_disk = device.type == "cpu" and _on_disk(run, states)
        where = "files mapped from disk" if on_disk else "memory" if device.type == "cpu" else "the memory of the GPU"
        _announce(run, stage, target, home, groups, where, (3 if on_disk else 2) * states)
        accumulator = Accumulator(groups, live if on_disk else None, device)
        count, length = items or len(run.sequences), tokens or run.sequences.length
        work = Collection(run, stage, accumulator, saved, count, size, length)
        mention_others(home, run.world)
        work.resume(home)
        try:
            yield work
        except StatisticsError as error:
            reusable = items is None and run.sequences.lengths is None and work.unfinished
            advice = _kept(saved, stage) if reusable else ""
            raise StatisticsError(f"{error}{advice}") from error
        accumulator.close()
        run.world.barrier()
        if run.world.first:
            discard(home)


def _seconds_between() -> float:
    """Seconds between two saved states, by the environment.

    Raises:
        LibpruneError: if it says no number.
    """
    said = os.environ.get(_SECONDS, "30")
    try:
        return float(said)
    except ValueError:
        raise LibpruneError(f"{_SECONDS} = {said!r} is no number of seconds") from None


_SECONDS = "LIBPRUNE_CHECKPOINT_SECONDS"


def _on_disk(run: Run, states: int) -> bool:
    """Whether the sums are mapped from disk, because the processes of this machine would take too much memory."""
    wanted = run.compute.sums
    return wanted == "disk" or (wanted == "auto" and not fits_in_memory(states * run.world.local_size))


PACKAGE = Path(__file__).parents[1]
"""The folder of libprune's code."""
ROOMS = ("engine", "pipeline", "models", "collection")
"""The packages of libprune whose code every collecting stage runs."""


def sums_identity(run: Run, identity: Mapping[str, Any], rooms: Sequence[str] = ()) -> str:
    """A digest of everything that unfinished sums depend on, the code of collecting included.

    The sums of the first sequences are the same for any number of them, unless their lengths put them in order.

    Args:
        identity: the other settings and inputs.
        rooms: packages of libprune beside `ROOMS` whose code makes the result.
    """
    ordered = run.sequences.lengths is not None
    origin = {key: value for key, value in run.meta.items() if ordered or key != "sequences"}
    ways = {
        "architecture": run.architecture.to_json(),
        "processes": run.world.size,
        "device": run.device.type,
        "at_once": run.at_once,
    }
    return work_identity((*ROOMS, *rooms), origin | ways | dict(identity))


def work_identity(rooms: Sequence[str], facts: Mapping[str, Any]) -> str:
    """A digest of what unfinished work depends on: the code of some rooms, the versions of libraries, and other facts.

    Args:
        rooms: packages of libprune whose code makes the result.
        facts: settings and digests of inputs, as JSON can hold them.
    """
    digest = hashlib.sha256()
    for room in rooms:
        files = sorted((PACKAGE / room).glob("*.py"))
        assert files, f"{PACKAGE / room} holds no code; work would be continued whatever it says"
        for path in files:
            digest.update(path.read_bytes())
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    digest.update(json.dumps(versions | dict(facts), sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _rank_folder(home: Path, world: World) -> Path:
    return home / f"process-{world.rank}-of-{world.size}"


def _kept(saved: SavedSums, stage: str) -> str:
    there = saved.available()
    if not there:
        return ""
    sequences = there[-1][1]
    return f"; the sums of the first {sequences} sequences are kept: {stage}.sequences: {sequences} finishes with them"


def mention_others(home: Path, world: World) -> None:
    """Print the size of unfinished work with other settings, which is kept for a return to them.

    Args:
        home: the folder of the work with the current settings, beside those with others.
        world: the processes, of which the first one prints.
    """
    others = [path for path in home.parent.glob("*") if path != home]
    size = sum(file.stat().st_size for path in others for file in path.rglob("*") if file.is_file())
    if size and world.first:
        note(f"{gigabytes(size)} of unfinished work with other settings is in {home.parent}")


def _announce(
    run: Run, stage: str, target: Path, home: Path, groups: Sequence[Group], where: str, scratch_each: int
) -> None:
    """Print what will be written, for a network only if it is much; stop before any work if the disk is too full."""
    states, stored = state_bytes(groups), sum(map(stored_bytes, groups))
    scratch = scratch_each * run.world.size
    there = sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
    if run.world.first and (run.architecture.layered or scratch + stored >= _WORTH_SAYING):
        note(
            f"{stage}: {gigabytes(stored)} will be written to {target}; sums of {gigabytes(states)} in {where}, "
            f"up to {gigabytes(scratch)} of scratch in {run.work}"
        )
    advice = f"free some, or collect less ({stage} and compute sections of the params file)"
    require_room({target: stored, run.work: max(0, scratch - there)}, stage, advice)


def write_artifact(
    run: Run,
    target: Path,
    sums: Accumulator,
    columns_of: ColumnsOf,
    extra: Mapping[str, Any],
    tables_of: Mapping[str, RowsOf] = MappingProxyType({}),
) -> dict[str, Columns]:
    """Write the collected sums, whole or not at all: a safetensors shard for each layer, and the tables.

    Args:
        target: the folder.
        sums: the joined sums.
        columns_of: per-unit columns of a block, from the layer's tensors and the weights.
        extra: metadata beside the origin.
        tables_of: by the names of further tables, their rows from a layer's tensors.

    Returns:
        The tables that were written, by name.
    """
    architecture, meta = run.architecture, run.meta | dict(extra)
    blocks: list[Columns] = []
    rows: dict[str, list[Columns]] = {name: [] for name in tables_of}
    with writing_folder(target) as folder:

        def write(layer: int) -> None:
            tensors = sums.finish(layer)
            stored = {name: tensor for name, tensor in tensors.items() if not name.startswith((PENDING, ROWS, UNITS))}
            write_shard(folder, layer, stored, meta)
            for part in architecture.parts_of(layer):
                _, *others = architecture.users(layer, part)
                spanned = {name: tensor for user in others for name, tensor in sums.finish(user).items()} | tensors
                blocks.append(columns_of(architecture, spanned, run.weights, layer, part))
            for name, rows_of in tables_of.items():
                rows[name].append(rows_of(architecture, tensors, layer))

        for layer in range(architecture.layers):
            write(layer)  # in a function, so that the tensors of one layer are gone before those of the next are made
        tables = {"units": unit_index(architecture) | _joined(blocks)}
        tables |= {name: _joined(parts) for name, parts in rows.items()}
        for name, table in tables.items():
            write_table(folder / f"{name}.parquet", table, meta)
    return tables


def _joined(tables: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


@contextmanager
def only_one(path: Path) -> Iterator[None]:
    """Wait until no other process, such as one whose parent was killed, works on the same stage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            typer.echo(f"waits for process {file.read().strip()}, which runs this stage already", err=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
