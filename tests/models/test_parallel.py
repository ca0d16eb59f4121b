"""Processes: one alone, and two that share values."""

import pytest

from libprune.engine.errors import LibpruneError
from libprune.models.parallel import World, join_world
from tests.support.processes import together


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


def test_the_first_process_gives_its_value_to_all_after_they_have_met(tmp_path, python):
    program = """
from libprune.models.parallel import join_world

world = join_world()
assert join_world() == world
Path(f"here-{world.rank}").touch()
world.barrier()
print(world, world.first, sorted(path.name for path in Path().glob("here-*")), world.shared(f"from {world.rank}"))
"""
    for rank, said in enumerate(together(python, tmp_path, program)):
        world = World(rank, 2, rank, 2)
        assert said.strip() == f"{world} {rank == 0} {['here-0', 'here-1']} from 0"
