"""Repair of networks that are not transformers: repeated units, the best fit with the bias, and silent inputs."""

import pytest
import torch
from torch import nn

from libprune.collection.module_hooks import input_rows
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked, oriented
from libprune.networks import Network, NetworkFamily, Samples
from libprune.pipeline.sections import Allocate, Score
from libprune.repair.of_modules import set_weights
from tests.support.networks import CASES


@pytest.mark.parametrize("repair", ["local", "sequential"])
def test_a_unit_that_another_repeats_goes_without_loss(repair, tmp_path):
    """Of two equal channels one goes, in a convolution and in a linear map; the repair hands its part to the other."""
    case = CASES["lenet"]
    network, samples = case.network(), case.samples(64)
    with torch.no_grad():
        for module in (network.conv1, network.fc1):
            module.weight[1], module.bias[1] = module.weight[0], module.bias[0]
    pruner = Network(network, case.family, samples, tmp_path / "work")
    plan = Plan.dense(pruner.architecture)
    plan.keep[0, "c1"][1] = plan.keep[0, "f1"][0] = False
    fresh = case.samples(10, seed=5).inputs
    with torch.no_grad():
        expected = network(fresh)
        found = pruner.prune(plan, repair, damping=1e-7).network(fresh)
        without = pruner.prune(plan, "none").network(fresh)
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 1e-3 * scale
    assert float((without - expected).abs().max()) > 0.05 * scale


@pytest.mark.parametrize("repair", ["local", "sequential"])
def test_the_pruned_network_computes_what_the_masked_one_does_under_the_fits(repair, tmp_path):
    case = CASES["lenet"]
    network, samples = case.network(), case.samples()
    pruner = Network(network, case.family, samples, tmp_path / "work")
    plan = pruner.plan(Score(criterion="random"), Allocate(ratio=0.3, method="global"))
    pruned = pruner.prune(plan, repair, damping=0.01)
    set_weights(network, pruned.fits)
    with torch.no_grad(), masked(network, pruner.architecture, plan):
        torch.testing.assert_close(pruned.network(samples.inputs), network(samples.inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_local_repair_is_the_best_fit_with_its_bias(name, tmp_path):
    """With hardly any ridge no other weights and bias give less error on the samples of the fit."""
    case = CASES[name]
    network, samples = case.network(), case.samples(40)
    pruner = Network(network, case.family, samples, tmp_path / "work")
    plan = pruner.plan(Score(criterion="random"), Allocate(ratio=0.3, method="global"))
    fitted = torch.arange(len(samples)) % 8 != 7
    for fit in pruner.prune(plan, "local", damping=1e-9).fits:
        entry, module, seen = fit.consumer, network.get_submodule(fit.consumer.module), []
        handle = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            network(samples.inputs[fitted])
        handle.remove()
        x = torch.cat([input_rows(module, call, int(fitted.sum())) for call in seen], 1).flatten(0, 1).double()
        y = x @ oriented(entry, module.weight.detach()).double().T
        new = oriented(entry, fit.weight).double()
        kept = new.abs().sum(0) > 0
        own, error = x[:, kept], y - x @ new.T
        if fit.bias is not None:
            own = torch.cat([own, own.new_ones(len(own), 1)], 1)
            error = error - (fit.bias - module.bias.detach()).double()
        best = y - own @ torch.linalg.lstsq(own, y, driver="gelsd").solution
        scale = float(y.square().sum())
        assert float(error.square().sum()) <= float(best.square().sum()) + 1e-4 * scale


def test_an_input_that_hardly_ever_varies_gets_no_large_weight(tmp_path):
    """A unit that is on for one sample alone could take over anything there; the repair leaves it almost as it was."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    inputs = torch.rand(64, 4)
    inputs[:, 3] = 0
    inputs[5, 3] = 1e-3
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(4))
    described = NetworkFamily(family="f", prunable=["h"], modules={"0": "a -> h", "2": "h -> b"})
    pruner = Network(network, described, Samples(inputs, torch.randint(2, (64,))), tmp_path / "work")
    plan = Plan.dense(pruner.architecture)
    plan.keep[0, "h"][0] = False
    (fit,) = pruner.prune(plan, "local", damping=1e-3).fits
    assert float((fit.weight[:, 3] - network[2].weight.detach()[:, 3]).abs().max()) < 1
