"""The Hessian's diagonal: against brute-force backward passes, and against oracles of what it estimates."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from libprune.architecture import Architecture, Map, Parameter, PartShape
from libprune.axes import parse_expr
from libprune.describe import describe
from libprune.errors import StatisticsError
from libprune.gradients import collect_gradients
from libprune.hessian import SquaredGradients, collect_squared_gradients, hessian_columns
from tests.models import FAMILIES, VOCAB, tokens
from tests.test_gradients import LENGTH, MODELS, N_TOK, SEQUENCES, assert_close, assert_untouched, batches


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> PreTrainedModel:
    return MODELS[request.param](0)


@pytest.fixture(scope="module")
def architecture(model) -> Architecture:
    return describe(model)


@pytest.fixture(scope="module")
def sums(model, architecture) -> SquaredGradients:
    return collect_squared_gradients(model, architecture, batches(2))


def map_parameters(model: nn.Module, architecture: Architecture) -> dict[str, nn.Parameter]:
    """Weights and biases of all maps of the blocks, with gradients switched on."""
    modules = {entry.module: model.get_submodule(entry.module) for entry in architecture.maps}
    return {
        f"{path}.{name}": parameter.requires_grad_()
        for path, module in modules.items()
        for name, parameter in module.named_parameters()
    }


# Against one backward pass a sequence


def test_the_sums_are_the_squares_of_every_sequences_own_gradient(model, architecture, sums):
    parameters = map_parameters(model, architecture)
    squares = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    for sequence in tokens(SEQUENCES, LENGTH):
        loss = model(input_ids=sequence[None], labels=sequence[None], use_cache=False).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            squares[name] += gradient.double().square()
    assert sums.squares.keys() == squares.keys()
    assert sums.sequences == SEQUENCES
    for name, expected in squares.items():
        assert_close(sums.squares[name], expected)
        assert_close(sums.diagonal(name, N_TOK, "fisher"), N_TOK * expected / SEQUENCES)


@pytest.mark.parametrize("size", [1, SEQUENCES])
def test_the_batch_size_changes_nothing(model, architecture, sums, size):
    other = collect_squared_gradients(model, architecture, batches(size))
    for name, squares in sums.squares.items():
        assert_close(other.squares[name], squares)


def test_fisher_is_n_tok_times_fisher_sample(sums):
    for name in sums.squares:
        one, other = (sums.diagonal(name, N_TOK, estimator) for estimator in ("fisher", "fisher_sample"))
        torch.testing.assert_close(one, N_TOK * other, rtol=1e-6, atol=0)


def test_the_column_is_half_the_weighted_sum_over_a_units_elements(model, architecture, sums):
    weights = dict(model.named_parameters())
    for layer, part in architecture.blocks():
        expected = np.zeros(architecture.units(part))
        for parameter, dim, units in architecture.carriers(layer, part):
            weight, diagonal = weights[parameter.name].detach(), sums.diagonal(parameter.name, N_TOK, "fisher")
            terms = (0.5 * weight.double().square() * diagonal.double()).movedim(dim, 0)
            for position, unit in enumerate(units):
                expected[unit] += float(terms[position].sum())
        found = hessian_columns(sums, architecture, weights, N_TOK, "fisher", layer, part)["fisher"]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


# Oracle: where labels are drawn from the model, the Fisher is the Hessian


class SoftmaxLinear(PreTrainedModel):
    """Next token ~ softmax(W e(token)), fixed features e: the one map is `model -> unit`, a unit a logit."""

    def __init__(self, vocab: int, features: int, seed: int) -> None:
        super().__init__(PreTrainedConfig())
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding(vocab, features, _weight=torch.randn(vocab, features, generator=generator))
        self.head = nn.Linear(features, vocab, bias=False)
        with torch.no_grad():
            self.head.weight.normal_(std=0.7, generator=generator)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))

    def sample(self, sequences: int, length: int, seed: int) -> Tensor:
        """Sequences whose every token is drawn from the model's own distribution after the one before."""
        generator = torch.Generator().manual_seed(seed)
        table = torch.softmax(self.head(self.embedding.weight), -1).detach()
        ids = torch.randint(len(table), (sequences, 1), generator=generator)
        for _ in range(length - 1):
            following = torch.multinomial(table[ids[:, -1]], 1, generator=generator)
            ids = torch.cat([ids, following], 1)
        return ids

    def architecture(self) -> Architecture:
        vocab, features = self.head.weight.shape
        unit, model = parse_expr("unit"), parse_expr("model")
        return Architecture(
            family="softmax-linear",
            sizes={"unit": vocab, "model": features},
            layers=1,
            layers_path="",
            parts={"head": PartShape("unit", "head", ())},
            parameters=(Parameter("head.weight", (unit, model), 0, "head"),),
            maps=(Map("head", 0, "head", model, unit, transposed=False),),
            cache=unit,
        )


SAMPLES, SAMPLE_LENGTH, PROBES = 4000, 9, 400


@pytest.fixture(scope="module")
def softmax_linear() -> tuple[SoftmaxLinear, Tensor]:
    model = SoftmaxLinear(vocab=5, features=3, seed=0)
    return model, model.sample(SAMPLES, SAMPLE_LENGTH, seed=1)


def features_and_errors(model: SoftmaxLinear, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, p and p - onehot(y) at every counted token, float64."""
    x = model.embedding(ids[:, :-1]).detach().double()
    p = torch.softmax(x @ model.head.weight.detach().double().T, -1)
    return x, p, p - nn.functional.one_hot(ids[:, 1:], p.shape[-1])


def exact_diagonals(model: SoftmaxLinear, ids: Tensor) -> Tensor:
    """Each sequence's own diagonal of the Hessian, mean_t p_v (1 - p_v) x_j^2; ``[sequences, vocab, features]``."""
    x, p, _ = features_and_errors(model, ids)
    return torch.einsum("ntv,ntj->nvj", p * (1 - p), x.square()) / x.shape[1]


def hutchinson(model: SoftmaxLinear, ids: Tensor, probes: int) -> tuple[Tensor, Tensor]:
    """Mean of v * (H v) over Rademacher probes, H by double backward, and its standard error."""
    weight, features = (w.detach().double() for w in (model.head.weight, model.embedding.weight))
    pairs = torch.zeros(len(features), len(features), dtype=torch.float64)
    pairs.index_put_((ids[:, :-1].flatten(), ids[:, 1:].flatten()), torch.ones(()).double(), accumulate=True)
    weight.requires_grad_()
    loss = -(pairs / pairs.sum() * torch.log_softmax(features @ weight.T, -1)).sum()
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    generator = torch.Generator().manual_seed(2)
    products = []
    for _ in range(probes):
        v = torch.randint(2, weight.shape, generator=generator).double() * 2 - 1
        products.append(v * torch.autograd.grad(gradient, weight, v, retain_graph=True)[0])
    stacked = torch.stack(products)
    return stacked.mean(0), stacked.std(0) / probes**0.5


def test_fisher_hutchinson_and_the_exact_diagonal_agree_on_model_sampled_labels(softmax_linear):
    """Each within 4 of its standard errors, for all 15 weights.

    The Fisher's error is that of a mean over sequences of n_tok g_i^2 minus the sequence's exact
    diagonal; Hutchinson's that of a mean over probes. At these sizes the first is about 2 %, so
    that without the factor n_tok (8 times less) or with squared batch means it would be far off.
    """
    model, ids = softmax_linear
    n_tok = SAMPLE_LENGTH - 1
    sums = collect_squared_gradients(model, model.architecture(), batches(500, ids))
    fisher = sums.diagonal("head.weight", n_tok, "fisher").double()

    exact_of = exact_diagonals(model, ids)
    exact = exact_of.mean(0)
    x, _, errors = features_and_errors(model, ids)
    squares_of = n_tok * (torch.einsum("ntv,ntj->nvj", errors, x) / n_tok).square()
    torch.testing.assert_close(fisher, squares_of.mean(0), rtol=1e-4, atol=0)
    standard_error = (squares_of - exact_of).std(0) / SAMPLES**0.5
    assert float((standard_error / exact).max()) < 0.04
    assert ((fisher - exact).abs() < 4 * standard_error).all()

    estimate, probe_error = hutchinson(model, ids, PROBES)
    assert ((estimate - exact).abs() <= 4 * probe_error + 1e-6 * exact).all()
    assert ((fisher - estimate).abs() < 4 * (standard_error + probe_error)).all()


def test_on_other_labels_the_fisher_is_not_the_hessian(softmax_linear):
    """The oracle's own control: labels that the model finds unlikely have far larger squared gradients."""
    model, ids = softmax_linear
    ids = ids.clone()
    ids[:, 1::2] = torch.softmax(model.head(model.embedding(ids[:, ::2])), -1).argmin(-1)[:, : ids[:, 1::2].shape[1]]
    sums = collect_squared_gradients(model, model.architecture(), batches(500, ids))
    fisher = sums.diagonal("head.weight", SAMPLE_LENGTH - 1, "fisher").double()
    assert float((fisher / exact_diagonals(model, ids).mean(0)).max()) > 2


# Oracle: removing a single weight


REMOVED = [f"model.layers.2.{path}.weight" for path in ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")]


def loss_with(model: PreTrainedModel, ids: Tensor, name: str, parameter: Tensor) -> Tensor:
    """The loss, in the model's own precision, with another tensor in the place of one parameter."""
    logits = functional_call(model, {name: parameter}, (), {"input_ids": ids, "use_cache": False}).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def second_derivatives(model: PreTrainedModel, ids: Tensor, name: str, indices: list[int]) -> list[float]:
    """The exact diagonal of the Hessian at a few elements of a parameter."""
    parameter = model.get_parameter(name).detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_with(model, ids, name, parameter), parameter, create_graph=True)
    rows = [torch.autograd.grad(gradient.flatten()[i], parameter, retain_graph=True)[0] for i in indices]
    return [row.flatten()[i].item() for row, i in zip(rows, indices, strict=True)]


def test_zeroing_a_single_weight_changes_the_loss_as_gradient_and_hessian_say():
    """-W G + W^2 H / 2 with the library's G and the exact H, in float64, for the largest weights.

    What is left is of third order in the weight, so it is small against the second order, and
    eight times smaller when half the weight is taken away.
    """
    model, ids = FAMILIES["llama"](0), tokens(SEQUENCES, LENGTH)
    sums = collect_gradients(model, describe(model), batches(2))
    model = model.double()
    model.set_attn_implementation("eager")  # the fused kernels have no second derivative
    second, missed = [], {0.5: [], 1.0: []}
    for name in REMOVED:
        weights = model.get_parameter(name).detach()
        dense = loss_with(model, ids, name, weights)
        indices = weights.flatten().abs().argsort(descending=True)[:6].tolist()
        for index, hessian in zip(indices, second_derivatives(model, ids, name, indices), strict=True):
            weight, gradient = weights.flatten()[index].item(), sums.mean_gradient(name).flatten()[index].item()
            second.append(0.5 * weight**2 * hessian)
            for share, errors in missed.items():
                less = weights.clone()
                less.view(-1)[index] *= 1 - share
                change = (loss_with(model, ids, name, less) - dense).item()
                errors.append(change - (-share * weight * gradient + share**2 * second[-1]))
    whole, half, curvature = (np.abs(values).sum() for values in (missed[1.0], missed[0.5], second))
    assert whole < 0.1 * curvature
    assert 6 < whole / half < 10


# What it leaves behind, and what is not finite


def test_nothing_stays_on_the_model():
    model = FAMILIES["llama"](0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collect_squared_gradients(model, describe(model), batches(2))
    assert_untouched(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("size", [1, 2, SEQUENCES])
def test_the_module_and_sequence_whose_gradient_is_not_finite_are_named(row, size):
    model = FAMILIES["llama_mha"](0)
    ids = tokens(SEQUENCES, LENGTH).clamp(max=VOCAB - 2)
    ids[row, 3] = VOCAB - 1
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB - 1] = torch.nan
    message = (
        rf"the gradient at the output of model\.layers\.3\.mlp\.down_proj is not finite for calibration sequence {row};"
    )
    with pytest.raises(StatisticsError, match=message):
        collect_squared_gradients(model, describe(model), batches(size, ids))
    assert_untouched(model)
