"""Statistics of experts: each expert's own rows, whatever the batches; and what the stages make of a tiny mixture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from libprune.collection.accumulator import UNITS, Accumulator
from libprune.collection.records import Gram, Histogram, InputMoments, count
from libprune.collection.stacked import Routed, RoutedHeldOut, Squares, Stacked
from libprune.engine.describe import describe
from libprune.engine.stacks import Routing, exposed
from libprune.engine.surgery import oriented
from libprune.models.compute import sequence_losses
from libprune.models.sequences import Sequences
from libprune.pipeline.sections import Activations
from libprune.pipeline.shards import GRAM, ROUTED
from libprune.statistics.activations import activation_columns, activation_groups, collect_activations
from libprune.statistics.hessian import bare_parameters
from tests.support import collected
from tests.support.models import FAMILIES, tokens

COPIES, WIDTH = 4, 3
KINDS = {"moments": InputMoments(WIDTH), "gram": Gram(WIDTH), "histogram": Histogram(WIDTH), "squares": Squares(WIDTH)}
counts_of_batches = st.lists(st.lists(st.integers(0, 5), min_size=COPIES, max_size=COPIES), min_size=1, max_size=4)


@settings(max_examples=25)
@given(counts_of_batches, st.sampled_from(sorted(KINDS)), st.booleans(), st.integers(0, 99))
def test_each_expert_has_the_statistic_of_its_own_rows(batches, kind, joined, seed):
    """However the rows come in batches, and whether states are updated or joined."""
    torch.manual_seed(seed)
    stacked, state = Stacked(COPIES, KINDS[kind]), Stacked(COPIES, KINDS[kind]).init()
    own: list[list[Tensor]] = [[] for _ in range(COPIES)]
    for counts in batches:
        rows = torch.randn(sum(counts), WIDTH)
        for copy, part in enumerate(rows.split(counts)):
            own[copy].append(part)
        batch = rows, torch.tensor(counts)
        stacked.merge(state, stacked.measure(*batch)) if joined else stacked.update(state, *batch)
    found = stacked.finish(state)
    for copy, parts in enumerate(own):
        rows = torch.cat(parts)
        if not len(rows):
            assert all(not tensor[copy].any() for tensor in found.values())
            continue
        expected = KINDS[kind].finish(KINDS[kind].measure(rows))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name][copy], tensor, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_stored_sizes_can_be_counted_without_data():
    for kind in KINDS.values():
        state = Stacked(COPIES, kind).init("meta")
        assert all(tensor.is_meta for tensor in Stacked(COPIES, kind).finish(state).values())


def test_reap_is_the_mean_norm_over_an_experts_own_tokens():
    added, experts = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0]]), torch.tensor([0, 2, 0])
    found = Routed(3).finish(Routed(3).measure(added, experts, count(4)))
    assert found["reap"].tolist() == [7.5, 0.0, 1.0]
    assert found["frequency"].tolist() == [0.5, 0.0, 0.25]


def test_held_out_rows_have_places_of_their_own():
    statistic = RoutedHeldOut(2, 1)
    state = statistic.measure(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1]), torch.tensor([5, 5]))
    statistic.update(state, torch.tensor([[3.0]]), torch.tensor([0]), torch.tensor([7]))
    rows = statistic.finish(state)[""]
    assert rows[0, [5, 7], 0].tolist() == [1.0, 3.0]
    assert rows[1, [5, 7], 0].tolist() == [2.0, 0.0]
    assert int(rows.count_nonzero()) == int(statistic.finish(state)["tokens"]) == 3


# On a model


@pytest.fixture(scope="module")
def mixture():
    model = FAMILIES["qwen3_moe"](0)
    architecture = describe(model)
    return exposed(model, architecture), architecture


@pytest.fixture(scope="module")
def stack(mixture):
    return next(entry for entry in mixture[1].maps if entry.stack and entry.stack in entry.input.names)


class Seen:
    """The rows of a consuming stack of layer 0 in one pass, gathered by the formula of the mixture itself."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        experts, inputs = model.get_submodule("model.layers.0.mlp.experts"), []
        handle = experts.register_forward_pre_hook(lambda module, args: inputs.append(args))
        with torch.no_grad():
            model(ids)
        handle.remove()
        hidden, self.chosen, self.weights = inputs[0]
        first = torch.einsum("tm,eom->teo", hidden, experts.gate_up_proj)
        gate, up = first.chunk(2, dim=-1)
        self.inner = experts.act_fn(gate) * up
        self.added = torch.einsum("tei,emi->tem", self.inner, experts.down_proj)

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Inputs of an expert's second map times the router's weight, and what it adds, for the tokens it gets."""
        token, place = (self.chosen == expert).nonzero(as_tuple=True)
        weight = self.weights[token, place][:, None]
        return weight * self.inner[token, expert], weight * self.added[token, expert]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_activations_are_those_of_the_tokens_that_an_expert_gets(mixture, stack, size):
    model, architecture = mixture
    sums = Accumulator(activation_groups(architecture, Activations(storage_dtype="float32")))
    collect_activations(model, architecture, collected.batches(size), sums)
    found, seen = sums.finish(0), Seen(model, tokens(collected.SEQUENCES, collected.LENGTH))
    for expert in range(architecture.sizes["experts"]):
        inputs, added = seen.of(expert)
        assert int(found[f"{stack.module}.input_tokens"][expert]) == len(inputs)
        norm = found[f"{stack.module}.input_norm_l2"][expert]
        torch.testing.assert_close(norm, inputs.norm(dim=0), rtol=1e-4, atol=1e-6)
        gram = found[stack.module + GRAM][expert]
        torch.testing.assert_close(gram, inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-7)
        reap = found[f"{stack.module}{ROUTED}.reap"][expert].float()
        torch.testing.assert_close(reap, added.norm(dim=1).mean(), rtol=1e-4, atol=1e-7)
    share = found[f"{stack.module}{ROUTED}.frequency"]
    assert float(share.sum()) == pytest.approx(model.config.num_experts_per_tok)
    columns = activation_columns(architecture, found, model.state_dict(), 0, "experts")
    assert (columns["routed_frequency"] == share.numpy()).all()


@pytest.mark.parametrize("experts", ["whole", "channels"])
def test_the_mask_gradient_is_that_of_what_units_add(mixture, stack, experts):
    """Of a factor on everything that an expert adds, or on one channel of every expert, in each sequence."""
    model = mixture[0]
    architecture = describe(model, experts=experts)
    units = torch.from_numpy(stack.input.units(architecture.parts["experts"].axis, architecture.sizes))
    module = model.get_submodule(stack.module)
    factors = torch.ones(collected.SEQUENCES, architecture.units("experts"), requires_grad=True)

    def scale(module: nn.Module, args: tuple[Tensor, Routing]) -> tuple[Tensor, Routing]:
        x, routing = args
        of_row = units.view(module.copies, -1)[routing.experts]
        return x * factors[routing.tokens // collected.LENGTH][torch.arange(len(x))[:, None], of_row], routing

    handle = module.register_forward_pre_hook(scale)
    losses = sequence_losses(model, Sequences(tokens(collected.SEQUENCES, collected.LENGTH)))
    (expected,) = torch.autograd.grad(losses.sum(), factors)
    handle.remove()
    sums = collected.gradients(model, architecture=architecture)
    found = sums.finish(0)
    torch.testing.assert_close(found[f"{UNITS}experts.mask_gradient"], expected.mean(0).double(), rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(
        found[f"{UNITS}experts.mask_gradient_square"], expected.square().mean(0).double(), rtol=1e-3, atol=1e-9
    )


def test_mask_gradients_of_a_channel_add_up_over_experts_and_shared_experts():
    """They are consumers of one part then, and enter the sums together, once a sequence."""
    model = FAMILIES["deepseek_v3"](0)
    architecture = describe(model, experts="channels")
    exposed(model, architecture)
    layer, unit, step = 2, 1, 0.05
    assert len(architecture.consumers(layer, "experts")) == 2
    found = collected.gradients(model, architecture=architecture).finish(layer)

    def losses(factor: float) -> Tensor:
        handles = []
        for consumer in architecture.consumers(layer, "experts"):
            units = torch.from_numpy(consumer.input.units(architecture.parts["experts"].axis, architecture.sizes))
            module = model.get_submodule(consumer.module)
            factors = torch.where(units == unit, factor, 1.0)

            def scale(module: nn.Module, args: tuple, factors: Tensor = factors) -> tuple:
                own = factors.view(module.copies, -1)[args[1].experts] if len(args) > 1 else factors
                return args[0] * own, *args[1:]

            handles.append(module.register_forward_pre_hook(scale))
        with torch.no_grad():
            measured = sequence_losses(model, Sequences(tokens(collected.SEQUENCES, collected.LENGTH)))
        for handle in handles:
            handle.remove()
        return measured

    slope = (losses(1 + step) - losses(1 - step)) / (2 * step)
    assert float(found[f"{UNITS}experts.mask_gradient"][unit]) == pytest.approx(float(slope.mean()), rel=2e-2, abs=1e-6)
    square = float(found[f"{UNITS}experts.mask_gradient_square"][unit])
    assert square == pytest.approx(float(slope.square().mean()), rel=4e-2)


def test_gradients_and_squares_of_experts_and_routers_are_those_of_autograd(mixture):
    model, architecture = mixture
    bare = bare_parameters(architecture)
    assert {name.rpartition(".")[2] for name in bare} == {"gate_up_proj", "down_proj", "weight"}
    found, squares = collected.gradients(model), collected.hessian(model, size=1)
    losses = sequence_losses(model, Sequences(tokens(collected.SEQUENCES, collected.LENGTH)))
    for name, parameter in bare.items():
        tensor = model.get_parameter(name).requires_grad_(True)
        losses = sequence_losses(model, Sequences(tokens(collected.SEQUENCES, collected.LENGTH)))
        each = torch.stack([torch.autograd.grad(loss, tensor, retain_graph=True)[0] for loss in losses])
        tensor.requires_grad_(False)
        for sums, expected in ((found, each.mean(0)), (squares, collected.N_TOK * each.square().mean(0))):
            value = sums.finish(parameter.layer)[name]
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_the_weights_of_a_stack_lie_side_by_side(mixture, stack):
    """The input positions of the wide map are those of the rows, whatever the storage order."""
    model, architecture = mixture
    weight = model.get_parameter(stack.weight).detach()
    wide = oriented(stack, weight)
    assert wide.shape == (architecture.sizes["model"], stack.input.size(architecture.sizes))
    each = stack.each_input(architecture.sizes)
    for expert, own in enumerate(weight):
        assert torch.equal(wide[:, expert * each : (expert + 1) * each], own)
