"""Statistics, repair and errors of networks, each against another way to the same number; and their folders."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from libprune.allocation.retention import wanted_removals
from libprune.collection.module_hooks import input_rows
from libprune.engine.describe_module import describe_module
from libprune.engine.errors import BudgetError, FamilyError, LibpruneError
from libprune.engine.plan import Plan
from libprune.models.sequences import NO_TARGET
from libprune.networks import Epochs, NetworkFamily, Samples, load
from libprune.networks.network import Network
from libprune.networks.recurrent import RecurrentLM
from libprune.networks.recurrent_family import family
from libprune.pipeline.artifacts import read_table
from libprune.pipeline.sections import Allocate, Hessian, Score
from libprune.pipeline.shards import GRAM, read_tensor
from libprune.scoring.criteria import CRITERIA
from tests.support.networks import CASES, LeNet

CASE = CASES["lenet"]


def _frames() -> tuple[nn.Module, NetworkFamily, Samples]:
    class Frames(nn.Module):
        """Convolutions see every frame of a film as a sample of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 3), nn.Linear(3, 2)

        def forward(self, x):
            frames = torch.relu(self.two(torch.relu(self.one(x.flatten(0, 1)))))
            return self.out(frames.mean((2, 3))).unflatten(0, x.shape[:2]).mean(1)

    torch.manual_seed(0)
    modules = {"one": "pixel -> c", "two": "c -> d", "out": "d -> class"}
    samples = Samples(torch.randn(24, 5, 1, 6, 6), torch.randint(2, (24,)))
    return Frames(), NetworkFamily(family="frames", prunable=["c", "d"], modules=modules), samples


def test_whole_samples_are_held_out_where_a_convolution_sees_their_parts(tmp_path):
    network, described, samples = _frames()
    pruner = Network(network, described, samples, tmp_path / "work", batch=10)
    pruner.scores(Score(criterion="fluctuation"))
    fitted = samples.inputs[torch.arange(24) % 8 != 7].flatten(0, 1)
    with torch.no_grad():
        x = input_rows(network.two, torch.relu(network.one(fitted)), 105).flatten(0, 1).double()
    gram = read_tensor(tmp_path / "work" / "activations", 0, "two" + GRAM, "activations").double()
    torch.testing.assert_close(gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    plan = pruner.plan(Score(criterion="random"), Allocate(ratio=0.3, method="global"))
    assert all(fit.after <= fit.before for fit in pruner.prune(plan, "sequential").fits)


@pytest.mark.parametrize("name", CASES)
def test_statistics_do_not_depend_on_the_size_of_batches(name, tmp_path):
    case = CASES[name]
    tables = []
    for batch in (24, 7):
        folder = tmp_path / str(batch)
        network = Network(case.network(), case.family, case.samples(), folder, batch)
        for criterion in ("taylor_2nd", "unit_fisher", "fluctuation"):
            network.scores(Score(criterion=criterion))
        tables.append([read_table(folder / stage / "units.parquet", stage)[0] for stage in _STAGES])
    for one, two in zip(*tables, strict=True):
        assert one.keys() == two.keys()
        for column in one.keys() - {"group_type"}:
            np.testing.assert_allclose(one[column], two[column], rtol=1e-4, atol=1e-7, err_msg=column)


_STAGES = ("gradients", "hessian", "activations")


def test_samples_with_fewer_targets_count_alike_whatever_batch_they_are_in(tmp_path):
    torch.manual_seed(0)
    model, ids = RecurrentLM(vocab=20, embedding=6, hidden=8, layers=1).eval(), torch.randint(20, (16, 10))
    targets = ids[:, 1:].clone()
    for number, row in enumerate(targets):
        row[2 + number % 7 :] = NO_TARGET
    samples = Samples(ids[:, :-1], targets)
    assert samples.counted == 5
    found = [
        Network(model, family(model), samples, tmp_path / str(batch), batch).scores(Score(criterion="obs_fisher"))[0]
        for batch in (16, 3)
    ]
    np.testing.assert_allclose(found[0]["importance"], found[1]["importance"], rtol=1e-4)


def test_squared_gradients_are_those_of_single_samples(tmp_path):
    case = CASES["lenet"]
    network, samples = case.network(), case.samples()
    pruner = Network(network, case.family, samples, tmp_path / "work")
    pruner.scores(Score(criterion="fisher"))
    names = dict(network.named_parameters())

    def loss(parameters, x, y):
        return nn.functional.cross_entropy(torch.func.functional_call(network, parameters, (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
        {name: p.detach() for name, p in names.items()}, samples.inputs, samples.targets
    )
    for name, gradients in each.items():
        if name != "fc2.bias":  # carries no unit
            stored = read_tensor(tmp_path / "work" / "hessian", 0, name, "hessian").float()
            torch.testing.assert_close(stored, gradients.square().mean(0), rtol=1e-2, atol=1e-9)  # stored in bfloat16


def test_random_probes_find_the_diagonal_of_the_hessian(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    family = NetworkFamily(family="tanh", prunable=["h"], modules={"0": "in -> h", "2": "h -> out"})
    samples = Samples(torch.randn(8, 3).double(), torch.randint(2, (8,)))
    hessian = Hessian(estimator="hutchinson", probes=1500, storage_dtype="float32")
    pruner = Network(network, family, samples, tmp_path / "work", hessian=hessian)
    pruner.scores(Score(criterion="fisher"))

    def loss(weight):
        return nn.functional.cross_entropy(
            torch.func.functional_call(network, {"0.weight": weight}, (samples.inputs,)), samples.targets
        )

    weight = network[0].weight.detach()
    exact = torch.autograd.functional.hessian(loss, weight).reshape(6, 6).diagonal().view(2, 3)
    found = read_tensor(tmp_path / "work" / "hessian", 0, "0.weight", "hessian").double()
    assert float((found - exact).abs().max()) < 0.1 * float(exact.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_gram_matrices_are_those_of_the_samples_that_fits_see(name, tmp_path):
    case = CASES[name]
    network, samples = case.network(), case.samples()
    pruner = Network(network, case.family, samples, tmp_path / "work", batch=5)
    pruner.scores(Score(criterion="fluctuation"))
    fitted = torch.arange(len(samples)) % 8 != 7
    for entry in pruner.architecture.maps:
        if not set(pruner.architecture.parts) & entry.input.names:
            continue
        module, seen = network.get_submodule(entry.module), []
        handle = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            network(samples.inputs[fitted])
        handle.remove()
        x = torch.cat([input_rows(module, call, int(fitted.sum())) for call in seen], 1).flatten(0, 1).double()
        gram = read_tensor(tmp_path / "work" / "activations", 0, entry.module + GRAM, "activations").double()
        torch.testing.assert_close(gram, x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_statistics_are_collected_once_and_anew_for_other_samples(tmp_path):
    case, folder = CASES["lenet"], tmp_path / "work"

    def score(samples: Samples) -> float:
        Network(case.network(), case.family, samples, folder).scores(Score(criterion="taylor"))
        return (folder / "gradients" / "units.parquet").stat().st_mtime_ns

    first = score(case.samples())
    assert score(case.samples()) == first
    assert score(case.samples(seed=2)) != first


@pytest.mark.parametrize("criterion", [name for name, record in CRITERIA.items() if record.only is None])
@pytest.mark.parametrize("name", CASES)
def test_every_criterion_scores_every_unit(name, criterion, scored):
    table, _ = scored[name].scores(Score(criterion=criterion))
    assert len(table["importance"]) == sum(scored[name].architecture.units(p) for p in scored[name].architecture.parts)
    assert np.isfinite(table["importance"]).all()
    assert np.ptp(table["importance"]) > 0


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> dict[str, Network]:
    folder = tmp_path_factory.mktemp("scored")
    return {n: Network(case.network(), case.family, case.samples(), folder / n) for n, case in CASES.items()}


class Repeated(nn.Module):
    """One map and one activation in two places each, and a parameter of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        again, act = nn.Linear(3, 3), nn.PReLU()
        self.first, self.second, self.one, self.two = again, again, act, act
        self.wide, self.out, self.scale = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.rand(6))

    def forward(self, x):
        x = self.two(self.second(self.one(self.first(x))))
        return self.out(torch.tanh(self.wide(x)) * self.scale)


REPEATED = {"first": "a -> a", "one": "a", "wide": "a -> h", "out": "h -> b", "": "h"}


def test_a_module_in_two_places_is_described_once(tmp_path):
    torch.manual_seed(0)
    described = NetworkFamily(family="f", prunable=["h"], modules=REPEATED)
    samples = Samples(torch.randn(16, 3), torch.randint(2, (16,)))
    network = Network(Repeated(), described, samples, tmp_path / "work")
    plan = network.plan(Score(criterion="taylor"), Allocate(ratio=0.3, method="uniform"))
    pruned = network.prune(plan)
    assert pruned.network.second is pruned.network.first
    assert len(pruned.network.scale) == plan.kept(0, "h") < 6
    pruned.save(tmp_path / "pruned")
    again = load(tmp_path / "pruned", Repeated())
    assert torch.equal(again(samples.inputs), pruned.network(samples.inputs))
    del described.modules["one"]
    with pytest.raises(FamilyError, match=r"does not describe parameter 'one.weight'"):
        describe_module(Repeated(), described, samples.inputs)


def test_a_map_on_which_no_loss_depends_has_gradients_of_zero(tmp_path):
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.out = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.one(x) + self.two(x).detach())

    described = NetworkFamily(family="f", prunable=["h"], modules={"one": "a -> h", "two": "a -> h", "out": "h -> b"})
    samples = Samples(torch.randn(8, 3), torch.randint(2, (8,)))
    network = Network(Detached(), described, samples, tmp_path / "work")
    table, _ = network.scores(Score(criterion="taylor_2nd"))
    assert np.isfinite(table["importance"]).all()
    assert not read_tensor(tmp_path / "work" / "gradients", 0, "two.weight", "gradients").any()


def test_what_cannot_be_watched_is_refused_by_name(tmp_path):
    class Uneasy(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.one, self.two, self.kind = nn.Linear(3, 4), nn.Linear(4, 2), kind

        def forward(self, x):
            y = self.two(input=self.one(x)) if self.kind == "keyword" else self.two(self.one(x))
            return (y, x) if self.kind == "tuple" else y

    described = NetworkFamily(family="f", prunable=["h"], modules={"one": "a -> h", "two": "h -> b"})
    x = torch.randn(4, 3)
    with pytest.raises(FamilyError, match="'two' is given its input by keyword"):
        describe_module(Uneasy("keyword"), described, x)
    samples = Samples(x, torch.randint(2, (4,)))
    with pytest.raises(LibpruneError, match="returns a tuple, not a tensor"):
        Network(Uneasy("tuple"), described, samples, tmp_path / "work")
    with pytest.raises(LibpruneError, match=r"one.weight is bfloat16"):
        Network(Uneasy("").bfloat16(), described, samples, tmp_path / "work")
    with pytest.raises(LibpruneError, match="on GPUs that PyTorch calls cuda, not on meta"):
        Network(Uneasy("").to("meta"), described, samples, tmp_path / "work")
    with pytest.raises(LibpruneError, match="there are 4 samples, of which none is held out"):
        network = Network(Uneasy(""), described, samples, tmp_path / "work")
        network.prune(network.plan(Score(criterion="taylor"), Allocate(ratio=0.3, method="uniform")))


def test_what_networks_do_not_have_is_refused(scored):
    network = scored["lenet"]
    with pytest.raises(LibpruneError, match="method = 'hgsp' needs a language model"):
        network.plan(Score(criterion="taylor"), Allocate(method="hgsp"))
    with pytest.raises(LibpruneError, match="objective = 'cache' needs a language model"):
        network.plan(Score(criterion="taylor"), Allocate(objective="cache"))
    with pytest.raises(LibpruneError, match="fisher_over = 'token' needs a language model"):
        network.scores(Score(criterion="unit_fisher", fisher_over="token"))
    with pytest.raises(LibpruneError, match="at least one unit"):
        network.plan(Score(criterion="taylor"), Allocate(min_channels=0))
    with pytest.raises(LibpruneError, match="repair = 'bias' is unknown"):
        network.prune(Plan.dense(network.architecture), "bias")
    plan = network.plan(Score(criterion="magnitude"), Allocate(ratio=0.3))
    for damping in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(LibpruneError, match=f"damping = {damping} is no ridge; give a number above 0"):
            network.prune(plan, damping=damping)
    for epochs in ({"number": 0}, {"rate": -1e-3}, {"patience": 0}):
        with pytest.raises(LibpruneError, match="of the epochs is no number above 0"):
            Epochs(**{"number": 1, "rate": 1e-3} | epochs)
    with pytest.raises(LibpruneError, match="compares only within a layer and part"):
        network.plan(Score(criterion="wanda"), Allocate(method="global"))
    with pytest.raises(BudgetError, match=r"ratio = 0.9.* at most 0\.\d+ can"):
        network.plan(Score(criterion="taylor"), Allocate(ratio=0.9, min_channels=3))


def test_a_folder_that_is_a_file_and_a_batch_of_nothing_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, batch, message in (
        (tmp_path / "file", 64, "is a file; name a folder"),
        (tmp_path, 0, "batch = 0 is no"),
    ):
        with pytest.raises(LibpruneError, match=message):
            Network(nn.Linear(3, 4), tmp_path / "none.yaml", Samples(torch.zeros(2, 3), torch.zeros(2)), folder, batch)
    with pytest.raises(LibpruneError, match=r"hessian\.estimator is none; choose fisher"):
        Network(CASE.network(), CASE.family, CASE.samples(), tmp_path / "work", hessian=Hessian(probes=4))


@pytest.mark.parametrize("name", ["lenet", "lstm"])
def test_retention_without_a_ratio_takes_what_each_part_lets_go(name, scored):
    network = scored[name]
    architecture, score = network.architecture, Score(criterion="unit_fisher")
    plan = network.plan(score, Allocate(ratio=None, method="retention", network_type="transformer"))
    wanted = wanted_removals(architecture, network.scores(score)[0], "transformer")
    gone = {block: architecture.units(block[1]) - plan.kept(*block) for block in architecture.blocks()}
    assert gone == {block: int(number) for block, number in wanted.items()}
    assert sum(gone.values()) > 0


def test_without_a_ratio_other_methods_and_retention_of_nothing_are_refused(scored):
    with pytest.raises(LibpruneError, match="ratio is None; say which share"):
        scored["lenet"].plan(Score(criterion="magnitude"), Allocate(ratio=None))
    floors = Allocate(ratio=None, method="retention", min_channels=99)
    with pytest.raises(BudgetError, match="retention finds no part"):
        scored["lenet"].plan(Score(criterion="magnitude"), floors)


class Steep(nn.Module):
    """Magnifies the rounding of float32 to the size of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 400), nn.Linear(400, 3)

    def forward(self, x):
        return torch.sin(1e7 * self.two(self.one(x)))


def test_what_differs_by_rounding_alone_is_proved_in_float64(tmp_path):
    torch.manual_seed(0)
    described = NetworkFamily(family="steep", prunable=["h"], modules={"one": "a -> h", "two": "h -> b"})
    samples = Samples(torch.randn(16, 4), torch.randint(3, (16,)))
    network = Network(Steep(), described, samples, tmp_path / "work")
    pruned = network.prune(network.plan(Score(criterion="magnitude"), Allocate(ratio=0.5)), "none")
    assert pruned.proof["difference"] < 1e-5 * pruned.proof["scale"]


def test_a_loss_must_be_told_sample_by_sample(tmp_path):
    case = CASES["lenet"]
    samples = case.samples()
    samples = Samples(samples.inputs, samples.targets, nn.functional.cross_entropy)
    with pytest.raises(LibpruneError, match=r"has shape \[\]; it must give one number a sample"):
        Network(case.network(), case.family, samples, tmp_path / "work")


def test_inputs_and_targets_must_go_together():
    with pytest.raises(LibpruneError, match="2 inputs and 3 targets"):
        Samples(torch.zeros(2), torch.zeros(3))


def test_what_else_lies_in_the_folder_stays(tmp_path):
    case = CASES["lenet"]
    (tmp_path / "notes.txt").write_text("mine")
    for seed in (0, 1):  # the second network takes the first one's place
        network = Network(case.network(seed), case.family, case.samples(), tmp_path)
        network.scores(Score(criterion="taylor"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


# The folder of a network


def importance(network: Network, criterion: str) -> list[float]:
    return network.scores(Score(criterion=criterion))[0]["importance"].tolist()


def test_a_folder_keeps_what_is_not_of_a_network(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    Network(CASE.network(), CASE.family, CASE.samples(), tmp_path)
    Network(LeNet(c1=3), CASE.family, CASE.samples(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("path", "content"), [("model/weights", "mine"), ("architecture.json", '{"head": "causal_lm"}')]
)
def test_a_folder_where_something_else_is_in_the_way_is_refused(path, content, tmp_path):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(content)
    with pytest.raises(LibpruneError, match="is not of a network that was pruned here; name another folder"):
        Network(CASE.network(), CASE.family, CASE.samples(), tmp_path)
    assert (tmp_path / path).read_text() == content


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "obs"])
def test_two_networks_can_take_turns_in_one_folder(criterion, tmp_path):
    first = Network(CASE.network(), CASE.family, CASE.samples(), tmp_path / "work")
    expected = importance(first, criterion)
    torch.manual_seed(9)
    second = Network(LeNet(), CASE.family, CASE.samples(), tmp_path / "work")
    assert importance(second, criterion) != expected
    np.testing.assert_allclose(importance(first, criterion), expected, rtol=1e-6)


def test_statistics_are_those_of_the_loss_that_is_given(tmp_path):
    """Functions of one name, a module and a partial function."""
    samples, found = CASE.samples(), []
    losses = (
        nn.CrossEntropyLoss(reduction="none"),
        partial(nn.functional.cross_entropy, reduction="none", label_smoothing=0.3),
        lambda outputs, targets: (outputs.mean(1) - targets).square(),
        lambda outputs, targets: (outputs.mean(1) - targets).abs(),
    )
    for loss in losses:
        given = Samples(samples.inputs, samples.targets, loss)
        found.append(importance(Network(CASE.network(), CASE.family, given, tmp_path / "work"), "taylor"))
    assert len(set(map(tuple, found))) == len(losses)


def test_a_hessian_is_collected_anew_for_another_estimator(tmp_path):
    estimators = (Hessian(estimator="fisher"), Hessian(estimator="hutchinson"), Hessian(estimator="hutchinson", seed=1))
    found = {
        tuple(importance(Network(CASE.network(), CASE.family, CASE.samples(), tmp_path, hessian=hessian), "taylor_2nd"))
        for hessian in estimators
    }
    assert len(found) == len(estimators)


def test_a_plan_of_another_network_is_refused(tmp_path):
    wider = Network(LeNet(c1=6), CASE.family, CASE.samples(), tmp_path / "wider")
    plan = wider.plan(Score(criterion="magnitude"), Allocate(ratio=0.3, method="uniform"))
    network = Network(CASE.network(), CASE.family, CASE.samples(), tmp_path / "work")
    with pytest.raises(LibpruneError, match="the plan is of units c1 6, c2 5, f1 12, but the network has c1 4"):
        network.prune(plan, "none")
