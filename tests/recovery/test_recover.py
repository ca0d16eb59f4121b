import shutil
from pathlib import Path

import pytest
import torch

from libprune.collection import offload
from libprune.engine.errors import ArtifactError, LibpruneError
from libprune.models.folder import WeightFiles, load_model
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute
from libprune.recovery import recover
from libprune.recovery.curve import Recovery
from libprune.recovery.memory import CHECKPOINTS, checkpoint_bytes
from libprune.recovery.recover import recover_layout
from libprune.results.check import check_folder
from libprune.results.record import read_provenance
from tests.support.models import FAMILIES, tokens
from tests.support.processes import together
from tests.support.recovering import CPU, short, write_pruned_layout
from tests.support.tiny import write_tokenizer

SHAPES = [
    ("llama", "uniform"),  # tied
    ("llama", "holes"),
    ("phi3", "uniform"),  # stored under other names than the parameters have
    ("gpt_neox", "uniform"),
    ("opt", "shallow"),
    ("bert", "uniform"),
    ("bert_classifier", "uniform"),
]


def recovered(layout: Layout, compute: Compute = CPU, **changes) -> Recovery:
    recovery = recover_layout(layout, compute, short(**changes))
    assert recovery is not None
    return recovery


def faults(layout: Layout) -> list[str]:
    found = check_folder(layout.recovered, trust_remote_code=True)
    return [finding.text for finding in found if finding.kind == "fault"]


@pytest.mark.parametrize("shape", SHAPES, ids="-".join)
def test_a_recovered_folder_is_a_pruned_folder_with_better_weights(tmp_path, quick_proof, shape):
    layout = write_pruned_layout(tmp_path / "artifacts", *shape)
    one = recovered(layout, learning_rate=1e-4 if shape[0] == "bert_classifier" else 1e-3)
    assert one.after < one.before
    assert faults(layout) == []
    assert {path.name for path in layout.recovered.iterdir()} == {path.name for path in layout.pruned.iterdir()}
    own, other = WeightFiles(layout.pruned), WeightFiles(layout.recovered)
    assert {name: own[name].shape for name in own} == {name: other[name].shape for name in other}
    assert any(not torch.equal(own[name], other[name]) for name in own)
    made, before = read_provenance(layout.recovered), read_provenance(layout.pruned)
    proof = made["recovery"].pop("proof")
    assert proof["logit_difference"] <= 1e-4 * proof["logit_scale"]
    assert made["recovery"] == one.as_json()
    assert {key: made[key] for key in before if key != "files"} == {
        key: before[key] for key in before if key != "files"
    }
    assert list((tmp_path / ".work" / "recover").iterdir()) == []


def test_matrices_of_lora_are_added_to_the_weights(tmp_path, quick_proof):
    layout = write_pruned_layout(tmp_path / "artifacts", "llama", "uniform")
    one = recovered(layout, method="lora", learning_rate=1e-2)
    assert one.after < one.before
    assert one.trained_parameters > 0
    assert faults(layout) == []
    dense = WeightFiles(layout.recovered)
    assert not [name for name in dense if "lora" in name]


def test_weights_that_no_step_improved_stay_as_they_were(tmp_path, quick_proof):
    layout = write_pruned_layout(tmp_path / "artifacts", "llama", "uniform")
    one = recovered(layout, learning_rate=1.0, clip=0.0, patience=1)
    assert (one.step, one.after) == (0, one.before)
    own, other = WeightFiles(layout.pruned), WeightFiles(layout.recovered)
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_the_dense_model_is_read_from_disk_where_the_training_leaves_it_too_little_memory(
    tmp_path, quick_proof, monkeypatch, capsys
):
    """Alone it takes less than half of what is free; the gradients and optimizer states beside it take the rest."""
    layouts = [write_pruned_layout(tmp_path / name / "artifacts", "llama", "uniform") for name in ("room", "narrow")]
    dense = 4 * read_architecture(layouts[0]).total_parameters
    asked, said = CPU.model_copy(update={"batch_tokens": 8}), []
    for layout, free in zip(layouts, (40 * dense, 4 * dense), strict=True):
        monkeypatch.setattr(offload, "free_memory", lambda free=free: free)
        recovered(layout, asked)
        said.append(capsys.readouterr().out)
    assert "compute.offload: auto is none: " in said[0]
    assert "optimizer states and the model to learn from" in said[0]
    assert "compute.offload: auto is disk: " in said[1]
    assert "optimizer states, without activations" in said[1]
    one, other = (WeightFiles(layout.recovered) for layout in layouts)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_recovered_folder_can_be_pruned_again(tmp_path, quick_proof):
    from libprune.pipeline.sections import Prepare
    from libprune.statistics.dense import prepare_layout

    layout = write_pruned_layout(tmp_path / "artifacts", "llama", "uniform", write_tokenizer)
    recovered(layout)
    again = Layout(tmp_path / "again")
    prepare_layout(again, Prepare(model=str(layout.recovered)))
    first, second = read_architecture(layout), read_architecture(again)
    assert second.family == first.family
    assert second.decoder_parameters < first.decoder_parameters
    with torch.no_grad():
        logits = [load_model(folder, torch.float32)(tokens()).logits for folder in (layout.recovered, again.model)]
    assert torch.equal(*logits)


def test_cross_entropy_alone_loads_no_model_to_learn_from(tmp_path, quick_proof, monkeypatch, capsys):
    layout = write_pruned_layout(tmp_path / "artifacts", "llama", "uniform")
    monkeypatch.setattr(recover, "load_teacher", None)
    one = recovered(layout, cross_entropy=1.0)
    assert one.after < one.before
    assert "the model to learn from" not in capsys.readouterr().err


def test_an_interrupted_recovery_goes_on_to_the_same_folder(tmp_path, quick_proof, monkeypatch):
    layouts = [write_pruned_layout(tmp_path / name / "artifacts", "llama", "uniform") for name in ("whole", "stopped")]
    recovered(layouts[0])

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recover, "write_weights", interrupt)
        with pytest.raises(KeyboardInterrupt):
            recovered(layouts[1])
    assert not layouts[1].recovered.exists()
    size = checkpoint_bytes(sum(one.numel() for one in WeightFiles(layouts[0].recovered).values()), short())
    room = shutil._ntuple_diskusage(0, 0, (CHECKPOINTS * size) // 2)  # the checkpoints that are there take the rest
    with monkeypatch.context() as patch:
        patch.setattr("libprune.models.memory.shutil.disk_usage", lambda _: room)
        recovered(layouts[1])
        with pytest.raises(LibpruneError, match=r"recover needs .* are free; free some, or train less"):
            recovered(layouts[1], tokens=1024)
    one, other = (WeightFiles(layout.recovered) for layout in layouts)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_params_neither_go_on_from_a_checkpoint_that_is_not_theirs_nor_remove_it(
    tmp_path, quick_proof, monkeypatch, capsys
):
    layout, work = write_pruned_layout(tmp_path / "artifacts", "llama", "uniform"), tmp_path / ".work" / "recover"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recover, "write_weights", interrupt)
        with pytest.raises(KeyboardInterrupt):
            recovered(layout)
        (first,) = work.iterdir()
        with pytest.raises(KeyboardInterrupt):
            recovered(layout, learning_rate=2e-3)
    left = files(first)
    assert any("checkpoint-16" in str(path) for path in left)
    (second,) = set(work.iterdir()) - {first}
    shutil.copytree(second, work / f".discarded-{second.name}")
    capsys.readouterr()
    recovered(layout, learning_rate=2e-3)
    said = capsys.readouterr().out
    assert f"of unfinished work with other settings is in {work}" in said
    assert "16 of 16 steps are done" in said
    assert list(work.iterdir()) == [first]
    assert files(first) == left


def test_checkpoints_stay_until_the_figures_are_written(tmp_path, quick_proof, monkeypatch):
    layout, work = write_pruned_layout(tmp_path / "artifacts", "llama", "uniform"), tmp_path / ".work" / "recover"
    metrics = tmp_path / "metrics"
    metrics.mkdir()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recover, "write_figures", interrupt)
        with pytest.raises(KeyboardInterrupt):
            recover_layout(layout, CPU, short(), metrics)
    assert list(work.glob("*/checkpoint-*"))
    assert recover_layout(layout, CPU, short(), metrics) is not None
    assert {path.name for path in metrics.iterdir()} == {"recovery.json", "learning_curve.csv"}
    assert list(work.iterdir()) == []


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layers_are_computed_again_to_the_same_result(tmp_path, quick_proof):
    layout = write_pruned_layout(tmp_path / "artifacts", "llama", "uniform")
    usual = recovered(layout)
    again = recovered(layout, CPU.model_copy(update={"gradient_checkpointing": True}))
    assert again.after == pytest.approx(usual.after, rel=1e-4)


TOGETHER = """
from libprune.pipeline.layout import Layout
from libprune.recovery.recover import recover_layout
from tests.support.tiny import write_model
from tests.support.recovering import CPU, short
recovery = recover_layout(Layout(Path("artifacts")), CPU, short())
print("nothing" if recovery is None else recovery.after)
"""


def test_two_processes_train_as_one_does(tmp_path, python, quick_proof):
    layouts = [write_pruned_layout(tmp_path / name / "artifacts", "llama", "uniform") for name in ("one", "two")]
    alone = recovered(layouts[0])
    first, second = together(python, tmp_path / "two", TOGETHER)
    assert float(first.split()[-1]) == pytest.approx(alone.after, rel=1e-3)
    assert second.split()[-1] == "nothing"
    one, two = (WeightFiles(layout.recovered) for layout in layouts)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)


def test_shared_weights_are_refused_on_a_cpu(tmp_path, quick_proof, monkeypatch):
    monkeypatch.setattr(recover, "join_world", lambda: recover.World(size=1, sharded=True))
    layout = write_pruned_layout(tmp_path / "artifacts", "llama", "uniform")
    monkeypatch.setattr(recover, "load_teacher", lambda *_: FAMILIES["llama"](0))
    with pytest.raises(LibpruneError, match="over GPUs only"):
        recovered(layout)


def test_what_is_missing_is_named_with_its_stage(tmp_path, quick_proof):
    layout = write_pruned_layout(tmp_path / "artifacts", "llama", "uniform")
    layout.recovery_tokens.unlink()
    with pytest.raises(ArtifactError, match="run `dvc repro teacher` first"):
        recovered(layout)
    with pytest.raises(ArtifactError, match="run `dvc repro slice` first"):
        recovered(Layout(write_pruned(tmp_path)))


def write_pruned(root: Path) -> Path:
    """A layout without a pruned model."""
    layout = write_pruned_layout(root / "other", "llama", "uniform")
    for path in layout.pruned.iterdir():
        path.unlink()
    layout.pruned.rmdir()
    return layout.root
