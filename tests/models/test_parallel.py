"""Processes: one alone, and two that share values."""

import socket
import time

import pytest

from libprune.engine.errors import LibpruneError
from libprune.models.parallel import World, by_itself, join_world
from tests.support.processes import both, together


def test_without_a_launcher_a_process_is_alone_and_never_waits(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LIBPRUNE_SHARD", raising=False)
    world = join_world()
    assert world == World()
    assert world.first
    world.barrier()
    value = object()
    assert world.shared(value) is value


@pytest.mark.parametrize("value", ["", "0"])
def test_weights_are_not_shared_out_where_the_variable_says_no(monkeypatch, value):
    monkeypatch.setenv("LIBPRUNE_SHARD", value)
    assert not join_world().sharded


def test_weights_cannot_be_shared_out_over_one_process(monkeypatch):
    monkeypatch.setenv("LIBPRUNE_SHARD", "1")
    with pytest.raises(LibpruneError, match="LIBPRUNE_SHARD is set for one process; start several with torchrun"):
        join_world()


def test_a_stage_of_one_process_does_not_ask_whether_others_share_weights(monkeypatch):
    monkeypatch.setenv("LIBPRUNE_SHARD", "1")
    assert by_itself("slice") == World()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LibpruneError, match="the slice stage runs in one process; start it without torchrun"):
        by_itself("slice")


def test_the_first_process_gives_its_value_to_all_after_they_have_met(tmp_path, python):
    program = """
from libprune.models.parallel import World, by_itself, join_world

world = join_world()
assert join_world() == world
Path(f"here-{world.rank}").touch()
world.barrier()
print(world, world.first, sorted(path.name for path in Path().glob("here-*")), world.shared(f"from {world.rank}"))
"""
    for rank, said in enumerate(together(python, tmp_path, program)):
        world = World(rank, 2, rank, 2)
        assert said.strip() == f"{world} {rank == 0} {['here-0', 'here-1']} from 0"


FAILING = """
import os, sys, time
from libprune.engine.errors import LibpruneError
from libprune.models.parallel import World, by_itself, join_world
from libprune.pipeline import stage

def main() -> None:
    world = join_world()
    world.barrier()
    if world.rank == RANK:
        FAIL
    WAIT
    print("went on")

sys.argv = ["activations"]
stage.app(main)()
"""
REFUSED, DEFECT, KILLED = 'raise LibpruneError("no room for eels")', "[][1]", "os.kill(os.getpid(), 9)"
WAITS = {
    "barrier": "world.barrier()",
    "a collective that never hears of it": "time.sleep(300)",
}


def fail_in(python, place, rank: int, fail: str, wait: str) -> list:
    (place / "logs").mkdir(exist_ok=True)
    program = FAILING.replace("RANK", str(rank)).replace("FAIL", fail).replace("WAIT", wait)
    start = time.monotonic()
    done = both(python, place, program)
    assert time.monotonic() - start < 40, "not after a timeout"
    assert not any("went on" in process.stdout for process in done)
    return done


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_process_fails_the_other_ends_and_says_which_and_why(tmp_path, python, rank, wait):
    done = fail_in(python, tmp_path, rank, REFUSED, wait)
    assert [process.returncode for process in done] == [1, 1]
    assert done[rank].stderr.splitlines()[-1] == "error: no room for eels"
    named = f"error: process {rank} of this stage, on {socket.gethostname()}, has failed, so process {1 - rank} ends: "
    assert done[1 - rank].stderr.splitlines()[-1] == f"{named}no room for eels"


def test_a_defect_is_told_too(tmp_path, python):
    done = fail_in(python, tmp_path, 0, DEFECT, WAITS["barrier"])
    assert [process.returncode for process in done] == [1, 1]
    assert "Traceback" in done[0].stderr
    assert done[1].stderr.splitlines()[-1].endswith("so process 1 ends: IndexError: list index out of range")


def test_where_one_process_is_killed_the_other_says_that_it_has_ended(tmp_path, python):
    done = fail_in(python, tmp_path, 0, KILLED, WAITS["barrier"])
    assert done[1].returncode == 1
    assert "error: another process of this stage has ended without a word" in done[1].stderr
    assert "Traceback" not in done[1].stderr
