"""The states of all statistics while they grow, in memory or mapped from files, and how they are saved."""

import mmap
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from libprune.collection.records import Device, Field, State, Statistic
from libprune.engine.errors import LibpruneError
from libprune.pipeline.atomic import remove

Group = Mapping[str, Statistic]
"""Statistics by name. Each layer has a group, and the whole model has one behind them."""

ROWS, UNITS, PENDING = "rows.", "units.", "pending."
"""Prefixes of statistics that are not written to the shards: two kinds go into tables, one is not stored."""

_ALIGNMENT = 8


class Accumulator:
    """The states of groups of statistics.

    Attributes:
        groups: the statistics of each layer, then those of the whole model.
        done: number of batches that the states hold.
        counting: whether updates count; False for a batch that is run only to keep the processes in step.
    """

    def __init__(self, groups: Sequence[Group], mapped: Path | None = None, device: Device = "cpu") -> None:
        """Start with the states of no batch.

        Args:
            groups: the statistics.
            mapped: a folder for memory-mapped files, which then hold the states instead of memory.
            device: where the states lie without mapped files, but for numbers of tokens and sequences.
        """
        self._device = device
        self.groups = groups
        self.done = 0
        self.counting = True
        self._maps: list[mmap.mmap | None] = [None] * len(groups)
        self._states = [self._allocate(index, mapped) for index in range(len(groups))]
        self._at = 0

    def update(self, group: int, name: str, *batch: Tensor) -> None:
        """Join a batch to one statistic."""
        if self.counting:
            self._enter(group)
            self.groups[group][name].update(self._states[group][name], *batch)

    def join(self, group: int, name: str, state: State) -> None:
        """Join a state that was measured elsewhere to one statistic."""
        if self.counting:
            self._enter(group)
            self.groups[group][name].merge(self._states[group][name], state)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside the context, updates do not count."""
        before, self.counting = self.counting, False
        try:
            yield
        finally:
            self.counting = before

    def merge(self, group: int, states: Mapping[str, State]) -> None:
        """Join another accumulator's states of a group."""
        self._enter(group)
        for name, statistic in self.groups[group].items():
            statistic.merge(self._states[group][name], states[name])

    def finish(self, group: int) -> dict[str, Tensor]:
        """The tensors of a group that are stored, by name."""
        self._enter(group)
        return finished(self.groups[group], on_host(self._states[group]))

    def state(self, group: int, name: str) -> State:
        """The state of one statistic itself, not a copy."""
        return self._states[group][name]

    def save(self, folder: Path) -> None:
        """Write all states to a new folder, one file for each group."""
        folder.mkdir(parents=True)
        for group in range(len(self.groups)):
            self._enter(group)
            save_file(flatten(on_host(self._states[group])), _file(folder, group))

    def load(self, folder: Path, done: int) -> None:
        """Replace the states by those that `save` wrote after `done` batches."""
        for group in range(len(self.groups)):
            self._enter(group)
            for name, state in read_states(folder, group, self.groups[group]).items():
                for field, tensor in state.items():
                    self._states[group][name][field].copy_(tensor)
        self.done = done

    def close(self) -> None:
        """Release the memory and the mapped files of the states."""
        self._states, self._maps = [], []

    def _enter(self, group: int) -> None:
        """Give the memory of the group before back to the system; a mapped file keeps its content."""
        left = self._maps[self._at]
        if group != self._at and left is not None:
            left.madvise(mmap.MADV_DONTNEED)
        self._at = group

    def _allocate(self, index: int, mapped: Path | None) -> dict[str, State]:
        group = self.groups[index]
        if mapped is None:
            return {name: statistic.init(self._device) for name, statistic in group.items()}
        buffer = self._maps[index] = _map_file(mapped / f"group-{index:03d}", state_bytes([group]))
        start = 0
        states: dict[str, State] = {}
        for name, statistic in group.items():
            states[name] = {}
            for field_name, field in statistic.fields.items():
                states[name][field_name] = _view(buffer, start, field)
                start += _padded(field)
        buffer.madvise(mmap.MADV_DONTNEED)
        return states


def _padded(field: Field) -> int:
    return -(-field.nbytes // _ALIGNMENT) * _ALIGNMENT


def _map_file(path: Path, size: int) -> mmap.mmap:
    """A new mapped file of zeros, allocated on the disk at once: a full disk is an error here, not a crash later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w+b") as file:
        try:
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise LibpruneError(f"no room for {size:,} bytes of running sums in {path}: {error.strerror}") from error
        return mmap.mmap(file.fileno(), size)


def _view(buffer: mmap.mmap, start: int, field: Field) -> Tensor:
    tensor = torch.frombuffer(buffer, dtype=torch.uint8, count=field.nbytes, offset=start)
    tensor = tensor.view(field.dtype).view(field.shape)
    return tensor.fill_(field.start) if field.start else tensor


def finished(group: Group, states: Mapping[str, State]) -> dict[str, Tensor]:
    """The stored tensors of a group, under `<statistic>.<name>`, or under `<statistic>` alone where it stores one."""
    return {
        f"{name}.{part}" if part else name: tensor
        for name, statistic in group.items()
        for part, tensor in statistic.finish(states[name]).items()
    }


def state_bytes(groups: Sequence[Group]) -> int:
    """Bytes that the states of groups take."""
    return sum(_padded(f) for group in groups for statistic in group.values() for f in statistic.fields.values())


def stored_bytes(group: Group) -> int:
    """Bytes of the tensors that `finish` gives for a group, counted on the meta device."""
    states = {name: statistic.init("meta") for name, statistic in group.items()}
    return sum(tensor.nbytes for tensor in finished(group, states).values())


def on_host(states: Mapping[str, State]) -> dict[str, State]:
    """States in the memory of the host."""
    return {name: {field: tensor.cpu() for field, tensor in state.items()} for name, state in states.items()}


def flatten(states: Mapping[str, State]) -> dict[str, Tensor]:
    """Merge states into one dict of tensors with keys `<statistic>/<field>`."""
    return {f"{name}/{field}": tensor for name, state in states.items() for field, tensor in state.items()}


def read_states(folder: Path, group: int, statistics: Group) -> dict[str, State]:
    """Read the states of one group that `Accumulator.save` wrote."""
    with safe_open(_file(folder, group), framework="pt") as file:
        return {
            name: {field: file.get_tensor(f"{name}/{field}") for field in statistic.fields}
            for name, statistic in statistics.items()
        }


def _file(folder: Path, group: int) -> Path:
    return folder / f"group-{group:03d}.safetensors"


class SavedSums:
    """Saved states of an accumulator: complete folders `after-<batches>-<sequences>` below one folder.

    States are saved at most every `seconds`, and saving takes at most a twentieth of the time. With `seconds` 0 they
    are saved after every batch.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self._seconds = seconds
        self._cost = 0.0
        self._last = time.monotonic()

    def clear_leftovers(self) -> None:
        """Delete folders that a killed process left half written or half deleted."""
        for left in self.folder.glob(".*"):
            remove(left)

    def available(self) -> list[tuple[int, int]]:
        """The numbers of batches and sequences after which complete saved sums exist, ascending."""
        names = (path.name.split("-") for path in self.folder.glob("after-*"))
        return sorted((int(done), int(sequences)) for _, done, sequences in names)

    def path(self, done: int, sequences: int) -> Path:
        """The folder of the sums after `done` batches, which hold `sequences` sequences in all processes."""
        return self.folder / f"after-{done}-{sequences}"

    def due(self) -> bool:
        """Whether the sums should be saved now."""
        return self._seconds == 0 or time.monotonic() - self._last >= max(self._seconds, 20 * self._cost)

    def save(self, accumulator: Accumulator, sequences: int) -> None:
        """Save the sums, and keep the older ones."""
        if (accumulator.done, sequences) in self.available():
            return
        start = time.monotonic()
        unfinished = self.folder / f".unfinished-{accumulator.done}"
        accumulator.save(unfinished)
        unfinished.rename(self.path(accumulator.done, sequences))
        self._last = time.monotonic()
        self._cost = self._last - start

    def keep_only(self, done: int, sequences: int) -> None:
        """Remove all but one of the saved sums."""
        for other in self.available():
            if other != (done, sequences):
                discard(self.path(*other))


def discard(path: Path) -> None:
    """Delete a folder so that a process killed in the middle leaves no folder that looks complete."""
    if path.exists():
        hidden = path.with_name(f".discarded-{path.name}")
        path.rename(hidden)
        remove(hidden)
