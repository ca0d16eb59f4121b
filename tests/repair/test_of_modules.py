"""Repair of networks that are not transformers: repeated units, the best fit with the bias, and silent inputs; and the
training of all weights behind it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from libprune.collection.module_hooks import input_rows
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked, oriented
from libprune.networks import Epochs, Network, NetworkFamily, Pruned, Samples, load
from libprune.pipeline.artifacts import read_table
from libprune.pipeline.sections import Allocate, Score
from libprune.repair.of_modules import set_weights
from tests.support.networks import CASES


@pytest.mark.parametrize("repair", ["local", "sequential", "block"])
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


@pytest.mark.parametrize("repair", ["local", "sequential", "block"])
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


class Sharing(nn.Module):
    """Two maps with one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 12), nn.Linear(12, 5), nn.Linear(6, 12), nn.Linear(12, 5)
        self.d.bias = self.b.bias

    def forward(self, x):
        return torch.cat([self.b(torch.relu(self.a(x)) + 1), self.d(torch.relu(self.c(x)) - 1)], 1)


@pytest.mark.parametrize("repair", ["local", "sequential"])
def test_a_bias_that_two_maps_share_stays_and_each_map_loses_what_its_fit_says(repair, tmp_path):
    torch.manual_seed(0)
    network, samples = Sharing(), Samples(torch.randn(40, 6), torch.randint(10, (40,)))
    modules = {"a": "x -> h", "b": "h -> y", "c": "x -> g", "d": "g -> y"}
    family = NetworkFamily(family="sharing", prunable=["h", "g"], modules=modules)
    pruner = Network(network, family, samples, tmp_path / "work")
    pruned = pruner.prune(pruner.plan(Score(criterion="magnitude"), Allocate(ratio=0.4)), repair, damping=1e-3)
    assert torch.equal(pruned.network.b.bias, network.b.bias)
    fitted = samples.inputs[torch.arange(40) % 8 != 7]
    with torch.no_grad():
        expected, found = network(fitted) - network.b.bias.repeat(2), pruned.network(fitted) - network.b.bias.repeat(2)
    for fit, part in zip(pruned.fits, (slice(0, 5), slice(5, 10)), strict=True):
        lost = (found - expected)[:, part].square().sum() / expected[:, part].square().sum()
        assert fit.after == pytest.approx(float(lost), rel=1e-3 if repair == "local" else 0.3)


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


def third_gone(name: str, folder: Path, samples: Samples | None = None) -> tuple[Network, Plan]:
    case = CASES[name]
    pruner = Network(case.network(), case.family, samples or case.samples(64), folder / "work")
    return pruner, pruner.plan(Score(criterion="random"), Allocate(ratio=0.3, method="global"))


def missed(pruned: Pruned, name: str) -> float:
    """The share of the dense outputs that is missed on samples that no fit has seen."""
    inputs = CASES[name].samples(64, seed=5).inputs
    with torch.no_grad():
        dense = CASES[name].network()(inputs)
        return float((pruned.network(inputs) - dense).square().sum() / dense.square().sum())


@pytest.mark.parametrize("name", CASES)
def test_trained_networks_are_nearer_to_the_dense_ones_than_fitted_ones(name, tmp_path):
    """Recurrent and spiking ones among them, whose gradients go back through time."""
    pruner, plan = third_gone(name, tmp_path)
    fitted, trained = (pruner.prune(plan, repair) for repair in ("local", "block"))
    assert missed(trained, name) < missed(fitted, name)
    assert all(fit.layer_after < fit.layer_before for fit in trained.fits)
    assert {id(fit.consumer) for fit in trained.fits} == {id(fit.consumer) for fit in fitted.fits}


def test_a_trained_network_reads_back_with_its_figures(tmp_path):
    pruner, plan = third_gone("lenet", tmp_path)
    pruned = pruner.prune(plan, "block")
    pruned.save(tmp_path / "pruned")
    inputs = CASES["lenet"].samples(seed=5).inputs
    assert torch.equal(load(tmp_path / "pruned", CASES["lenet"].network())(inputs), pruned.network(inputs))
    table, _ = read_table(tmp_path / "pruned" / "repair.parquet", "slice")
    assert table["layer_after"].tolist() == [fit.layer_after for fit in pruned.fits]
    assert table["others"].tolist() == [True, False]


def test_where_nothing_goes_nothing_is_trained(tmp_path):
    case = CASES["lenet"]
    pruner = Network(case.network(), case.family, case.samples(), tmp_path / "work")
    pruned = pruner.prune(Plan.dense(pruner.architecture), "block")
    assert pruned.fits == []
    for name, tensor in case.network().state_dict().items():
        assert torch.equal(pruned.network.state_dict()[name], tensor)


def test_no_step_sees_the_samples_that_judge(tmp_path):
    samples = CASES["lenet"].samples(64)
    inputs = samples.inputs.clone()
    inputs[7::8] += 0.1
    ways = []
    for number, own in enumerate((samples, Samples(inputs, samples.targets))):
        pruner, plan = third_gone("lenet", tmp_path / str(number), own)
        ways.append(pruner.prune(plan, "block", damping=0.1, epochs=Epochs(3, 1e-4)).fits)
    assert ways[0][0].layer_before != ways[1][0].layer_before
    assert all(fit.layer_after < fit.layer_before for fits in ways for fit in fits)
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one.weight, other.weight)


def test_an_interrupted_training_leaves_the_network_and_its_folder_as_they_were(tmp_path, monkeypatch):
    pruner, plan = third_gone("lenet", tmp_path)
    expected = pruner.prune(plan, "local").network.state_dict()
    files = sorted(tmp_path.rglob("*"))
    steps = []

    def stop(self: torch.optim.Adam) -> None:
        steps.append(self)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.Adam, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            pruner.prune(plan, "block")
    assert sorted(tmp_path.rglob("*")) == files
    for name, tensor in pruner.prune(plan, "local").network.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_what_was_frozen_is_frozen_again_and_float64_stays(tmp_path):
    case = CASES["lenet"]
    network, samples = case.network().double(), case.samples(64)
    network.conv1.requires_grad_(False)
    pruner = Network(network, case.family, Samples(samples.inputs.double(), samples.targets), tmp_path / "work")
    pruned = pruner.prune(pruner.plan(Score(criterion="random"), Allocate(ratio=0.3)), "block", epochs=Epochs(2, 1e-4))
    assert {name for name, p in pruned.network.named_parameters() if not p.requires_grad} == {
        "conv1.weight",
        "conv1.bias",
    }
    assert pruned.fits[0].layer_after < pruned.fits[0].layer_before
    for tensor in pruned.network.parameters():
        assert not torch.equal(tensor, tensor.float().double())


class Awkward(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.one, self.two, self.kind = nn.Linear(3, 4), nn.Linear(4, 2), kind

    def forward(self, x):
        y = self.two(self.one(x).relu())
        return {"labels": y.argmax(1), "detached": y.detach(), "mean": y.mean(0)}[self.kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("labels", r"the outputs for 28 samples are torch.int64 of shape \[28\]; repair = 'block' needs real numbers"),
        ("mean", r"the outputs for 28 samples are torch.float32 of shape \[2\]"),
        ("detached", "the outputs have no gradient by the weights"),
    ],
)
def test_outputs_that_cannot_be_trained_are_refused(kind, words, tmp_path):
    torch.manual_seed(0)
    described = NetworkFamily(family="f", prunable=["h"], modules={"one": "a -> h", "two": "h -> b"})
    samples = Samples(torch.randn(32, 3), torch.zeros(32), lambda outputs, targets: targets)
    pruner = Network(Awkward(kind), described, samples, tmp_path / "work")
    plan = pruner.plan(Score(criterion="magnitude"), Allocate(ratio=0.3))
    assert pruner.prune(plan, "local").fits
    with pytest.raises(LibpruneError, match=words):
        pruner.prune(plan, "block")


def test_a_training_that_nothing_would_judge_is_refused(tmp_path):
    pruner, plan = third_gone("lenet", tmp_path, CASES["lenet"].samples(7))
    assert pruner.prune(plan, "local", damping=0.01).fits
    with pytest.raises(LibpruneError, match="there are 7 samples, of which none is held out to judge the training by"):
        pruner.prune(plan, "block", damping=0.01)
