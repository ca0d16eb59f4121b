"""Tokens as an artifact: written, read back, and refused where they belong to another model."""

import numpy as np
import pytest
import torch

from libprune.engine.errors import ArtifactError, SourceError
from libprune.models.sequences import Sequences
from libprune.models.tokens import read_tokens, require_sequences, write_tokens

IDS = np.arange(60).reshape(20, 3)


def test_tokens_come_back_and_those_of_another_model_are_refused(tmp_path):
    path = tmp_path / "tokens.parquet"
    write_tokens(path, Sequences(torch.from_numpy(IDS)), {"model": "here", "source": "a text"})
    found, meta = read_tokens(path, "here")
    np.testing.assert_array_equal(found.ids, IDS)
    assert (meta["source"], meta["sequences"], meta["length"]) == ("a text", 20, 3)
    np.testing.assert_array_equal(read_tokens(path, "here", 4)[0].ids, IDS[:4])
    with pytest.raises(ArtifactError, match="belongs to model 'here', but the current model is 'elsewhere'"):
        read_tokens(path, "elsewhere")
    with pytest.raises(SourceError, match=r"21 calibration sequences are asked for, .* holds 20; raise tokenize\."):
        read_tokens(path, "here", 21)


def test_the_digest_names_the_tokens(tmp_path):
    digests = []
    for ids in (IDS, IDS.copy(), IDS + 1, IDS[:10]):
        write_tokens(tmp_path / "tokens.parquet", Sequences(torch.from_numpy(ids)), {"model": "here"})
        digests.append(read_tokens(tmp_path / "tokens.parquet", "here")[1]["tokens"])
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_targets_and_lengths_come_back_where_there_are_some(tmp_path):
    path, ids = tmp_path / "tokens.parquet", torch.from_numpy(IDS)
    labelled = Sequences(ids, torch.arange(20) % 2, torch.arange(20) % 3 + 1)
    masked = Sequences(ids, torch.where(ids % 2 == 0, ids, -100))
    for sequences in (Sequences(ids), masked, labelled):
        write_tokens(path, sequences, {"model": "here"})
        stored, _ = read_tokens(path, "here")
        for name in ("ids", "targets", "lengths"):
            expected, tensor = getattr(sequences, name), getattr(stored, name)
            assert (tensor is None) == (expected is None)
            assert expected is None or torch.equal(tensor, expected)


def test_the_digest_names_targets_and_lengths_too(tmp_path):
    path, ids = tmp_path / "tokens.parquet", torch.from_numpy(IDS)
    digests = set()
    for parts in ((None, None), (ids, None), (ids + 1, None), (ids, torch.full((20,), 3)), (ids, torch.full((20,), 2))):
        write_tokens(path, Sequences(ids, *parts), {"model": "here"})
        digests.add(read_tokens(path, "here")[1]["tokens"])
    assert len(digests) == 5


def test_all_sequences_are_used_unless_fewer_are_asked_for(tmp_path):
    stored = Sequences(torch.from_numpy(IDS))
    assert [require_sequences(number, stored, tmp_path) for number in (None, 0, 7, 20)] == [20, 0, 7, 20]
