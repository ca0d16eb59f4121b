"""What runs on a GPU, on one that is pretended: it mixes no devices, waits seldom, and gives the bytes of a CPU."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from libprune.collection.accumulator import Accumulator
from libprune.collection.calibration import Calibration
from libprune.engine.describe import describe
from libprune.engine.errors import StatisticsError
from libprune.engine.stacks import exposed
from libprune.models.parallel import World
from libprune.models.sequences import Sequences
from libprune.narrowing.measure import collect_axes
from libprune.networks import Epochs, Network, NetworkFamily, Samples
from libprune.networks import load as load_network
from libprune.pipeline.sections import Activations, Allocate, Compute, Gradients, Hessian, Score
from libprune.repair import experts, least_squares, producers
from libprune.repair.least_squares import Inputs, repair_local
from libprune.repair.sequential import SequentialRepair
from libprune.repair.streams import split_batches
from libprune.statistics.activations import activation_groups, collect_activations
from libprune.statistics.gradients import collect_gradients, gradient_groups
from libprune.statistics.hessian import collect_squared_gradients, hessian_groups
from libprune.statistics.losses import LOSSES, Prefix, SequenceLosses
from tests.support.models import FAMILIES, plan_of, tokens
from tests.support.networks import LENET, LeNet
from tests.support.pretended import GPU, Pretended, on_gpu, pretending
from tests.support.pretended import waited as waiting

CPU = torch.device("cpu")
SEQUENCES, LENGTH, PASSES = 8, 8, 2
every_model = pytest.mark.parametrize("name", ["llama", "qwen3_moe"])


@pytest.fixture(autouse=True)
def room(monkeypatch) -> None:
    """A pretended GPU has room for all fits, a CPU is not asked."""
    for module in (experts, least_squares, producers):
        monkeypatch.setattr(module, "fits_on", lambda device, size: device.type == "cuda")


def passes(ids: Tensor, each: int = SEQUENCES // PASSES) -> Iterator[tuple[int, int, Sequences]]:
    return ((first // each, first, Sequences(ids[first : first + each])) for first in range(0, len(ids), each))


def activations(model: Any, ids: Tensor, device: torch.device) -> Accumulator:
    sums = Accumulator(activation_groups(describe(model), Activations()), device=device)
    collect_activations(model, describe(model), passes(ids), sums)
    return sums


def gradients(model: Any, ids: Tensor, device: torch.device) -> Accumulator:
    sums = Accumulator(gradient_groups(describe(model), LENGTH - 1, PASSES, Gradients()), device=device)
    collect_gradients(model, describe(model), passes(ids), sums, SEQUENCES)
    return sums


def hessian(model: Any, ids: Tensor, device: torch.device) -> Accumulator:
    sums = Accumulator(hessian_groups(describe(model), LENGTH - 1, Hessian(estimator="fisher")), device=device)
    collect_squared_gradients(model, describe(model), passes(ids[:PASSES], 1), sums)
    return sums


def tensors(sums: Accumulator) -> list[Tensor]:
    return [tensor for group in range(len(sums.groups)) for tensor in sums.finish(group).values()]


def both(name: str, run: Callable[..., list[Tensor]]) -> tuple[list[Tensor], list[Tensor], Counter[str]]:
    """What a function gives for a model on the CPU, and on a pretended GPU with how often the host waited."""
    model = exposed(FAMILIES[name](0), describe(FAMILIES[name](0))).eval()
    ids = tokens(SEQUENCES, LENGTH)
    plain = run(deepcopy(model), ids, CPU)
    with pretending() as waited:
        found = run(on_gpu(model), Pretended(ids), GPU)
    return plain, found, waited


def assert_bytes(one: list[Tensor], two: list[Tensor]) -> None:
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.nan_to_num(7.0), getattr(b, "host", b).nan_to_num(7.0))


@every_model
@pytest.mark.parametrize("collect", [activations, gradients, hessian])
def test_collectors_wait_twice_a_pass_at_most(name, collect):
    """With sums on the GPU; a mixture waits for its routing as well, in every layer."""

    def run(model: nn.Module, ids: Tensor, device: torch.device) -> list[Tensor]:
        sums = collect(model, ids, device)
        counted.update(waiting if device == GPU else {})
        return tensors(sums)

    counted = Counter[str]()
    plain, found, _ = both(name, run)
    assert_bytes(plain, found)
    routing = {place: times for place, times in counted.items() if "stacks.py" in place or "add_rows" in place}
    assert 0 < sum(counted.values()) - sum(routing.values()) <= 2 * PASSES
    assert bool(routing) == (name == "qwen3_moe")


def test_sums_that_stay_on_the_host_are_the_same():
    def run(model: nn.Module, ids: Tensor, device: torch.device) -> list[Tensor]:
        return tensors(activations(model, ids, CPU))

    plain, found, _ = both("llama", run)
    assert_bytes(plain, found)


def test_a_value_that_is_not_finite_is_named_as_on_a_cpu():
    def run(model: Any, ids: Tensor, device: torch.device) -> list[Tensor]:
        weight = model.get_submodule("model.layers.1.mlp.up_proj").weight
        getattr(weight, "host", weight).data[3, 2] = torch.inf
        with pytest.raises(StatisticsError) as error:
            activations(model, ids, device)
        messages.append(str(error.value))
        return []

    messages: list[str] = []
    both("llama", run)
    assert messages[0] == messages[1]
    assert "the input of model.layers.1.mlp.down_proj is not finite for calibration sequence 0" in messages[0]


def third(model: Any) -> Any:
    architecture = describe(model)
    return plan_of(architecture, lambda _, part: max(architecture.parts[part].least, 2 * architecture.units(part) // 3))


def losses(model: Any, ids: Tensor, device: torch.device) -> list[Tensor]:
    found = Prefix(model, describe(model), Sequences(ids), 4, range(4)).losses_of(third(model))
    sums = Accumulator([{LOSSES: SequenceLosses(1, len(found))}], device=device)
    sums.update(0, LOSSES, found, torch.tensor(0))
    return [found, torch.from_numpy(sums.state(0, LOSSES)["rows"].numpy())]  # as the depth stage asks for them


def local(model: Any, ids: Tensor, device: torch.device) -> list[Tensor]:
    architecture = describe(model)

    def inputs(consumer: Any) -> Inputs:
        sizes = architecture.sizes
        copies = (consumer.copies(sizes),) if consumer.stack else ()
        x = torch.randn(*copies, 64, consumer.each_input(sizes), generator=torch.Generator().manual_seed(1))
        return Inputs(x.mT @ x / 64, x[..., :8, :])

    def weight(name: str) -> Tensor:
        return model.get_parameter(name).detach().cpu()

    fits = repair_local(architecture, third(model), weight, inputs, None, device=device)
    return [fit.weight for fit in fits if fit.weight is not None]


def sequential(model: Any, ids: Tensor, device: torch.device) -> list[Tensor]:
    batches = split_batches(Sequences(ids), 4)
    run = SequentialRepair(model, describe(model), third(model), batches, 0.01, None, 2.0, steps=1)
    return [fit.weight for layer in range(4) for fit in run.step(layer) if fit.weight is not None]


def axes(model: Any, ids: Tensor, device: torch.device) -> list[Tensor]:
    sequences = Sequences(getattr(ids, "host", ids))
    run = object.__new__(Calibration)
    own = {"model": model, "architecture": describe(model), "sequences": sequences, "device": device, "at_once": 4}
    vars(run).update(own, world=World(), compute=Compute(offload="none"))
    found = collect_axes(run, "auto")
    chosen = found.order if found.turn is None else found.turn
    assert chosen is not None
    return [chosen, *found.ratios.values(), *found.grams.values(), *found.held_out.values()]


@pytest.mark.parametrize(
    ("run", "name"),
    [(losses, "llama"), (local, "llama"), (local, "qwen3_moe"), (sequential, "qwen3_moe"), (axes, "gpt2")],
)
def test_measuring_and_repairing_mix_no_devices(run, name):
    plain, found, waited = both(name, run)
    assert plain and waited
    assert_bytes(plain, found)


@every_model
def test_what_the_sequential_repair_keeps_of_the_text_waits_on_the_host(name):
    """Of each token: states, inputs and targets, which would fill a GPU; weights stay where they are."""

    def run(model: nn.Module, ids: Tensor, device: torch.device) -> list[Tensor]:
        weights = {tuple(parameter.shape) for parameter in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            assert tensor.device == CPU or tuple(tensor.shape) in weights
            kept.append(tensor)
            return tensor

        kept: list[Tensor] = []
        repair = SequentialRepair(
            model, describe(model), third(model), split_batches(Sequences(ids), 4), 0.01, steps=1, keep=keep
        )
        fits = [fit for layer in range(4) for fit in repair.step(layer)]
        assert len(kept) > len(fits)
        return [fit.weight for fit in fits if fit.weight is not None]

    plain, found, _ = both(name, run)
    assert_bytes(plain, found)


def test_a_pretended_gpu_refuses_what_a_real_one_does():
    with pretending() as waited:
        x = torch.arange(3.0).to("cuda")
        with pytest.raises(RuntimeError, match="on tensors of the host and of a GPU"):
            _ = x + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert (x.sum().item(), x.tolist(), x.cpu().tolist()) == (3.0, [0, 1, 2], [0, 1, 2])
    assert sum(waited.values()) == 4


@pytest.mark.parametrize("repair", ["local", "sequential", "block"])
def test_a_network_on_a_gpu_is_scored_repaired_and_saved(tmp_path, monkeypatch, repair):
    """From the statistics to the folder; the numbers of a GPU are those of a CPU."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 36, 1 << 36))
    samples, found = Samples(torch.randn(16, 1, 14, 14), torch.randint(3, (16,))), []
    for name, device in (("cpu", nullcontext()), ("gpu", pretending())):
        with device:
            torch.manual_seed(0)
            dense = LeNet() if name == "cpu" else on_gpu(LeNet())
            network = Network(dense, NetworkFamily(**LENET), samples, tmp_path / name)
            plan = network.plan(Score(criterion="unit_fisher"), Allocate(ratio=0.3, method="uniform"))
            pruned = network.prune(plan, repair, epochs=Epochs(1, 1e-3))
            pruned.save(tmp_path / f"{name}-pruned")
        found.append((plan, load_network(tmp_path / f"{name}-pruned", LeNet()).state_dict()))
    (one, on_cpu), (other, on_gpu_) = found
    assert all(np.array_equal(one.keep[block], other.keep[block]) for block in one.keep)
    for key, value in on_cpu.items():
        torch.testing.assert_close(on_gpu_[key], value, rtol=1e-4, atol=1e-5)
