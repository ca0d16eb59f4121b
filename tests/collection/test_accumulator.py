"""States of statistics, in memory and mapped from disk, saved, loaded and joined."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from libprune.collection import accumulator
from libprune.collection.accumulator import (
    Accumulator,
    SavedSums,
    discard,
    finished,
    flatten,
    read_states,
    state_bytes,
    stored_bytes,
)
from libprune.collection.records import BatchRows, Gram, InputMoments, Sum, WeightedMean, count
from libprune.engine.errors import LibpruneError

WIDTH = 5
GROUPS = [
    {"moments": InputMoments(WIDTH), "gram": Gram(WIDTH)},
    {"moments": InputMoments(WIDTH), "mean": WeightedMean(WIDTH)},
    {"loss": Sum(())},
]
"""Two layers and the whole model; the least and largest values begin with infinities."""


def inputs(seed: int) -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed))


def add(sums: Accumulator, *seeds: int) -> Accumulator:
    for seed in seeds:
        x = inputs(seed)
        for layer in (0, 1):
            sums.update(layer, "moments", x + layer)
        sums.update(0, "gram", x)
        sums.update(1, "mean", x[0], torch.tensor(2.0))
        sums.update(2, "loss", x.sum(), count(len(x)))
        sums.done += 1
    return sums


def assert_same(one: Accumulator, two: Accumulator) -> None:
    for group in range(len(GROUPS)):
        ours, theirs = one.finish(group), two.finish(group)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0, equal_nan=True)


def test_sums_mapped_from_disk_are_those_in_memory_to_the_bit(tmp_path):
    assert_same(add(Accumulator(GROUPS, tmp_path), 0, 1, 2), add(Accumulator(GROUPS), 0, 1, 2))
    assert len(list(tmp_path.iterdir())) == len(GROUPS)


@pytest.mark.parametrize("mapped", [False, True])
def test_saved_sums_go_on_to_the_same_bits(tmp_path, mapped):
    half = add(Accumulator(GROUPS), 0, 1)
    half.save(tmp_path / "saved")
    again = Accumulator(GROUPS, tmp_path / "live" if mapped else None)
    again.load(tmp_path / "saved", half.done)
    assert again.done == 2
    assert_same(add(again, 2), add(Accumulator(GROUPS), 0, 1, 2))
    states = read_states(tmp_path / "saved", 0, GROUPS[0])
    assert torch.equal(states["gram"]["gram"], half.state(0, "gram")["gram"])


def test_the_sums_of_two_accumulators_join(tmp_path):
    joined, other = add(Accumulator(GROUPS), 0, 1), add(Accumulator(GROUPS), 2)
    other.save(tmp_path / "other")
    for group, statistics in enumerate(GROUPS):
        joined.merge(group, read_states(tmp_path / "other", group, statistics))
    whole = add(Accumulator(GROUPS), 0, 1, 2)
    for group in range(len(GROUPS)):
        for name, tensor in whole.finish(group).items():
            torch.testing.assert_close(joined.finish(group)[name], tensor)


def test_a_batch_that_does_not_count_changes_nothing():
    sums = add(Accumulator(GROUPS), 0)
    sums.counting = False
    add(sums, 1)
    sums.join(2, "loss", Sum(()).measure(torch.tensor(5.0), count(1)))
    assert_same(sums, add(Accumulator(GROUPS), 0))
    sums.counting = True
    sums.join(2, "loss", Sum(()).measure(torch.tensor(5.0), count(1)))
    assert int(sums.state(2, "loss")["count"]) == 9


def test_bytes_are_known_before_there_are_any(tmp_path):
    sums = add(Accumulator(GROUPS, tmp_path), 0)
    assert state_bytes(GROUPS) == sum(path.stat().st_size for path in tmp_path.iterdir())
    for group, statistics in enumerate(GROUPS):
        assert stored_bytes(statistics) == sum(tensor.nbytes for tensor in sums.finish(group).values())


def test_a_statistic_of_one_tensor_is_stored_under_its_own_name():
    statistics = {"rows": BatchRows(2), "moments": InputMoments(WIDTH)}
    states = {name: statistic.init() for name, statistic in statistics.items()}
    names = list(finished(statistics, states))
    assert names[0] == "rows"
    assert all(name.startswith("moments.input_") for name in names[1:])
    assert list(flatten({"rows": states["rows"]})) == ["rows/rows"]


def test_a_disk_without_room_for_the_sums_is_an_error(tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(accumulator.sys, "platform", "linux")
    monkeypatch.setattr(accumulator.os, "posix_fallocate", full, raising=False)
    with pytest.raises(LibpruneError, match=r"no room for [\d,]+ bytes of running sums in .*: No space left on device"):
        Accumulator(GROUPS, tmp_path)


def test_mapped_sums_hold_one_layer_in_memory_at_a_time(tmp_path):
    """Resident memory after every layer was written to, against all layers' sums."""
    groups = [{"w": Sum((1000, 1000))} for _ in range(40)]  # 160 MB
    sums = Accumulator(groups, tmp_path)
    before, most = resident(), 0
    for group in range(len(groups)):
        sums.update(group, "w", torch.ones(1000, 1000), count(1))
        most = max(most, resident() - before)
    assert most < 60_000_000
    assert all(float(sums.finish(group)["w"].sum()) == 1e6 for group in range(len(groups)))


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# Saved sums


def test_sums_are_saved_beside_older_ones_once_and_all_others_can_go(tmp_path):
    saved, sums = SavedSums(tmp_path, 0.0), add(Accumulator(GROUPS), 0)
    assert saved.available() == []
    saved.save(sums, 2)
    first = (saved.path(1, 2) / "group-000.safetensors").stat().st_mtime_ns
    saved.save(sums, 2)
    assert (saved.path(1, 2) / "group-000.safetensors").stat().st_mtime_ns == first
    for done in range(2, 12):
        add(sums, done)
        saved.save(sums, 2 * done)
    assert saved.available() == [(done, 2 * done) for done in range(1, 12)]
    saved.keep_only(11, 22)
    assert [path.name for path in tmp_path.iterdir()] == ["after-11-22"]


def test_folders_that_a_kill_left_are_neither_available_nor_kept(tmp_path):
    saved = SavedSums(tmp_path, 0.0)
    for name in (".unfinished-3", ".discarded-after-3-3", "after-4-4"):
        (tmp_path / name).mkdir()
    assert saved.available() == [(4, 4)]
    saved.clear_leftovers()
    assert [path.name for path in tmp_path.iterdir()] == ["after-4-4"]
    discard(tmp_path / "after-4-4")
    discard(tmp_path / "after-5-5")
    assert list(tmp_path.iterdir()) == []


def test_saving_waits_for_its_seconds_and_takes_a_twentieth_of_the_time(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(accumulator.time, "monotonic", lambda: now)
    saved, sums = SavedSums(tmp_path, 30.0), add(Accumulator(GROUPS), 0)
    now = 29.0
    assert not saved.due()
    now = 30.0
    assert saved.due()

    def slow(folder: Path) -> None:
        nonlocal now
        now += 5.0
        folder.mkdir()

    monkeypatch.setattr(sums, "save", slow)
    saved.save(sums, 2)
    now = 35.0 + 99.0
    assert not saved.due()
    now = 35.0 + 100.0
    assert saved.due()
    assert SavedSums(tmp_path, 0.0).due()
