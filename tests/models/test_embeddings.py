"""Embeddings, their distances, and losses whose gradients and second derivatives are those of the distance."""

from itertools import product

import pytest
import torch
from torch.nn.functional import cosine_similarity

from libprune.models import embeddings
from libprune.models.embeddings import distances, embed, own_distances, pooled, projected_losses
from libprune.models.sequences import Sequences
from tests.support.models import EMBEDDINGS, FAMILIES, tokens


class Linear(torch.nn.Module):
    """Hidden states that depend linearly on three masks, so that the Jacobian of the embedding is easy to have."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.masks = torch.nn.Parameter(torch.ones(3))
        self.states = torch.randn(3, 1, 5, 4, generator=generator)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> tuple[torch.Tensor]:
        return ((self.masks[:, None, None, None] * self.states).sum(0),)


TEXT = Sequences(torch.tensor([[1, 2, 3, 4, 5]]), pooling="mean")


def jacobian() -> torch.Tensor:
    """Of the embedding, ``[width, masks]``."""
    states = Linear().states
    of_masks = lambda masks: pooled((masks[:, None, None, None] * states).sum(0), "mean")[0]  # noqa: E731
    return torch.autograd.functional.jacobian(of_masks, torch.ones(3))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_is_the_pooled_last_state_of_length_1(name, pooling):
    model, sequences = FAMILIES[name](0), Sequences(tokens(3, 9), pooling=pooling)
    with torch.no_grad():
        states = model(sequences.ids).last_hidden_state
        found = embed(model, sequences)
    expected = states.mean(1) if pooling == "mean" else states[:, 0]
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True))


def test_the_distance_is_one_minus_the_cosine():
    first, second = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(1))
    found = distances(*(torch.nn.functional.normalize(one, dim=-1) for one in (first, second)))
    torch.testing.assert_close(found, 1 - cosine_similarity(first, second, dim=-1))


def test_squared_gradients_are_unbiased_for_the_second_derivative_of_the_distance(monkeypatch):
    """The mean over all vectors of signs, without a draw."""
    squares, gradients = [], []
    for signs in product((-1, 1), repeat=4):
        monkeypatch.setattr(embeddings, "_signs", lambda ids, width, signs=signs: torch.tensor(signs))
        model = Linear()
        losses = projected_losses(model, TEXT)
        assert losses.tolist() == [0]
        (gradient,) = torch.autograd.grad(losses.sum(), model.masks)
        gradients.append(gradient)
        squares.append(gradient.square())
    torch.testing.assert_close(torch.stack(gradients).mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.stack(squares).mean(0), jacobian().square().sum(0))


def test_the_distance_has_no_gradient_at_the_dense_model_but_the_curvature_of_the_jacobian():
    model = Linear()
    losses = own_distances(model, TEXT)
    (gradient,) = torch.autograd.grad(losses.sum(), model.masks, create_graph=True)
    assert losses.tolist() == [0]
    assert not gradient.any()
    rows = [torch.autograd.grad(gradient[i], model.masks, retain_graph=True)[0] for i in range(3)]
    torch.testing.assert_close(torch.stack(rows), jacobian().T @ jacobian())


def test_half_the_square_is_what_a_small_change_of_a_mask_costs():
    step, model = 1e-2, Linear()
    model.masks.data[1] -= step
    with torch.no_grad():
        found = float(distances(embed(model, TEXT), embed(Linear(), TEXT)))
    assert found == pytest.approx(0.5 * step**2 * float(jacobian()[:, 1].square().sum()), rel=0.05)


def test_signs_belong_to_a_text_in_any_batch():
    model, ids = FAMILIES["bert_embedding"](0), tokens(4, 9)
    states = [module for name, module in model.named_parameters() if name.endswith("1.output.dense.weight")]

    def gradient(rows: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(projected_losses(model, Sequences(rows, pooling="mean")).sum(), states)[0]

    torch.testing.assert_close(gradient(ids), sum(gradient(ids[[i]]) for i in (3, 1, 0, 2)), rtol=1e-4, atol=1e-6)
    first, second = (embeddings._signs(row, 200) for row in ids[:2])
    assert set(first.tolist()) == {-1, 1}
    assert not torch.equal(first, second)
