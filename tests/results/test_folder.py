"""Folders of pruned models: which files they hold, and what their config says of a plan."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from libprune.engine.family import families
from libprune.engine.heads import HEADS
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.results.folder import MODELING_FILE
from tests.support import tiny
from tests.support.models import FAMILIES, LAYOUTS, Dense, prune, random_plan, tokens, write_dense


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
    assert config["model_type"] == f"pruned_{dense.model.config.model_type}"
    assert config["pruned_heads"], "stops transformers 4"
    head = HEADS[dense.architecture.head].auto_class
    assert config["auto_map"] == {
        "AutoConfig": f"modeling_pruned.Pruned{type(dense.model.config).__name__}",
        "AutoModel": f"modeling_pruned.Pruned{type(dense.model.base_model).__name__}",
        head: f"modeling_pruned.{config['architectures'][0]}",
    }
    assert (tmp_path / "pruned" / MODELING_FILE).exists()


def test_tokenizer_and_chat_template_come_along_and_nothing_else(tmp_path):
    tiny.write_model(tmp_path / "dense")
    dense = write_dense(FAMILIES["llama"](0), tmp_path / "dense")
    (tmp_path / "dense/notes.txt").write_text("not of the model")
    (tmp_path / "pruned").mkdir()
    prune(dense, Plan.dense(dense.architecture), False, tmp_path / "pruned")
    names = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {path.name for path in (tmp_path / "pruned").iterdir()} == names - {"notes.txt"}
    for name in names - {"notes.txt", "config.json", "tokenizer_config.json", "model.safetensors"}:
        assert (tmp_path / "pruned" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes(), name
    said, given = (json.loads((tmp_path / of / "tokenizer_config.json").read_text()) for of in ("pruned", "dense"))
    assert said == given | {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize("kind", ["uniform", "per_layer"])
def test_the_tokenizer_loads_without_the_code_of_the_folder(dense, tmp_path, kind):
    """What transformers asks for on a terminal stands on no terminal here."""
    tiny.write_model(tmp_path)
    prune(dense, random_plan(dense.architecture, kind), kind == "per_layer", tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)("the old cat").input_ids == [2, 12, 4]


def test_a_folder_with_a_modeling_file_says_what_to_pass_where_it_is_opened_without(dense, tmp_path):
    config_of(dense, random_plan(dense.architecture, "per_layer"), True, tmp_path / "pruned")
    for reader in (type(dense.model.config), type(dense.model)):
        with pytest.raises(Exception, match=r"trust_remote_code=True") as caught:
            reader.from_pretrained(tmp_path / "pruned", local_files_only=True)
        assert type(caught.value).__name__ != "AmbiguousGlobalPerLayerAttributeError"
    with pytest.raises(ValueError, match=r"^The repository .* contains custom code(.|\n)*trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=False)
    read = AutoConfig.from_pretrained(tmp_path / "pruned", trust_remote_code=True)
    assert "trust_remote_code" not in json.dumps(read.to_dict(), default=str)


@pytest.mark.parametrize("kind", ["uniform", "per_layer"])
def test_the_config_names_the_stored_type_for_all_versions_and_no_path(dense, tmp_path, kind):
    config = config_of(dense, random_plan(dense.architecture, kind), kind == "per_layer", tmp_path / "pruned")
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert not {key for key in config if key.endswith("name_or_path")}
    assert str(dense.folder) not in json.dumps(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_result_can_be_pruned_again(tmp_path, family):
    """As prepare reads it: written anew by transformers, and wholly described."""
    dense = write_dense(FAMILIES[family](0), tmp_path / "dense")
    (tmp_path / "once").mkdir()
    once = prune(dense, random_plan(dense.architecture, "uniform"), False, tmp_path / "once")
    again = write_dense(once.model, tmp_path / "again")
    plan = random_plan(again.architecture, "uniform", seed=1)
    (tmp_path / "twice").mkdir()
    twice = prune(again, plan, False, tmp_path / "twice")
    with masked(again.model, again.architecture, plan), torch.no_grad():
        torch.testing.assert_close(twice.model(tokens()).logits, again.model(tokens()).logits)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("once", "twice"))
    widths = {key for key, several in families()[again.architecture.family].config.expressions.items() if several}
    for said in (first, second):
        (said.get("rope_parameters") or {}).pop("type", None)  # the older name of rope_type, which it read as well
    assert {k: v for k, v in first.items() if k not in widths} == {k: v for k, v in second.items() if k not in widths}
