"""Token sequences: chosen, ordered, counted and cut into passes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from libprune.models.sequences import NO_TARGET, Sequences, joined

IDS = torch.arange(12).view(3, 4)


def labelled(lengths: list[int]) -> Sequences:
    """Sequences of the given lengths, whose labels are their numbers."""
    ids = torch.arange(len(lengths))[:, None].repeat(1, max(lengths))
    return Sequences(ids, torch.arange(len(lengths)), torch.tensor(lengths))


@given(st.integers(1, 20), st.integers(1, 25))
def test_sequences_of_one_length_are_cut_into_full_passes(number, at_once):
    ids = torch.arange(number)[:, None].repeat(1, 3)
    passes = list(Sequences(ids, ids + 1).passes(at_once))
    assert [len(one) for one in passes] == [at_once] * (number // at_once) + [number % at_once] * (number % at_once > 0)
    assert torch.equal(torch.cat([one.ids for one in passes]), ids)
    assert torch.equal(torch.cat([one.targets for one in passes]), ids + 1)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=15))
def test_in_the_order_of_lengths_neighbours_of_one_length_keep_their_order(lengths):
    ordered = labelled(lengths).shortest_first()
    expected = sorted(range(len(lengths)), key=lambda i: lengths[i])
    assert ordered.targets.tolist() == expected
    assert ordered.lengths.tolist() == [lengths[i] for i in expected]
    assert ordered.tokens == sum(lengths)
    assert ordered.length == max(lengths)


def test_sequences_of_one_length_stay_in_their_order():
    sequences = Sequences(IDS)
    assert sequences.shortest_first() is sequences
    assert (sequences.length, sequences.tokens) == (4, 12)


def test_the_loss_is_a_mean_over_the_targets_of_a_sequence():
    masked = torch.full_like(IDS, NO_TARGET)
    masked[:, :2] = 7
    assert Sequences(IDS).counted == 3
    assert Sequences(IDS, masked).counted == 2
    assert Sequences(IDS, torch.tensor([0, 1, 0])).counted == 1


def test_chosen_sequences_bring_their_targets_and_lengths():
    some = labelled([1, 4, 2])[torch.tensor([2, 0])]
    assert (some.ids[:, 0].tolist(), some.targets.tolist(), some.lengths.tolist()) == ([2, 0], [2, 0], [2, 1])
    moved = labelled([1, 4, 2])[1:].to(torch.device("cpu"))
    assert (moved.targets.tolist(), moved.lengths.tolist()) == ([1, 2], [4, 2])
    assert Sequences(IDS)[:1].targets is None


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=20), at_once=st.integers(1, 6), sort=st.booleans())
def test_passes_hold_every_sequence_once_in_order_and_are_never_filled_up(lengths, at_once, sort):
    ids = torch.arange(len(lengths))[:, None].repeat(1, 4)
    whole = Sequences(ids, torch.arange(len(lengths)), torch.tensor(lengths))
    whole = whole.shortest_first() if sort else whole
    passes = list(whole.passes(at_once))
    assert torch.cat([one.ids[:, 0] for one in passes]).tolist() == whole.ids[:, 0].tolist()
    assert torch.cat([one.targets for one in passes]).tolist() == whole.targets.tolist()
    assert [one.ids.shape[1] for one in passes for _ in range(len(one))] == whole.lengths.tolist()
    assert max(map(len, passes)) <= at_once
    assert sum(one.tokens for one in passes) == whole.tokens
    if sort:
        assert whole.lengths.tolist() == sorted(lengths)
        assert len(passes) <= -(-len(lengths) // at_once) + len(set(lengths)), "neighbours of one length go together"


def test_joined_sequences_stand_behind_each_other_with_their_targets():
    ids = torch.arange(12).reshape(3, 4)
    plain = joined([Sequences(ids[:1], pooling="mean"), Sequences(ids[1:], pooling="mean")])
    assert torch.equal(plain.ids, ids) and plain.targets is None and plain.pooling == "mean"
    masked = joined([Sequences(ids[:2], ids[:2] + 1), Sequences(ids[2:], ids[2:] + 1)])
    assert masked.targets is not None and torch.equal(masked.targets, ids + 1)
