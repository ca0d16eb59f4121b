"""Folders of pruned models: which files they hold, and what their config says of a plan."""

import json

import pytest

from libprune.engine.family import families
from libprune.engine.plan import Plan
from libprune.results.folder import MODELING_FILE
from tests.support import tiny
from tests.support.models import FAMILIES, LAYOUTS, Dense, prune, random_plan, write_dense


@pytest.fixture(scope="module", params=LAYOUTS)
def dense(request, tmp_path_factory) -> Dense:
    return write_dense(FAMILIES[request.param](0), tmp_path_factory.mktemp("dense"))


def config_of(dense: Dense, plan: Plan, custom: bool, folder) -> dict:
    """The config.json of a pruned model."""
    folder.mkdir()
    return json.loads((prune(dense, plan, custom, folder).folder / "config.json").read_text())


def expected_widths(dense: Dense, plan: Plan, layer: int) -> dict[str, int]:
    """The keys of the family's config that depend on units, for the units that a layer of the plan keeps."""
    architecture = dense.architecture
    kept = {shape.axis: max(1, plan.kept(layer, part)) for part, shape in architecture.parts.items()}
    expressions = {key: several[0] for key, several in families()[architecture.family].config.expressions.items()}
    sizes = architecture.sizes | kept
    return {key: expression.size(sizes) for key, expression in expressions.items() if expression.names & kept.keys()}


def test_a_uniform_result_has_no_code_and_the_widths_of_its_plan(dense, tmp_path):
    plan = random_plan(dense.architecture, "uniform")
    config = config_of(dense, plan, False, tmp_path / "pruned")
    widths = expected_widths(dense, plan, 0)
    assert {key: config[key] for key in widths} == widths
    assert not {"per_layer_config", "auto_map"} & config.keys()
    assert config["architectures"] == [type(dense.model).__name__]
    assert not (tmp_path / "pruned" / MODELING_FILE).exists()


def test_a_per_layer_result_says_the_widths_of_every_remaining_layer_and_which_parts_it_skips(dense, tmp_path):
    plan = random_plan(dense.architecture, "holes")
    config = config_of(dense, plan, True, tmp_path / "pruned")
    assert list(config["per_layer_config"]) == [str(index) for index in range(len(plan.layers))]
    for said, layer in zip(config["per_layer_config"].values(), plan.layers, strict=True):
        widths = expected_widths(dense, plan, layer)
        assert {key: said[key] for key in widths} == widths
        assert said.get("skip", []) == [part for part in dense.architecture.parts if plan.gone(layer, part)]
    assert config["architectures"] == [f"Pruned{type(dense.model).__name__}"]
    assert all(target.startswith("modeling_pruned.Pruned") for target in config["auto_map"].values())
    assert (tmp_path / "pruned" / MODELING_FILE).exists()


def test_tokenizer_and_chat_template_come_along_unchanged(tmp_path):
    tiny.write_model(tmp_path / "dense")
    dense = write_dense(FAMILIES["llama"](0), tmp_path / "dense")
    (tmp_path / "dense/notes.txt").write_text("not of the model")
    (tmp_path / "pruned").mkdir()
    prune(dense, Plan.dense(dense.architecture), False, tmp_path / "pruned")
    names = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {path.name for path in (tmp_path / "pruned").iterdir()} == names - {"notes.txt"}
    for name in names - {"notes.txt", "config.json", "model.safetensors"}:
        assert (tmp_path / "pruned" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes(), name
