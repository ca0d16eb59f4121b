"""The Hessian's diagonal: against brute-force backward passes, and against oracles of what it estimates."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from libprune.collection.accumulator import UNITS, Accumulator
from libprune.engine.architecture import Architecture, Map, Parameter, PartShape
from libprune.engine.axes import parse_expr
from libprune.engine.errors import LibpruneError, StatisticsError
from libprune.models.sequences import Sequences
from libprune.pipeline.artifacts import read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import load_params
from libprune.pipeline.sections import Compute, Hessian
from libprune.statistics.hessian import (
    _signs,
    collect_probes,
    hessian_columns,
    hessian_groups,
    measure_hessian,
    require_probes_possible,
)
from tests.support import measured, tiny
from tests.support.closure import run_without_torch
from tests.support.collected import (
    LENGTH,
    N_TOK,
    SEQUENCES,
    architecture,
    assert_all_close,
    assert_close,
    assert_untouched,
    everything,
    gradients,
    hessian,
    model,
    of_layers,
    poisoned_tokens,
)
from tests.support.models import FAMILIES, VOCAB, tokens

__all__ = ["architecture", "model"]


@pytest.fixture(scope="module")
def sums(model) -> Accumulator:
    return hessian(model)


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
    found, sample = of_layers(sums), of_layers(hessian(model, estimator="fisher_sample"))
    assert found.keys() == sample.keys() == squares.keys()
    for name, expected in squares.items():
        assert_close(found[name], N_TOK * expected / SEQUENCES)
        assert_close(sample[name], expected / SEQUENCES)


@pytest.mark.parametrize("size", [1, SEQUENCES])
def test_the_batch_size_changes_nothing(model, sums, size):
    assert_all_close(everything(hessian(model, size)), everything(sums))


def test_the_columns_are_sums_over_a_units_elements(model, architecture, sums):
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for layer, part in architecture.blocks():
        tensors = sums.finish(layer)
        fisher, trace = np.zeros(architecture.units(part)), np.zeros(architecture.units(part))
        for parameter, dim, units in architecture.carriers(layer, part):
            diagonal = tensors[parameter.name].double()
            terms = (0.5 * weights[parameter.name].double().square() * diagonal).movedim(dim, 0)
            for position, unit in enumerate(units):
                fisher[unit] += float(terms[position].sum())
                trace[unit] += float(diagonal.movedim(dim, 0)[position].sum())
        found = hessian_columns(architecture, tensors, weights, layer, part)
        np.testing.assert_allclose(found["fisher"], fisher, rtol=1e-6)
        np.testing.assert_allclose(found["hessian_trace"], trace, rtol=1e-6)


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
            head="causal_lm",
            head_macs=0,
        )


SAMPLES, SAMPLE_LENGTH, PROBES, BATCHES = 4000, 9, 800, 20


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


def exact_hessian(model: SoftmaxLinear, ids: Tensor) -> Tensor:
    """The whole Hessian of the mean loss by the weight, float64; ``[vocab * features, vocab * features]``."""
    x, p, _ = features_and_errors(model, ids)
    x, p = x.flatten(0, 1), p.flatten(0, 1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("tvw,tj,tk->vjwk", curvature, x, x).reshape(p.shape[1] * x.shape[1], -1) / len(x)


def test_fisher_hutchinson_and_the_exact_diagonal_agree_on_model_sampled_labels(softmax_linear):
    """Each within 4 of its standard errors, for all 15 weights.

    The Fisher's error is that of a mean over sequences of n_tok g_i^2 minus the sequence's exact
    diagonal. At these sizes it is about 2 %, so that without the factor n_tok (8 times less) or
    with squared batch means it would be far off. Hutchinson's variance for one probe is the sum of
    the squared off-diagonal elements of the row.
    """
    model, ids = softmax_linear
    fisher = of_layers(hessian(model, 500, ids, model.architecture()))["head.weight"].double()

    exact_of = exact_diagonals(model, ids)
    exact = exact_of.mean(0)
    n_tok = SAMPLE_LENGTH - 1
    x, _, errors = features_and_errors(model, ids)
    squares_of = n_tok * (torch.einsum("ntv,ntj->nvj", errors, x) / n_tok).square()
    torch.testing.assert_close(fisher, squares_of.mean(0), rtol=1e-4, atol=0)
    standard_error = (squares_of - exact_of).std(0) / SAMPLES**0.5
    assert float((standard_error / exact).max()) < 0.04
    assert ((fisher - exact).abs() < 4 * standard_error).all()

    architecture = model.architecture()
    sums = hessian(model, SAMPLES // BATCHES, ids, architecture, estimator="hutchinson", probes=PROBES // BATCHES)
    estimate = of_layers(sums)["head.weight"].double()
    whole = exact_hessian(model, ids)
    torch.testing.assert_close(whole.diagonal().view_as(exact), exact)
    probe_error = ((whole.square().sum(1) - whole.diagonal().square()) / PROBES).sqrt().view_as(exact)
    assert float((probe_error / exact).max()) < 0.1
    assert ((estimate - exact).abs() <= 4 * probe_error + 1e-6 * exact).all()

    weights = {"head.weight": model.head.weight.detach()}
    columns = hessian_columns(architecture, sums.finish(0), weights, 0, "head")
    per_unit = (0.5 * weights["head.weight"].double().square() * exact).sum(1).numpy()
    assert (np.abs(columns["hessian"] - per_unit) <= 4 * columns["hessian_se"] + 1e-6 * per_unit).all()
    assert 0 < (columns["hessian_se"] / per_unit).max() < 0.1


def test_probes_are_the_same_for_the_same_seed_and_batches_count_by_their_sequences(model):
    one, same, other = (of_layers(hessian(model, 2, estimator="hutchinson", seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(same[name], tensor) for name, tensor in one.items())
    assert any(not torch.allclose(other[name], tensor, equal_nan=True) for name, tensor in one.items())


def test_passes_of_one_batch_have_probes_of_their_own(model, architecture):
    """Sequences of several lengths make several passes, which the standard error takes for independent samples."""
    one = Sequences(tokens(1, LENGTH))
    sums = Accumulator(hessian_groups(architecture, N_TOK, Hessian(estimator="hutchinson")))
    collect_probes(model, architecture, [(0, 0, one), (0, 1, one)], sums, Hessian(estimator="hutchinson"))
    assert all((sums.finish(0)[f"{UNITS}{part}.standard_error"] > 0).any() for part in architecture.parts)


def test_probes_give_the_product_of_signs_and_hessian(model, architecture):
    """One batch, one probe: v * (H v) with the same signs, by differences of gradients in float64."""
    sums = of_layers(hessian(model, SEQUENCES, estimator="hutchinson"))
    twin, ids = copy.deepcopy(model).double(), tokens(SEQUENCES, LENGTH)
    parameters = map_parameters(twin, architecture)
    signs = {n: _signs(p.detach(), (0, 0, 0, i)) for i, (n, p) in enumerate(parameters_in_order(twin, parameters))}

    def gradient(step: float) -> dict[str, Tensor]:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter += step * signs[name]
        logits, targets = twin(input_ids=ids, use_cache=False).logits, ids[:, 1:].flatten()
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
        found = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter -= step * signs[name]
        return dict(zip(parameters, found, strict=True))

    plus, minus = gradient(1e-4), gradient(-1e-4)
    for name in parameters:
        assert_close(sums[name], signs[name] * (plus[name] - minus[name]) / 2e-4, rtol=1e-3)


def parameters_in_order(model: nn.Module, wanted: dict[str, nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if name in wanted]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"offload": "cpu"}, r"compute\.offload: cpu"),
        ({"offload": "disk"}, r"compute\.offload: disk"),
        ({"offload": "none", "gradient_checkpointing": True}, r"compute\.gradient_checkpointing: true"),
    ],
)
def test_probes_are_refused_where_the_graph_is_not_kept(setting, named):
    with pytest.raises(LibpruneError, match=f"hutchinson cannot be used with {named}; use fisher"):
        require_probes_possible(Compute(**setting), sharded=False)
    with pytest.raises(LibpruneError, match="LIBPRUNE_SHARD"):
        require_probes_possible(Compute(offload="none"), sharded=True)


def test_on_other_labels_the_fisher_is_not_the_hessian(softmax_linear):
    """The oracle's own control: labels that the model finds unlikely have far larger squared gradients."""
    model, ids = softmax_linear
    ids = ids.clone()
    ids[:, 1::2] = torch.softmax(model.head(model.embedding(ids[:, ::2])), -1).argmin(-1)[:, : ids[:, 1::2].shape[1]]
    fisher = of_layers(hessian(model, 500, ids, model.architecture()))["head.weight"].double()
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
    mean_gradients = of_layers(gradients(model))
    model = model.double()
    model.set_attn_implementation("eager")  # the fused kernels have no second derivative
    second, missed = [], {0.5: [], 1.0: []}
    for name in REMOVED:
        weights = model.get_parameter(name).detach()
        dense = loss_with(model, ids, name, weights)
        indices = weights.flatten().abs().argsort(descending=True)[:6].tolist()
        for index, curved in zip(indices, second_derivatives(model, ids, name, indices), strict=True):
            weight, gradient = weights.flatten()[index].item(), mean_gradients[name].flatten()[index].item()
            second.append(0.5 * weight**2 * curved)
            for share, errors in missed.items():
                less = weights.clone()
                less.view(-1)[index] *= 1 - share
                change = (loss_with(model, ids, name, less) - dense).item()
                errors.append(change - (-share * weight * gradient + share**2 * second[-1]))
    whole, half, curvature = (np.abs(values).sum() for values in (missed[1.0], missed[0.5], second))
    assert whole < 0.1 * curvature
    assert 6 < whole / half < 10


# What it leaves behind, and what is not finite


@pytest.mark.parametrize("estimator", ["fisher", "hutchinson"])
def test_nothing_stays_on_the_model(estimator):
    model = FAMILIES["llama"](0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hessian(model, estimator=estimator)
    assert_untouched(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("size", [1, 2, SEQUENCES])
@pytest.mark.parametrize("estimator", ["fisher", "hutchinson"])
def test_the_sequence_whose_values_are_not_finite_is_named(estimator, row, size):
    model = FAMILIES["llama_mha"](0)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB - 1] = torch.nan
    what = "the loss" if estimator == "hutchinson" else r"the input of model\.layers\.0\.self_attn\.o_proj"
    with pytest.raises(StatisticsError, match=rf"{what} is not finite for calibration sequence {row};"):
        hessian(model, size, poisoned_tokens(row), estimator=estimator)
    assert_untouched(model)


def test_without_an_estimator_nothing_is_collected_and_no_model_is_loaded(tmp_path):
    tiny.write_params(tmp_path / "params.yaml", "a model", "a text", hessian={"estimator": "none"})
    assert run_without_torch("hessian", tmp_path) == ["hessian.estimator is none: nothing collected"]
    assert [path.name for path in (tmp_path / "artifacts/hessian").iterdir()] == ["nothing.json"]


def test_a_program_gets_the_table_of_units_that_is_written(tmp_path):
    project = measured.write_project(FAMILIES["llama"](0), tmp_path)
    layout, settings = Layout(project / "artifacts"), load_params(project / "params.yaml")
    table = measure_hessian(layout, settings.compute, settings.hessian.model_copy(update={"estimator": "fisher"}))
    written, meta = read_table(layout.hessian / "units.parquet", "hessian")
    assert meta["sequences"] == measured.SEQUENCES
    assert table.keys() == written.keys()
    for name, values in written.items():
        np.testing.assert_array_equal(table[name], values)
