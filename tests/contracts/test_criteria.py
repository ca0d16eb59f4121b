"""The contract that every criterion passes, on the tables that the collecting stages really write.

A criterion joins by its entry in `CRITERIA`; one with params of its own adds them to `VARIANTS`.
"""

import re
import shutil
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from libprune.engine.describe import describe
from libprune.engine.errors import ArtifactError, LibpruneError, StatisticsError
from libprune.engine.tables import Columns, unit_index
from libprune.models.folder import fingerprint
from libprune.pipeline.artifacts import read_architecture, read_table, write_architecture, write_units
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Score
from libprune.pipeline.shards import shard_path, write_shard
from libprune.scoring.criteria import CRITERIA, join_tables, score_units
from libprune.scoring.obs import obs_removal, stack_removal
from libprune.scoring.scaling import SCALINGS, scale
from libprune.scoring.score import score_layout
from libprune.statistics.activations import NORMS, activation_columns
from libprune.statistics.gradients import gradient_columns
from libprune.statistics.hessian import hessian_columns
from libprune.statistics.weights import weight_columns
from tests.support.collected import activations, gradients, hessian
from tests.support.models import FAMILIES, tiny_exposed, tokens
from tests.support.tables import block_rows

VARIANTS = {
    "magnitude": {"magnitude_norm": ("l1", "l2")},
    "wanda": {"wanda_norm": NORMS},
    "unit_fisher": {"fisher_over": ("sequence", "token")},
}
CASES = [
    pytest.param(Score(**{"criterion": name, key: value}), id=f"{name}-{value}")
    for name, criterion in CRITERIA.items()
    if criterion.only is None
    for key, values in VARIANTS.get(name, {"criterion": (name,)}).items()
    for value in values
]
INDEX = {"layer_idx", "group_type", "group_idx"}
STAGES = ("gradients", "hessian", "activations")

every_case = pytest.mark.parametrize("params", CASES)


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Layout:
    """A tiny model, and its per-unit tables and shards, as the stages write them."""
    return written("llama", Layout(tmp_path_factory.mktemp("artifacts")))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Layout:
    """The artifacts of a mixture of experts."""
    return written("qwen3_moe", Layout(tmp_path_factory.mktemp("mixture")))


def written(family: str, layout: Layout) -> Layout:
    model = tiny_exposed(family)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.save_pretrained(layout.model, save_original_format=False)
    origin = fingerprint(layout.model)
    architecture = describe(model, fingerprint=origin)
    write_architecture(layout, architecture)
    ids = tokens(4, 12)
    collected = {
        "gradients": (gradients(model, 4, ids), gradient_columns),
        "hessian": (hessian(model, 1, ids), hessian_columns),
        "activations": (activations(model, 4, ids), activation_columns),
    }
    write_units(layout.weights, architecture, partial(weight_columns, architecture, weights), {"model": origin})
    for stage, (sums, columns_of) in collected.items():
        meta = {"model": origin, "tokens": "these"}
        write_units(
            layout.root / stage / "units.parquet",
            architecture,
            lambda layer, part, s=sums, c=columns_of: c(architecture, s.finish(layer), weights, layer, part),
            meta,
        )
        for layer in range(architecture.layers):
            write_shard(layout.root / stage, layer, sums.finish(layer), meta)
    return layout


def table_of(layout: Layout, params: Score) -> Columns:
    return join_tables(layout, CRITERIA[params.criterion], params)[0]


def columns_read(table: Columns, params: Score) -> list[str]:
    """The columns without which the criterion does not run."""
    read = []
    for name in set(table) - INDEX - {"cost"}:
        try:
            score_units({key: values for key, values in table.items() if key != name}, params)
        except ArtifactError as error:
            assert repr(name) in str(error)
            read.append(name)
    return read


# The contract


@every_case
def test_there_is_one_finite_value_a_unit_and_the_same_again(layout, params):
    table = table_of(layout, params)
    before = {name: values.copy() for name, values in table.items()}
    scores, again = score_units(table, params), score_units(table, params)
    rows = unit_index(read_architecture(layout))
    for name in ("importance", "score", "cost"):
        assert len(scores[name]) == len(rows["group_idx"])
        assert np.isfinite(scores[name]).all()
    assert (scores["importance"] >= 0).all()
    for name, values in scores.items():
        np.testing.assert_array_equal(again[name], values)
    for name, values in rows.items():
        np.testing.assert_array_equal(scores[name], values)
    for name, values in before.items():
        np.testing.assert_array_equal(table[name], values)


@every_case
def test_the_components_add_up_to_the_importance_and_the_score_is_a_parameters_share(layout, params):
    scores = score_units(table_of(layout, params), params)
    components = [values for name, values in scores.items() if name not in INDEX | {"importance", "cost", "score"}]
    assert components
    np.testing.assert_allclose(np.sum(components, axis=0), scores["importance"], rtol=1e-12)
    np.testing.assert_allclose(scores["score"] * scores["cost"], scores["importance"], rtol=1e-12)


@every_case
def test_exactly_the_declared_stages_are_needed(layout, params, tmp_path):
    """Through the columns of their tables, or through their shards."""
    criterion = CRITERIA[params.criterion]
    assert set(criterion.stages) <= set(STAGES)
    alone = Layout(tmp_path)
    model = ["model"] if criterion.columns else []
    for path in ["architecture.json", "weights.parquet", *model, *criterion.stages]:
        source = layout.root / path
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / path)
    read = set(columns_read(table_of(alone, params), params))
    for stage in STAGES:
        columns = set(read_table(layout.root / stage / "units.parquet", stage)[0]) - INDEX
        needed = bool(columns & read) or shards_read(alone, stage, params)
        assert needed is (stage in criterion.stages), stage


def shards_read(layout: Layout, stage: str, params: Score) -> bool:
    """Whether the tables cannot be joined while the shards of a stage are away."""
    first = shard_path(layout.root / stage, 0)
    paths = list(first.parent.glob(first.name.replace("000", "*")))
    for path in paths:
        path.rename(path.with_suffix(".away"))
    try:
        table_of(layout, params)
    except ArtifactError as error:
        assert f"{stage}/{first.name} does not exist; run `dvc repro {stage}`" in str(error)
        return True
    finally:
        for path in paths:
            path.with_suffix(".away").rename(path)
    return False


@pytest.fixture(scope="module", params=[case for case in CASES if case.id != "random-random"])
def joined(request, layout) -> tuple[Columns, Score]:
    return table_of(layout, request.param), request.param


@given(seed=st.integers(0, 2**32 - 1))
def test_units_that_change_places_take_their_importance_along(joined, seed):
    table, params = joined
    moved = np.arange(len(table["cost"]))
    rng = np.random.default_rng(seed)
    for rows in block_rows(table):
        moved[rows] = rng.permutation(moved[rows])
    other = {name: values if name in INDEX else values[moved] for name, values in table.items()}
    expected = score_units(table, params)["importance"][moved]
    np.testing.assert_array_equal(score_units(other, params)["importance"], expected)


@every_case
@pytest.mark.parametrize("how", SCALINGS)
def test_a_scaled_importance_is_its_own_score(layout, params, how):
    table = table_of(layout, params)
    scores = score_units(table, params.model_copy(update={"scaling": how}))
    np.testing.assert_array_equal(scores["score"], scores["importance"])
    np.testing.assert_array_equal(scores["score"], scale(score_units(table, params)["importance"], table, how))


@every_case
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_unit_whose_importance_is_not_finite_is_named(layout, params, bad):
    table = {name: values.copy() for name, values in table_of(layout, params).items()}
    name = columns_read(table, params)[0] if params.criterion != "random" else "cost"
    table[name] = table[name].astype(float)
    table[name][[20, 31]] = bad
    where = f"layer {table['layer_idx'][20]}, {table['group_type'][20]} unit {table['group_idx'][20]}"
    message = re.escape(f"{params.criterion} is not finite for 2 unit(s), the first in {where}")
    with pytest.raises(StatisticsError, match=message):
        score_units(table, params)


def test_random_is_seeded_and_uniform_per_parameter(layout):
    table = table_of(layout, Score(criterion="random"))
    one, same, other = (score_units(table, Score(criterion="random", seed=seed))["score"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert ((one >= 0) & (one < 1)).all()


# Against a direct computation


@pytest.fixture(scope="module")
def consumer_inputs() -> dict[str, torch.Tensor]:
    """The inputs of the model's consumers over the text, ``[tokens, input]`` in float64."""
    model = FAMILIES["llama"](0)
    table, consumers = {}, ("self_attn.o_proj", "mlp.down_proj")
    for name, module in model.named_modules():
        if name.endswith(consumers):

            def keep(_, args, name=name):
                table[name] = args[0].detach().flatten(0, -2).double()

            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        model(input_ids=tokens(4, 12), use_cache=False)
    return table


def every_block(layout: Layout, params: Score, inputs: dict[str, torch.Tensor]):
    """The importances of each block, with the consumer, its weight, its inputs, and the unit of each input."""
    architecture = read_architecture(layout)
    scores, state = score_units(table_of(layout, params), params), FAMILIES["llama"](0).state_dict()
    for layer, part in architecture.blocks():
        (consumer,) = architecture.consumers(layer, part)
        rows = (scores["layer_idx"] == layer) & (scores["group_type"] == part)
        x, units = inputs[consumer.module], np.arange(architecture.units(part))
        owners = np.repeat(units, x.shape[1] // len(units))
        yield scores["importance"][rows], consumer, state[consumer.weight].double(), x, owners


def test_fluctuation_is_the_squared_weights_times_the_variance_of_their_inputs(layout, consumer_inputs):
    for found, _, weight, x, owners in every_block(layout, Score(criterion="fluctuation"), consumer_inputs):
        expected = np.zeros(len(found))
        for position, unit in enumerate(owners):
            column = x[:, position]
            expected[unit] += float(weight[:, position].square().sum() * (column - column.mean()).square().mean())
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("rounds", [1, 32])
@pytest.mark.parametrize("criterion", ["obs", "obs_share", "obs_fisher", "fisher_obs"])
def test_surgeon_criteria_are_those_of_the_consumers_weight_and_inputs(layout, consumer_inputs, criterion, rounds):
    params = Score(criterion=criterion, obs_rounds=rounds)
    fisher = score_units(table_of(layout, Score()), Score(criterion="unit_fisher"))
    for found, consumer, weight, x, owners in every_block(layout, params, consumer_inputs):
        factors = None
        if criterion == "obs_fisher":
            with safe_open(shard_path(layout.gradients, consumer.layer), framework="pt") as file:
                factors = file.get_tensor(f"{consumer.module}.output_gradient_square") / 2
        gram, count = x.T @ x / len(x), len(found)
        removal = obs_removal(weight, gram, owners, min(rounds, count), params.obs_damping, factors)
        rows = (fisher["layer_idx"] == consumer.layer) & (fisher["group_type"] == consumer.part)
        expected = {
            "obs": removal.error,
            "obs_share": removal.share,
            "obs_fisher": removal.error,
            "fisher_obs": removal.share * fisher["importance"][rows],
        }
        np.testing.assert_allclose(found, expected[criterion], rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "cooperative"])
def test_a_mixture_has_a_finite_value_for_each_expert(mixture, name):
    """Also an expert that no token of the text is routed to."""
    table, meta = score_layout(mixture, Score(experts=name, obs_rounds=2))
    rows = table["group_type"] == "experts"
    assert np.isfinite(table["importance"]).all()
    assert (table["importance"][rows] >= 0).all()
    assert meta["criterion"] == (
        name
        if name == "unit_fisher"
        else ", ".join(
            f"{part}: {name if part == 'experts' else 'unit_fisher'}" for part in ("attention", "mlp", "experts")
        )
    )


def test_criteria_about_experts_refuse_other_units_and_models_without_them(layout, mixture):
    for one in (layout, mixture):
        with pytest.raises(
            LibpruneError, match=r"the criterion reap is about experts, and the attention of this model"
        ):
            score_layout(one, Score(criterion="reap"))


def test_the_criterion_cooperative_refuses_a_mixture(mixture):
    with pytest.raises(LibpruneError, match="those of different experts are not"):
        score_layout(mixture, Score(experts="cooperative"))


def test_obs_of_an_expert_is_what_it_adds_and_of_a_channel_the_sum_over_experts():
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(40, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    weight = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    grams, share = torch.stack([one.T @ one / 40 for one in x]), torch.tensor([0.25, 0.75])
    whole = stack_removal(weight, grams, share, np.repeat([0, 1], 3), 1, 1e-9)
    added = [
        float(s) * float((one @ weight[:, k : k + 3].T).square().sum()) / 40
        for one, s, k in zip(x, share, (0, 3), strict=True)
    ]
    np.testing.assert_allclose(whole.error, added, rtol=1e-6)
    np.testing.assert_allclose(whole.share, 1.0)
    channels = stack_removal(weight, grams, share, np.tile([0, 1, 2], 2), 1, 1e-9)
    each = [
        obs_removal(weight[:, k : k + 3], g, np.arange(3), 1, 1e-9).error for g, k in zip(grams, (0, 3), strict=True)
    ]
    np.testing.assert_allclose(channels.error, 0.25 * each[0] + 0.75 * each[1], rtol=1e-6)


def test_an_expert_without_tokens_in_the_fit_costs_nothing():
    """It may have some among the sequences that are held out."""
    weight, grams = torch.ones(2, 4), torch.stack([torch.eye(2), torch.zeros(2, 2)])
    cost = stack_removal(weight, grams, torch.tensor([0.5, 0.01]), np.array([0, 1, 0, 1]), 1, 1e-9)
    np.testing.assert_allclose(cost.error, [1.0, 1.0], rtol=1e-6)


def test_the_params_offer_what_exists():
    offered = {name: set(get_args(field.annotation)) for name, field in Score.model_fields.items()}
    assert offered["scaling"] == {"none", *SCALINGS}
    assert offered["wanda_norm"] == set(NORMS)
    assert Score().criterion in CRITERIA
