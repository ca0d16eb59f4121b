"""Both residual streams of a text, against whole passes of the model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.describe import describe
from libprune.engine.stacks import exposed
from libprune.engine.surgery import masked
from libprune.models.sequences import Sequences
from libprune.repair.streams import Streams, split_batches
from tests.support.models import FAMILIES, LAYOUTS, MIXTURES, random_plan, tokens
from tests.support.passes import forward


@given(st.integers(1, 40), st.integers(1, 10))
def test_every_sequence_is_in_one_batch_and_every_eighth_is_held_out(number, at_once):
    batches = split_batches(Sequences(torch.arange(number)[:, None].repeat(1, 3)), at_once)
    assert all(1 <= len(batch.ids) <= at_once for batch in batches)
    seen = {flag: [int(row[0]) for b in batches if b.held_out is flag for row in b.ids] for flag in (False, True)}
    assert seen[True] == list(range(7, number, 8))
    assert seen[False] == [row for row in range(number) if row % 8 != 7]


@pytest.mark.parametrize("name", [*LAYOUTS, *MIXTURES])
def test_both_streams_are_those_of_whole_passes(name):
    model, ids = FAMILIES[name](0), tokens(10, 12)
    architecture = describe(model)
    exposed(model, architecture)
    plan, batches = random_plan(architecture, "holes", seed=2), split_batches(Sequences(ids), 3)
    dense = forward(model, architecture, ids)
    with masked(model, architecture, plan):
        pruned = forward(model, architecture, ids)
    streams = Streams(model, architecture, batches)
    order = [number for number in range(10) if number % 8 != 7] + [7]
    for layer in range(architecture.layers):
        for found, whole in ((streams.dense, dense), (streams.pruned, pruned)):
            states = whole.states[f"{architecture.layers_path}.{layer}"]
            torch.testing.assert_close(torch.cat(found), states[order], rtol=1e-4, atol=1e-5)
        streams.begin(layer)
        with masked(model, architecture, plan):
            after = streams.behind(layer)
        streams.go_on(streams.behind(layer, dense=True), after)
