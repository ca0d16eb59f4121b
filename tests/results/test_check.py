"""libprune check: healthy folders pass; every fault has a line of what was found, where, and what was expected."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from libprune.cli.main import app
from libprune.collection.stream_axes import write_axes
from libprune.engine.surgery import slice_state
from libprune.models.folder import WeightFiles, fingerprint, load_model
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, read_plan
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Slice
from libprune.recovery.idle import write_no_model
from libprune.results.check import Finding, check_folder
from libprune.results.folder import MODELING_FILE, write_pruned
from libprune.results.prune import prune
from libprune.results.record import PLAN, PROVENANCE, read_provenance, write_provenance
from tests.support.models import FAMILIES, random_plan, write_dense
from tests.support.models import prune as prune_tiny
from tests.support.sealing import edit_json
from tests.support.sliced import write_plan, write_project, write_trained
from tests.support.widths import made_axes, width_of

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Layout:
    """The dense model, its description, and text."""
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def uniform(layout) -> Path:
    """What slice writes of a uniform plan, without a repair; proved by a process that begins from nothing."""
    architecture = read_architecture(layout)
    write_plan(layout.plan, architecture, random_plan(architecture, "uniform"), "uniform")
    layout.pruned.mkdir()
    prune(layout, layout.pruned, Compute(device="cpu", dtype="float32"), Slice(repair="none"))
    return layout.pruned


@pytest.fixture(scope="module")
def per_layer(layout, uniform, tmp_path_factory) -> Path:
    """A folder of a plan that removes a layer, an attention and an MLP, said to be repaired."""
    architecture, folder = read_architecture(layout), tmp_path_factory.mktemp("per_layer")
    plan = random_plan(architecture, "holes")
    state = slice_state(WeightFiles(layout.model), architecture, plan)
    write_pruned(folder, layout.model, architecture, plan, "per_layer", state)
    write_plan(folder / PLAN, architecture, plan, "per_layer")
    made = read_provenance(uniform)
    write_provenance(folder, made | {"plan": made["plan"] | {"shape": "per_layer"}, "slice": {"repair": "sequential"}})
    return folder


def kinds(findings: list[Finding]) -> dict[str, str]:
    return {finding.about: finding.kind for finding in findings}


def faults(folder: Path, **options: object) -> list[str]:
    return [finding.text for finding in check_folder(folder, **options) if finding.kind == "fault"]


GOOD = dict.fromkeys(("files", "config", "weights", "loads", "logits", "generates"), "ok")


def test_a_healthy_uniform_folder_passes_and_equals_the_masked_dense_model(layout, uniform, quick_proof):
    done = CliRunner().invoke(app, ["check", str(uniform), "--dense", str(layout.model)])
    assert done.exit_code == 0, done.output
    lines = [line.split(maxsplit=2) for line in done.output.splitlines()]
    assert {about: kind for kind, about, _ in lines} == GOOD | {"dense": "ok"}
    plan, _ = read_plan(layout, read_architecture(layout))
    assert f"4 layers of {plan.kept(0, 'attention')} attention units, {plan.kept(0, 'mlp')} mlp units" in done.output
    tensors = load_file(uniform / WEIGHTS)
    assert f"{sum(tensor.numel() for tensor in tensors.values()):,} parameters" in done.output


def test_a_healthy_folder_of_any_widths_passes_with_its_own_code(layout, per_layer, quick_proof):
    findings = list(check_folder(per_layer, trust_remote_code=True, dense=layout.model))
    assert kinds(findings) == GOOD | {"dense": "note"}
    assert "changed weights" in findings[-1].text


def test_a_mixture_is_checked_by_the_units_that_it_was_cut_in(uniform, tmp_path, quick_proof):
    dense = write_dense(FAMILIES["deepseek_v3"](0), tmp_path / "dense", "channels")
    architecture, folder = replace(dense.architecture, fingerprint=fingerprint(dense.folder)), tmp_path / "pruned"
    folder.mkdir()
    plan = random_plan(architecture, "uniform")
    write_plan(folder / PLAN, architecture, plan, "uniform")
    prune_tiny(dense, plan, False, folder)
    made = read_provenance(uniform)
    made |= {"plan": made["plan"] | {"model": architecture.fingerprint}, "slice": {"repair": "none"}}
    write_provenance(folder, made | {"experts": "channels"})
    assert kinds(list(check_folder(folder, dense=dense.folder))) == GOOD | {"dense": "ok"}
    (folder / PROVENANCE).unlink()
    write_provenance(folder, made | {"experts": "whole"})
    assert "keeps asks for" in faults(folder)[0]


def test_the_code_of_a_folder_runs_only_when_it_is_trusted(per_layer, tmp_path):
    folder, ran = copy(per_layer, tmp_path), tmp_path / "ran"
    code = folder / MODELING_FILE
    code.write_text(code.read_text() + f"\nopen({str(ran)!r}, 'w')\n")
    forget_digests(folder)
    done = CliRunner().invoke(app, ["check", str(folder)])
    assert done.exit_code == 0, "it is not tried, and not at fault"
    assert "note   loads      not tried: " in done.output
    assert f"the code in {code} must run; read it, then pass --trust-remote-code" in done.output
    assert not ran.exists()


RESULTS: dict[str, tuple[dict[str, torch.Tensor], str, str]] = {
    "a logit that is not finite": ({"logits": torch.full((2, 32, 19), torch.nan)}, "logits", "computes 1,216 of 1,216"),
    "a cache that forgets": ({"cached": torch.zeros(2, 32, 19)}, "logits", "differ by 1 of 1, expected at most 0.0001"),
    "a cache that breaks": ({"cached": torch.full((2, 32, 19), torch.nan)}, "logits", "differ by nan of 1"),
    "weights that are left out": ({"parameters": torch.tensor(5)}, "loads", "loads 5 parameters, expected"),
    "silence": ({"generated": torch.zeros(1, 0)}, "generates", "0 tokens"),
}
"""What a folder computes in place of ones, about what that is a fault, and its text; no folder can be made to do it."""


def test_the_text_of_the_model_card_may_be_changed(uniform, tmp_path, quick_proof):
    folder = copy(uniform, tmp_path)
    (folder / "README.md").write_text("mine")
    assert kinds(list(check_folder(folder))) == GOOD
    (folder / "README.md").unlink()
    assert kinds(list(check_folder(folder))) == GOOD


@pytest.mark.parametrize("name", RESULTS)
def test_a_model_that_computes_nonsense_is_a_fault_and_so_is_the_wrong_dense_model(uniform, layout, monkeypatch, name):
    computed, about, text = RESULTS[name]
    ones = {"logits": torch.ones(2, 32, 19), "cached": torch.ones(2, 32, 19), "generated": torch.ones(1, 4)}
    count = sum(tensor.numel() for tensor in load_file(uniform / WEIGHTS).values())
    monkeypatch.setattr(
        "libprune.results.check.reload", lambda *args: ones | {"parameters": torch.tensor(count)} | computed
    )
    findings = list(check_folder(uniform, dense=uniform))
    assert kinds(findings) == GOOD | {about: "fault", "dense": "fault"}
    assert text in next(finding.text for finding in findings if finding.about == about)
    assert read_architecture(layout).fingerprint in findings[-1].text


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


def forget_digests(folder: Path) -> None:
    """Make it a folder of an older version."""
    edit_json(folder / PROVENANCE, lambda data: data.pop("files"))


def edit_bytes(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def edit_state(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated weights": (
        "uniform",
        lambda folder: edit_bytes(folder / WEIGHTS, lambda data: data[:-7]),
        r"model\.safetensors has [\d,]+ bytes, libprune\.json records [\d,]+",
    ),
    "a changed weight": (
        "uniform",
        lambda folder: edit_bytes(folder / WEIGHTS, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        r"model\.safetensors has changed: sha256 \w+…, libprune\.json records \w+…",
    ),
    "a wrong width": (
        "uniform",
        lambda folder: edit_json(folder / "config.json", lambda data: data.update(intermediate_size=77)),
        r"config\.json says intermediate_size = 77, what plan\.parquet keeps asks for \d+$",
    ),
    "a wrong width of a layer": (
        "per_layer",
        lambda folder: edit_json(
            folder / "config.json", lambda data: data["per_layer_config"]["1"].update(intermediate_size=77)
        ),
        r"config\.json says per_layer_config\.1\.intermediate_size = 77, what plan\.parquet keeps asks for \d+$",
    ),
    "a layer too many": (
        "per_layer",
        lambda folder: edit_json(folder / "config.json", lambda data: data.update(num_hidden_layers=4)),
        r"config\.json says num_hidden_layers = 4, but plan\.parquet leaves 3 layers",
    ),
    "a width that no model has": (
        "uniform",
        lambda folder: edit_json(folder / "config.json", lambda data: data.update(num_attention_heads="many")),
        r"config\.json",
    ),
    "another residual width": (
        "uniform",
        lambda folder: edit_json(folder / "config.json", lambda data: data.update(hidden_size=52)),
        r"model\.safetensors: model\.embed_tokens\.weight is \[19, 48\], expected \[19, 52\]",
    ),
    "a config that is not JSON": (
        "uniform",
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json cannot be read",
    ),
    "a missing modeling file": (
        "per_layer",
        lambda folder: (folder / MODELING_FILE).unlink(),
        r"modeling_pruned\.py does not exist; libprune\.json records it",
    ),
    "a missing plan": ("uniform", lambda folder: (folder / PLAN).unlink(), r"plan\.parquet does not exist"),
    "a record of another model": (
        "uniform",
        lambda folder: edit_json(folder / PROVENANCE, lambda data: data["plan"].update(model="other")),
        r"plan\.parquet is of the model \w+, libprune\.json says other",
    ),
    "no record": (
        "uniform",
        lambda folder: (folder / PROVENANCE).unlink(),
        r"libprune\.json does not exist: this is no folder that the slice stage has written",
    ),
    "a missing tensor": (
        "uniform",
        lambda folder: edit_state(folder / WEIGHTS, lambda state: state.pop("model.norm.weight")),
        r"lack 1 of \d+ tensors, the first model\.norm\.weight",
    ),
    "a tensor that nothing asks for": (
        "per_layer",
        lambda folder: edit_state(folder / WEIGHTS, lambda state: state.update(stray=torch.zeros(3))),
        r"model\.safetensors: stray is \[3\], expected no such tensor",
    ),
}


OLDER = [name for name in DAMAGES if name != "a changed weight"]
"""What shows without digests, which older versions did not record."""


@pytest.mark.parametrize(("name", "older"), [(name, False) for name in DAMAGES] + [(name, True) for name in OLDER])
def test_every_damage_is_a_fault_that_names_the_file_and_nothing_is_run(request, tmp_path, monkeypatch, name, older):
    kind, damage, message = DAMAGES[name]
    monkeypatch.setattr("libprune.results.check.reload", lambda *args: pytest.fail("the model was run"))
    folder = copy(request.getfixturevalue(kind), tmp_path)
    damage(folder)
    if older and (folder / PROVENANCE).exists():
        forget_digests(folder)
        message = message.replace(r" has [\d,]+ bytes, libprune\.json records [\d,]+", " cannot be read")
        message = message.replace("; libprune\\.json records it", "")
    found = faults(folder, trust_remote_code=True)
    assert any(re.search(message, text) for text in found), found
    assert all("\n" not in text for text in found)


def test_a_folder_that_slice_did_not_write_is_refused_on_the_command_line(layout):
    done = CliRunner().invoke(app, ["check", str(layout.model)])
    assert done.exit_code == 1
    assert done.output.count("\n") == 1
    assert str(layout.model / PROVENANCE) in done.output


# Recovered models


@pytest.mark.parametrize(
    ("kind", "changers"), [("uniform", "training"), ("per_layer", "slice.repair: sequential and ")]
)
def test_a_recovered_folder_passes_and_says_what_it_was_trained_on(
    request, layout, tmp_path, quick_proof, kind, changers
):
    pruned, folder = request.getfixturevalue(kind), tmp_path / "recovered"
    write_trained(pruned, folder)
    findings = list(check_folder(folder, trust_remote_code=True, dense=layout.model))
    assert kinds(findings) == GOOD | {"recovery": "note", "dense": "note"}
    said = {finding.about: finding.text for finding in findings}
    assert "trained (full) on 40,960 tokens of another text" in said["recovery"]
    assert "step 40, held-out loss 0.5000 before, 0.4000 after" in said["recovery"]
    assert f"{changers}" in said["dense"]
    assert "training (recover.method: full) changed weights" in said["dense"]
    assert str(folder) in said["dense"]


def test_weights_along_other_axes_are_not_compared_with_the_dense_model(tmp_path, quick_proof):
    layout = write_project(tmp_path)
    architecture = read_architecture(layout)
    plan = replace(random_plan(architecture, "uniform"), width=width_of(architecture))
    write_plan(layout.plan, architecture, plan, "uniform")
    origin = {
        "model": architecture.fingerprint,
        "tokens": read_tokens(layout.calibration_tokens, architecture.fingerprint)[1]["tokens"],
    }
    axes = made_axes(load_model(layout.model, torch.float32), architecture, "selected")
    for folder in (layout.width_axes, layout.pruned):
        folder.mkdir()
    write_axes(layout.width_axes, axes, origin)
    prune(layout, layout.pruned, Compute(device="cpu", dtype="float32"), Slice(repair="none"))
    findings = list(check_folder(layout.pruned, dense=layout.model))
    assert kinds(findings) == GOOD | {"dense": "note"}
    assert f"allocate.width: {plan.width} changed weights" in findings[-1].text


def test_where_no_step_was_kept_the_weights_are_compared_with_the_dense_model(layout, uniform, tmp_path, quick_proof):
    folder = copy(uniform, tmp_path)
    write_trained(uniform, tmp_path / "recovered")
    recovery = read_provenance(tmp_path / "recovered")["recovery"] | {"step": 0}
    edit_json(folder / PROVENANCE, lambda data: data.update(recovery=recovery))
    assert kinds(list(check_folder(folder, dense=layout.model))) == GOOD | {"recovery": "note", "dense": "ok"}


def test_a_folder_where_nothing_was_recovered_holds_no_model_and_says_so(tmp_path):
    layout = Layout(tmp_path)
    write_no_model(layout)
    done = CliRunner().invoke(app, ["check", str(layout.recovered)])
    assert done.exit_code == 1
    assert done.output.count("\n") == 1
    assert f"{layout.recovered} holds no model: recover.method is none" in done.output
    assert str(layout.pruned) in done.output
