"""Records of pruned folders: how a model was made, which units it keeps, and how its files name tensors."""

import hashlib
import json
import re

import numpy as np
import pytest

from libprune.engine.errors import ArtifactError
from libprune.models.folder import WeightFiles
from libprune.pipeline.layout import NOTE, Layout
from libprune.results.record import (
    PLAN,
    PROVENANCE,
    Record,
    copy_files,
    read_provenance,
    read_record,
    read_recovered,
    read_whole,
    write_provenance,
)
from tests.support.models import FAMILIES, random_plan, write_dense
from tests.support.models import prune as pruned_of
from tests.support.sliced import write_plan


@pytest.mark.parametrize("custom", [False, True])
def test_tensors_are_expected_by_the_names_that_checkpoints_of_the_family_have(tmp_path, custom):
    """What transformers calls `lm_head` in memory is `embed_out` in published GPT-NeoX checkpoints."""
    dense = write_dense(FAMILIES["gpt_neox"](0), tmp_path / "dense")
    (tmp_path / "pruned").mkdir()
    pruned = pruned_of(dense, random_plan(dense.architecture, "uniform"), custom, tmp_path / "pruned")
    record = Record(pruned.folder, {"plan": {"shape": "per_layer" if custom else "uniform"}})
    shapes = {name: list(parameter.shape) for name, parameter in pruned.model.named_parameters()}
    found = {name: list(tensor.shape) for name, tensor in WeightFiles(pruned.folder).items()}
    assert record.stored(shapes) == found
    assert ("embed_out.weight" in found) is not custom


def test_the_record_has_size_and_digest_of_every_file(tmp_path):
    for name, content in (("a.bin", b"\x00" * 5), ("b.txt", b"text")):
        (tmp_path / name).write_bytes(content)
    made = {"plan": {"shape": "uniform", "model": "m"}, "slice": {"repair": "none"}}
    write_provenance(tmp_path, made)
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in (("a.bin", b"\x00" * 5), ("b.txt", b"text"))
    }
    assert read_provenance(tmp_path) == made | {"files": files}
    assert read_record(tmp_path).provenance == made | {"files": files}


@pytest.mark.parametrize("section", ["plan", "slice"])
def test_a_record_that_lacks_what_is_needed_is_refused_by_the_key(tmp_path, section):
    made = {"plan": {"shape": "uniform", "model": "m"}, "slice": {"repair": "none"}}
    first = f"{section}.{min(made[section])}"
    del made[section][min(made[section])]
    write_provenance(tmp_path, made)
    with pytest.raises(
        ArtifactError, match=rf"libprune\.json: {re.escape(first)} is not as slice writes it .*; run `dvc repro slice`"
    ):
        read_record(tmp_path)


@pytest.mark.parametrize("kind", ["per_layer", "holes"])
def test_the_plan_of_a_folder_reads_back_and_its_remaining_layers_are_renumbered(tmp_path, kind):
    architecture = write_dense(FAMILIES["llama"](0), tmp_path / "dense").architecture
    plan = random_plan(architecture, kind)
    write_plan(tmp_path / PLAN, architecture, plan, "per_layer")
    record = Record(tmp_path, {"plan": {"shape": "per_layer", "model": architecture.fingerprint}})
    assert record.remote
    assert record.plan.digest == plan.digest
    assert record.left.layers == tuple(range(len(plan.layers)))
    for index, layer in enumerate(plan.layers):
        for part in architecture.parts:
            np.testing.assert_array_equal(record.left.keep[index, part], plan.keep[layer, part])


PRUNED = {"plan": {"shape": "uniform", "model": "m"}, "slice": {"repair": "none"}, "proof": {"logit_scale": 1.5}}
PRUNED |= {"tokens": "t"}


def test_the_record_of_a_recovered_model_is_read_beside_that_of_its_pruned_model(tmp_path):
    layout = Layout(tmp_path)
    layout.recovered.mkdir()
    recovery = {"params": {"method": "full"}, "text": "t", "tokens": 9, "step": 3}
    recovery |= {"held_out_before": 2.0, "held_out_after": 1.5}
    write_provenance(layout.recovered, PRUNED | {"recovery": recovery})
    made = read_recovered(layout, PRUNED)
    assert made == read_provenance(layout.recovered)
    assert read_record(layout.recovered).recovery == recovery
    with pytest.raises(ArtifactError, match="belongs to repair 'none', but the current repair is 'bias'"):
        read_recovered(layout, PRUNED | {"slice": {"repair": "bias"}})


def test_a_folder_with_a_note_in_the_place_of_a_model_is_none(tmp_path):
    layout = Layout(tmp_path)
    layout.recovered.mkdir()
    (layout.recovered / NOTE).write_text('{"method": "none"}')
    assert read_recovered(layout, PRUNED) is None
    with pytest.raises(ArtifactError, match=r"holds no model: recover\.method is none"):
        read_record(layout.recovered)


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/passwd", "a/../../outside.txt"])
def test_a_record_that_names_files_outside_of_its_folder_is_refused(tmp_path, name):
    write_provenance(tmp_path, PRUNED)
    (tmp_path / PROVENANCE).write_text(json.dumps(PRUNED | {"files": {name: {"bytes": 1, "sha256": "0"}}}))
    with pytest.raises(ArtifactError, match=r"records the file '.*', which does not lie in"):
        read_record(tmp_path)


def test_recorded_files_are_copied_and_no_others(tmp_path):
    folder, target = tmp_path / "pruned", tmp_path / "target"
    (folder / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    for name in ("config.json", "additional_chat_templates/tool.jinja", "model.safetensors"):
        (folder / name).write_text(name)
    write_provenance(folder, PRUNED)
    (folder / "token").write_text("hf_secret")
    (folder / "vocabulary.link").symlink_to("/etc/hostname")
    copy_files(read_record(folder), target, {"config.json"})
    assert [path.name for path in target.rglob("*") if path.is_file()] == ["tool.jinja"]


def test_a_changed_flipped_or_foreign_file_of_a_folder_is_refused_by_the_stages_that_go_on_with_it(tmp_path):
    layout = Layout(tmp_path / "artifacts")
    layout.pruned.mkdir(parents=True)
    (layout.pruned / "model.safetensors").write_bytes(bytes(100))
    write_provenance(layout.pruned, PRUNED)
    read_whole(layout.pruned, layout, {"model": "m"})
    with pytest.raises(ArtifactError, match="belongs to model 'm', but the current model is 'n'"):
        read_whole(layout.pruned, layout, {"model": "n"})
    (layout.pruned / "model.safetensors").write_bytes(bytes(99) + b"\1")
    with pytest.raises(ArtifactError, match=r"model\.safetensors has changed: .*; run `dvc repro slice`"):
        read_whole(layout.pruned, layout, {"model": "m"})


def test_a_pruned_model_was_not_trained(tmp_path):
    write_provenance(tmp_path, PRUNED)
    assert read_record(tmp_path).recovery is None
