"""Masks in memory, in folders and beside them: every layout reads alike, and faults are named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import prune
from torch.nn.utils import prune as torch_prune
from transformers import PreTrainedModel

from libprune import masks
from libprune.engine.errors import LibpruneError
from libprune.engine.plan import Plan
from libprune.masks.files import of_model, read_masked
from libprune.results.check import check_folder
from libprune.results.record import read_provenance, read_record
from tests.support.masked_models import plan_file, remasked, removed, run
from tests.support.models import FAMILIES, Dense, random_plan, write_dense

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Dense:
    return write_dense(FAMILIES["mistral"](0), tmp_path_factory.mktemp("dense") / "model")


def with_masks(dense: Dense, plan: Plan, folder: Path) -> list[object]:
    remasked(dense, plan).save_pretrained(folder / "masked")
    assert any(name.endswith("weight_mask") for name in load_file(folder / "masked" / WEIGHTS))
    return [folder / "masked"]


def with_zeros(dense: Dense, plan: Plan, folder: Path) -> list[object]:
    model = remasked(dense, plan)
    for name in {name.removesuffix("_mask") for name, _ in model.named_buffers() if name.endswith("_mask")}:
        module, _, parameter = name.rpartition(".")
        torch_prune.remove(model.get_submodule(module), parameter)
    model.save_pretrained(folder / "zeroed")
    return [folder / "zeroed"]


def beside(dense: Dense, plan: Plan, folder: Path) -> list[object]:
    file = folder / "masks.safetensors"
    done = run("export", plan_file(dense, plan, folder), file, "--model", dense.folder)
    assert done.exit_code == 0, done.output
    return [dense.folder, "--masks", file]


LAYOUTS: dict[str, Callable[[Dense, Plan, Path], list[object]]] = {"a": with_masks, "b": with_zeros, "c": beside}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_alike(dense, layout, tmp_path):
    plan = random_plan(dense.architecture, "uniform")
    given = LAYOUTS[layout](dense, plan, tmp_path)
    expected = of_model(remasked(dense, plan), language=True).model.state_dict()
    read = read_masked(*(given[i] for i in range(0, len(given), 2))).model.state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    seen = json.loads(run("inspect", *given, "--json").output)
    assert {(b["layer"], b["part"]): b["removable"] for b in seen["blocks"] if b["removable"]} == removed(plan)
    assert seen["shape"] == "uniform"
    left = sum(p.numel() for p in masks.extract(remasked(dense, plan)).smaller().parameters())
    assert seen["saved_parameters"] == dense.model.num_parameters() - left


@pytest.mark.parametrize(("layout", "kind"), [("b", "uniform"), ("c", "holes")])
def test_what_is_extracted_passes_its_checks(dense, layout, kind, tmp_path, quick_proof):
    plan = random_plan(dense.architecture, kind)
    given = LAYOUTS[layout](dense, plan, tmp_path)
    done = run("extract", given[0], tmp_path / "out", *given[1:])
    assert done.exit_code == 0, done.output
    assert removed(read_record(tmp_path / "out").plan) == removed(plan)
    zeroed = given[0] if layout == "b" else None
    findings = list(check_folder(tmp_path / "out", trust_remote_code=True, dense=zeroed))
    assert {f.kind for f in findings} == {"ok"}
    assert {f.about for f in findings} >= {"files", "config", "weights", "loads", "logits"}
    assert read_provenance(tmp_path / "out")["slice"]["repair"] == ("none" if layout == "b" else "masks")


# Faults


def write(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path)


NAME, OTHER = "model.layers.0.mlp.up_proj.weight", torch.ones(2, 2)


SHAPE = (13, 28)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such parameter": (write({"model.layers.0.mlp.up.weight_mask": OTHER}), f"did you mean '{NAME}'"),
    "another shape": (write({f"{NAME}_mask": OTHER}), f"{NAME}_mask has shape [2, 2], but {NAME} has [13, 28]"),
    "fractions": (write({f"{NAME}_mask": torch.full(SHAPE, 0.5)}), "holds values other than 0 and 1"),
    "another tensor": (write({NAME: OTHER}), f"holds {NAME}; only X_mask, and X_orig beside it"),
    "weights alone": (write({f"{NAME}_orig": OTHER}), f"holds {NAME}_orig; only X_mask, and X_orig beside it"),
    "other weights": (
        write({f"{NAME}_orig": OTHER, f"{NAME}_mask": torch.ones(2, 2)}),
        f"{NAME}_orig has shape [2, 2], but {NAME} has [13, 28]",
    ),
    "nothing": (write({}), "holds no mask"),
    "no safetensors": (lambda path: path.write_bytes(b"pickled"), "cannot be read as safetensors"),
    "no file": (lambda path: None, "cannot be read as safetensors"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_holds_no_masks_of_the_model_is_refused_by_name(dense, tmp_path, name):
    make, message = FILES[name]
    make(tmp_path / "masks.safetensors")
    done = run("inspect", dense.folder, "--masks", tmp_path / "masks.safetensors")
    assert done.exit_code == 1
    assert message in done.output


def edited(dense: Dense, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    copy = Path(shutil.copytree(dense.folder, folder / "copy"))
    tensors = load_file(copy / WEIGHTS)
    change(tensors)
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{NAME}_orig": t.pop(NAME)}), f"holds {NAME}_orig without {NAME}_mask"),
        (lambda t: t.update({f"{NAME}_mask": t[NAME].clone()}), f"holds {NAME}_mask without {NAME}_orig"),
        (lambda t: (t.clear(), t.update({f"{NAME}_mask": OTHER})), f"holds {NAME}_mask without {NAME}_orig"),
        (lambda t: t.pop(NAME), f"lack 1 tensors, the first {NAME}"),
        (lambda t: t.update({"extra": OTHER}), "hold, for no parameter, 1 tensors, the first extra"),
    ],
)
def test_a_folder_whose_tensors_are_not_the_models_is_refused_by_name(dense, tmp_path, change, message):
    done = run("inspect", edited(dense, tmp_path, change))
    assert done.exit_code == 1
    assert message in done.output


def test_a_tied_weight_cannot_be_masked_on_one_side(tmp_path):
    FAMILIES["llama"](0).save_pretrained(tmp_path / "model")
    save_file({"lm_head.weight_mask": torch.zeros(37, 30)}, tmp_path / "masks.safetensors")
    done = run("inspect", tmp_path / "model", "--masks", tmp_path / "masks.safetensors")
    assert done.exit_code == 1
    assert "masks lm_head.weight, which the model shares with another module" in done.output


def test_what_exists_is_not_replaced_and_what_is_no_model_is_refused(dense, tmp_path):
    done = run("extract", dense.folder, tmp_path)
    assert (done.exit_code, "exists; name a folder that does not" in done.output) == (1, True)
    assert "holds no config.json" in run("inspect", tmp_path).output
    copy = Path(shutil.copytree(dense.folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert "mamba" in run("inspect", copy).output
    (copy / "config.json").write_text(json.dumps(config | {"per_layer_config": {}}))
    assert "its layers differ in width already" in run("inspect", copy).output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.model.layers[0].mlp.up_proj.weight_mask.fill_(0.5), "mlp.up_proj.weight_mask holds values other"),
        (lambda m: m.model.layers[0].mlp.up_proj.weight_orig.data.fill_(torch.nan), "not finite"),
        (lambda m: prune.random_unstructured(m.lm_head, "weight", 0.5), "are one weight in this model"),
    ],
)
def test_masks_that_cannot_be_what_is_meant_are_named(change: Callable[[PreTrainedModel], object], message):
    model = FAMILIES["llama"](0)
    prune.random_structured(model.model.layers[0].mlp.up_proj, "weight", 0.5, dim=0)
    change(model)
    with pytest.raises(LibpruneError, match=message):
        masks.inspect(model)
