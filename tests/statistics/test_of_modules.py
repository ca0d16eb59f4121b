"""Statistics of networks, against autograd of the same quantities written out in full."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from libprune.collection.calibration import Run
from libprune.collection.module_hooks import watched_inputs
from libprune.engine.architecture import Architecture
from libprune.engine.describe_module import describe_module
from libprune.engine.module_family import NetworkFamily
from libprune.models.folder import WeightFiles
from libprune.models.parallel import World
from libprune.models.samples import Samples
from libprune.pipeline.artifacts import read_table
from libprune.pipeline.sections import Activations, Compute, Gradients, Hessian
from libprune.pipeline.shards import read_meta, shard_path
from libprune.statistics.of_modules import measure_module_activations, measure_module_gradients, measure_module_hessian
from tests.support.networks import CASES


@dataclass(frozen=True)
class Collected:
    """A network, its samples, and the run that collects from it."""

    network: nn.Module
    architecture: Architecture
    samples: Samples
    run: Run

    def shard_path(self, measure: Callable[..., None], section: object) -> dict[str, Tensor]:
        """The tensors that a stage writes, in the folder `out`."""
        target = self.run.work / "out"
        measure(self.run, self.network, target, section)
        return load_file(shard_path(target, 0))


def collect_from(network: nn.Module, family: NetworkFamily, samples: Samples, folder: Path, at_once: int) -> Collected:
    architecture = describe_module(network, family, samples.inputs[:2], "here")
    (folder / "model").mkdir()
    save_file(dict(network.state_dict()), folder / "model" / "model.safetensors")
    run = Run(
        architecture=architecture,
        weights=WeightFiles(folder / "model"),
        sequences=samples,
        device=torch.device("cpu"),
        compute=Compute(),
        world=World(),
        meta={"model": "here", "tokens": "these", "sequences": len(samples)},
        work=folder / "work",
        at_once=at_once,
    )
    return Collected(network, architecture, samples, run)


@pytest.fixture(params=["lenet", "recurrent", "lstm"])
def collected(request, tmp_path) -> Collected:
    """Collected in batches of 7 of 24 samples, so that the last one is smaller."""
    case = CASES[request.param]
    return collect_from(case.network(), case.family, case.samples(), tmp_path, 7)


def carrying(collected: Collected) -> dict[str, nn.Parameter]:
    """The parameters one of whose dimensions carries a prunable axis."""
    parts = set(collected.architecture.parts)
    described = {p.name: set().union(*(dim.names for dim in p.dims)) for p in collected.architecture.parameters}
    return {name: p for name, p in collected.network.named_parameters() if described.get(name, set()) & parts}


def close(found: Tensor, expected: Tensor, what: str, rtol: float = 1e-4) -> None:
    largest = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=rtol * largest, msg=what)


def test_gradients_are_those_of_the_mean_loss_and_units_have_none_by_token(collected):
    section = Gradients(storage_dtype="float32")
    stored = collected.shard_path(measure_module_gradients, section)
    wanted, loss = carrying(collected), collected.samples.losses(collected.network).mean()
    expected = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    for (name, _), gradient in zip(wanted.items(), expected, strict=True):
        close(stored[name], gradient, name)
    out = collected.run.work / "out"
    table, meta = read_table(out / "units.parquet", "gradients")
    assert meta["loss"] == pytest.approx(float(loss.detach()))
    assert "unit_fisher_sequence" in table
    assert not [name for name in table if name.endswith("_token")]
    assert set(read_table(out / "layers.parquet", "gradients")[0]["batch"]) == {0, 1, 2, 3}


def test_second_moments_are_those_of_the_summed_losses_at_every_row(tmp_path):
    """The gradients at both outputs of two linear maps, and at the input of the second, which is a consumer."""
    torch.manual_seed(0)
    one, two = nn.Linear(3, 4), nn.Linear(4, 2)
    family = NetworkFamily(family="f", prunable=["h"], modules={"0": "a -> h", "2": "h -> b"})
    samples = Samples(torch.randn(10, 6, 3), torch.randint(2, (10, 6)))
    collected = collect_from(nn.Sequential(one, nn.Tanh(), two), family, samples, tmp_path, 4)
    stored = collected.shard_path(measure_module_gradients, Gradients())

    hidden = one(samples.inputs)
    between = torch.tanh(hidden)
    logits = two(between)
    total = nn.functional.cross_entropy(logits.flatten(0, 1), samples.targets.flatten(), reduction="sum")
    gradients = torch.autograd.grad(total, [hidden, between, logits])
    at = dict(zip(("0.output", "2.input", "2.output"), gradients, strict=True))
    names = {name.removesuffix("_gradient_square") for name in stored if name.endswith("_gradient_square")}
    assert names == at.keys()
    for name, gradient in at.items():
        close(stored[f"{name}_gradient_square"], gradient.square().flatten(0, 1).mean(0), name)


def test_the_diagonal_is_of_every_parameter_that_carries_units_from_single_samples(collected):
    section = Hessian(estimator="fisher", storage_dtype="float32")
    stored, wanted = collected.shard_path(measure_module_hessian, section), carrying(collected)
    assert stored.keys() == wanted.keys()
    squares = {name: torch.zeros_like(p) for name, p in wanted.items()}
    for sample in collected.samples.passes(1):
        loss = sample.losses(collected.network).sum()
        gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            squares[name] += gradient.square()
    for name, total in squares.items():
        close(stored[name], collected.samples.counted * total / len(collected.samples), name)
    meta = read_meta(collected.run.work / "out", "hessian")
    assert (meta["estimator"], meta["storage_dtype"]) == ("fisher", "float32")


def test_moments_are_over_the_rows_of_all_calls_and_there_is_no_layer_to_compare(collected):
    stored = collected.shard_path(measure_module_activations, Activations(storage_dtype="float32"))
    assert not [name for name in stored if "cosine" in name]
    parts = set(collected.architecture.parts)
    network, samples = collected.network, collected.samples
    with watched_inputs(network, collected.architecture.maps, len(samples)) as seen, torch.no_grad():
        network(samples.inputs)
    for entry, calls in seen.items():
        x = torch.cat(calls, 1)
        assert (f"{entry.module}.input_mean" in stored) == bool(parts & (entry.input.names | entry.output.names))
        if f"{entry.module}.input_mean" in stored:
            close(stored[f"{entry.module}.input_mean"], x.flatten(0, 1).mean(0), entry.module)
            assert int(stored[f"{entry.module}.input_tokens"]) == x.shape[0] * x.shape[1]
        if parts & entry.input.names:
            fitted = x[torch.arange(len(x)) % 8 != 7].flatten(0, 1).double()
            close(stored[f"{entry.module}.input_gram"], fitted.T @ fitted / len(fitted), entry.module)


def test_what_is_collected_does_not_stay_on_the_network(collected):
    for measure, section in (
        (measure_module_gradients, Gradients()),
        (measure_module_hessian, Hessian(estimator="hutchinson", probes=1)),
        (measure_module_activations, Activations()),
    ):
        collected.shard_path(measure, section)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in collected.network.modules())
    assert all(parameter.grad is None for parameter in collected.network.parameters())
    assert not list(Path(collected.run.work).glob("*/*/process-*"))
