"""What reads the residual stream, as a run shows it: norms of every kind, and the weights behind each."""

import pytest
import torch

from libprune.collection.stream import read_stream, unit_states
from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.engine.stacks import exposed
from tests.support.models import FAMILIES


@pytest.mark.parametrize(
    ("name", "centred", "shift", "biased", "tied"),
    [
        ("llama", False, 0, False, True),
        ("mistral", False, 0, False, False),
        ("starcoder2", True, 0, True, True),
        ("cohere2", True, 0, False, True),
        ("qwen3_next", False, 1, False, False),
    ],
)
def test_norms_are_told_by_what_they_give_and_readers_by_what_they_get(name, centred, shift, biased, tied):
    model = FAMILIES[name](0)
    architecture = describe(model)
    stream = read_stream(exposed(model, architecture), architecture)
    norms = stream.norms.values()
    assert {(norm.centred, norm.shift, norm.biased) for norm in norms} == {(centred, shift, biased)}
    assert (stream.tied is not None) is tied
    reading = {entry.weight for entry in architecture.maps if str(entry.input) == "model"}
    writing = {entry.weight for entry in architecture.maps if str(entry.output) == "model"}
    assert reading <= stream.readers.keys()
    assert not writing & stream.readers.keys()
    assert ("lm_head.weight" in stream.readers) is not tied
    last = list(stream.norms)[-1]
    assert last == (stream.tied or stream.readers["lm_head.weight"])


def test_a_module_that_is_no_norm_is_refused_by_name():
    model = FAMILIES["llama"](0)
    model.model.layers[1].input_layernorm.forward = lambda x: x.tanh()
    with pytest.raises(LibpruneError, match=r"model.layers.1.input_layernorm is no norm"):
        read_stream(model, describe(model))


def test_unit_states_have_a_mean_square_of_one_and_no_mean_where_it_goes():
    states = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 9 + 30
    for centred in (False, True):
        unit = unit_states(states, centred)
        torch.testing.assert_close(unit.square().mean(-1), torch.ones(5))
        assert bool(unit.mean(-1).abs().max() < 1e-6) is centred
