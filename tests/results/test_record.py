"""Records of pruned folders: how a model was made, which units it keeps, and how its files name tensors."""

import hashlib
import re

import numpy as np
import pytest

from libprune.engine.errors import ArtifactError
from libprune.models.folder import WeightFiles
from libprune.pipeline.layout import NOTE
from libprune.results.record import PLAN, Record, read_provenance, read_record, read_recovered, write_provenance
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
    first = f"{section}.{next(iter(made.pop(section)))}"
    write_provenance(tmp_path, made)
    with pytest.raises(ArtifactError, match=rf"says nothing of {re.escape(first)}; run `dvc repro slice`"):
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


def test_the_record_of_a_recovered_model_is_read_beside_that_of_its_pruned_model(tmp_path):
    write_provenance(tmp_path, PRUNED | {"recovery": {"step": 3}})
    made = read_recovered(tmp_path, PRUNED)
    assert made == read_provenance(tmp_path)
    assert read_record(tmp_path).recovery == {"step": 3}
    with pytest.raises(ArtifactError, match="belongs to repair 'none', but the current repair is 'bias'"):
        read_recovered(tmp_path, PRUNED | {"slice": {"repair": "bias"}})


def test_a_folder_with_a_note_in_the_place_of_a_model_is_none(tmp_path):
    (tmp_path / NOTE).write_text('{"method": "none"}')
    assert read_recovered(tmp_path, PRUNED) is None
    with pytest.raises(ArtifactError, match=r"holds no model: recover\.method is none"):
        read_record(tmp_path)


def test_a_pruned_model_was_not_trained(tmp_path):
    write_provenance(tmp_path, PRUNED)
    assert read_record(tmp_path).recovery is None
