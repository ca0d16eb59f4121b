"""Repairs from the artifacts: what the collecting stages store is what a repair reads."""

import numpy as np
import pytest
import torch

from libprune.artifacts import Layout
from libprune.describe import describe
from libprune.params import Compute, Slice
from libprune.repair import oriented, pruned_consumers
from libprune.repairing import REPAIRS
from libprune.shards import write_shard
from tests.collected import activations
from tests.models import FAMILIES, plan_of, tokens
from tests.test_activations import captured


@pytest.mark.parametrize("length", [12, 32, 64])
@pytest.mark.parametrize("how", ["local", "bias"])
def test_a_repair_is_judged_by_the_inputs_of_the_held_out_sequences(tmp_path, how, length):
    """Against the inputs themselves, at every position or every second one, of sequences 7 and 15."""
    layout, model, ids = Layout(tmp_path), FAMILIES["llama"](0), tokens(17, length)
    architecture = describe(model, fingerprint="here")
    plan = plan_of(architecture, lambda layer, part: 2 * architecture.units(part) // 3)
    model.save_pretrained(layout.model)
    layout.activations.mkdir()
    sums = activations(model, 4, ids)
    for layer in range(architecture.layers):
        write_shard(layout.activations, layer, sums.finish(layer), {"model": "here", "tokens": "these"})
    consumers = list(pruned_consumers(architecture, plan))
    with captured(model, [consumer.module for consumer, _ in consumers]) as table, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    fits = REPAIRS[how](layout, architecture, plan, Compute(), Slice(repair=how, damping=0.01))
    assert len(fits) == len(consumers) == 8
    for fit, (consumer, kept) in zip(fits, consumers, strict=True):
        x = table[consumer.module].view(17, length, -1)
        old = oriented(consumer, model.get_parameter(consumer.weight).detach()).double()
        new, shift = old * kept, torch.zeros(len(old), dtype=torch.float64)
        if fit.weight is not None:
            new = oriented(consumer, fit.weight).double()
        else:
            shift = fit.bias.double() - model.get_parameter(consumer.bias).detach().double()
        held = torch.arange(17) % 8 == 7
        apart = x[held][:, :: max(1, length // 32)].flatten(0, 1)
        for rows, found in (
            (x[~held].flatten(0, 1), (fit.before, fit.after)),
            (apart, (fit.held_out_before, fit.held_out_after)),
        ):
            y = rows @ old.T
            lost = [(y - rows @ (old * kept).T).square().sum(), (y - rows @ new.T - shift).square().sum()]
            np.testing.assert_allclose(found, np.array(lost) / float(y.square().sum()), rtol=1e-3)
