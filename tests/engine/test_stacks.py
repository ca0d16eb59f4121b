"""Stacked maps: they compute what the loop of transformers does, and a router forgets removed experts."""

import pytest
import torch
from torch import Tensor, nn

from libprune.engine.describe import describe
from libprune.engine.plan import Plan
from libprune.engine.stacks import IMPLEMENTATION, Routing, StackedMap, exposed, only_experts
from libprune.engine.surgery import masked
from tests.support.models import FAMILIES, MIXTURES, tokens


@pytest.fixture(params=MIXTURES)
def model(request):
    return FAMILIES[request.param](0)


def gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of their sum of squares by every parameter."""
    model.zero_grad()
    logits = model(tokens()).logits
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_exposed_experts_compute_what_the_own_loop_of_the_model_does(model):
    model.set_experts_implementation("eager")
    expected, own = gradients(model)
    exposed(model, describe(model))
    assert model.config._experts_implementation == IMPLEMENTATION
    found, new = gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert own.keys() == new.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(new[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_a_stand_in_has_no_parameters_and_leaves_the_state_as_it_was(model):
    before = set(model.state_dict())
    architecture = describe(model)
    exposed(exposed(model, architecture), architecture)
    assert set(model.state_dict()) == before
    assert describe(model) == architecture
    stand_ins = [module for module in model.modules() if isinstance(module, StackedMap)]
    assert len(stand_ins) == sum(entry.stack is not None for entry in architecture.maps)


def test_removed_experts_are_never_chosen_and_the_router_is_as_before_afterwards(model):
    architecture = describe(model)
    exposed(model, architecture)
    layer, part = next(b for b in architecture.blocks() if architecture.parts[b[1]].router)
    keep = Plan.dense(architecture).keep[layer, part].copy()
    chosen: list[Tensor] = []
    experts = next(m for m in model.modules() if isinstance(m, StackedMap))
    experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1].experts.unique()))
    with torch.no_grad():
        dense = model(tokens()).logits
        by_group = keep.reshape(architecture.parts[part].groups, -1)
        by_group[:, chosen[0][0] % by_group.shape[1]] = False
        with only_experts(model, architecture, layer, part, keep):
            model(tokens())
        again = model(tokens()).logits
    assert torch.equal(dense, again)
    assert set(chosen[1].tolist()) <= set(keep.nonzero()[0].tolist())
    assert not set(chosen[0].tolist()) <= set(keep.nonzero()[0].tolist()), "the dense model chooses a removed expert"


def test_a_failure_inside_a_mask_leaves_the_router_as_it_was(model):
    architecture = describe(model)
    exposed(model, architecture)
    layer, part = next(b for b in architecture.blocks() if architecture.parts[b[1]].router)
    router = model.get_submodule(f"{architecture.layers_path}.{layer}.{architecture.parts[part].router}")
    groups = architecture.parts[part].groups
    firsts = [group * architecture.units(part) // groups for group in range(groups)]
    plan = Plan.dense(architecture).without((layer, part), firsts)
    with pytest.raises(ZeroDivisionError), masked(model, architecture, plan):
        assert "forward" in vars(router)
        raise ZeroDivisionError
    assert "forward" not in vars(router)


def test_rows_are_sorted_by_expert_and_keep_their_token_and_weight():
    chosen, weights = torch.tensor([[2, 0], [0, 1], [2, 1]]), torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    routing = Routing.of(chosen, weights, 4)
    assert routing.counts == (2, 2, 2, 0)
    assert routing.experts.tolist() == [0, 0, 1, 1, 2, 2]
    assert routing.tokens.tolist() == [0, 1, 1, 2, 0, 2]
    assert torch.equal(routing.weights, torch.tensor([0.2, 0.3, 0.4, 0.6, 0.1, 0.5]))
