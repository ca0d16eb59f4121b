"""The collecting stages as a whole: they go on where they were stopped, announce their bytes, and run in any way."""

import fcntl
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedModel

from libprune.collection import accumulator
from libprune.collection import resumable as collection
from libprune.collection.records import Sum, count
from libprune.engine.architecture import Architecture
from libprune.engine.errors import ArtifactError, LibpruneError, StatisticsError
from libprune.models import memory
from libprune.models.folder import load_model
from libprune.pipeline.artifacts import read_table
from tests.support import tiny
from tests.support.closure import ROOT

STAGES = ("gradients", "hessian", "activations")
SETTINGS = {
    "compute": {"batch_tokens": 16},
    "gradients": {"sequences": 6, "batch_sequences": 1, "storage_dtype": "float32"},
    "hessian": {"sequences": 6, "storage_dtype": "float32"},
    "ablation": {"units": 5, "sequences": 4},
}
TOGETHER = (*STAGES, "ablation")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The tiny model, prepared and tokenized, with the artifacts of uninterrupted runs in `whole/`."""
    folder = tmp_path_factory.mktemp("project")
    model, text = str(tiny.write_model(folder / "model")), str(tiny.write_text(folder / "text.txt"))
    tiny.write_params(folder / "params.yaml", model, text, **SETTINGS)
    for name in ("prepare", "tokenize", *TOGETHER):
        stage(name, folder)
    (folder / "artifacts/ablation.parquet").rename(folder / "ablation.parquet")
    for name in STAGES:
        (folder / "artifacts" / name).rename(folder / name)
    return folder


@pytest.fixture
def place(project, tmp_path) -> Path:
    """A copy of the project without what the collecting stages write."""
    shutil.copytree(project / "artifacts", tmp_path / "artifacts")
    shutil.copyfile(project / "params.yaml", tmp_path / "params.yaml")
    return tmp_path


def stage(name: str, folder: Path) -> None:
    import_module(f"stages.{name}").main(folder / "params.yaml", folder / "artifacts")


def change(folder: Path, section: str, **values: object) -> None:
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params[section] |= values
    path.write_text(yaml.safe_dump(params))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same(one: Path, two: Path, exact: bool = True) -> None:
    """The same files; equal bytes, or equal up to the order of float32 sums."""
    assert content(one).keys() == content(two).keys()
    if exact:
        assert content(one) == content(two)
    for path in one.glob("*.safetensors"):
        ours, theirs = load_file(path), load_file(two / path.name)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            expected = theirs[name].double()
            assert float((tensor.double() - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.fixture
def stopping(monkeypatch) -> Iterator[SimpleNamespace]:
    """Every batch is saved, and the stage stops after `after` batches."""
    control = SimpleNamespace(after=10**6, run=0)
    monkeypatch.setenv("LIBPRUNE_CHECKPOINT_SECONDS", "0")
    steps = collection.Collection.steps

    def counted(self):
        for number in steps(self):
            if control.after == 0:
                raise KeyboardInterrupt
            control.after -= 1
            control.run += 1
            yield number

    monkeypatch.setattr(collection.Collection, "steps", counted)
    return control


# Interruption


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("sums", ["memory", "disk"])
def test_a_stopped_stage_goes_on_and_ends_with_the_same_bytes(project, place, stopping, name, sums, capsys):
    change(place, "compute", sums=sums)
    stopping.after = 4
    with pytest.raises(KeyboardInterrupt):
        stage(name, place)
    assert not (place / "artifacts" / name).exists()
    stopping.after, stopping.run = 10**6, 0
    stage(name, place)
    assert_same(place / "artifacts" / name, project / name)
    total = 8 if name == "activations" else 6
    assert stopping.run == total - 4
    assert f"continues from a saved state: 4 of {total} are done" in capsys.readouterr().out
    assert list((place / ".work" / name).iterdir()) == []


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("gradients", {"second_moments": "full"}),
        ("gradients", {"batch_sequences": 2}),
        ("compute", {"dtype": "bfloat16"}),
    ],
)
def test_what_was_collected_otherwise_is_not_continued(place, stopping, section, values):
    stopping.after = 4
    with pytest.raises(KeyboardInterrupt):
        stage("gradients", place)
    change(place, section, **values)
    stopping.after, stopping.run = 10**6, 0
    stage("gradients", place)
    assert stopping.run == (3 if "batch_sequences" in values else 6)


def test_another_model_or_text_is_not_continued(project, place, stopping):
    stopping.after = 4
    with pytest.raises(KeyboardInterrupt):
        stage("gradients", place)
    change(place, "tokenize", seed=5)
    stage("tokenize", place)
    stopping.after, stopping.run = 10**6, 0
    stage("gradients", place)
    assert stopping.run == 6


def test_fewer_or_more_sequences_go_on_from_the_first_ones(project, place, stopping):
    stopping.after = 4
    with pytest.raises(KeyboardInterrupt):
        stage("gradients", place)
    change(place, "gradients", sequences=8)
    stopping.after, stopping.run = 10**6, 0
    stage("gradients", place)
    assert stopping.run == 4
    continued = place / "artifacts/gradients"
    continued.rename(place / "continued")
    stage("gradients", place)
    assert_same(place / "continued", place / "artifacts/gradients")


def test_a_batch_that_is_not_full_is_not_gone_on_from(place, stopping, monkeypatch):
    """The sums of 5 sequences in batches of 2 end in the middle of a batch of 6 or more."""
    change(place, "gradients", sequences=5, batch_sequences=2)
    monkeypatch.setattr(
        "libprune.statistics.gradients.write_artifact", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        stage("gradients", place)
    monkeypatch.undo()
    change(place, "gradients", sequences=6)
    stage("gradients", place)
    change(place, "gradients", sequences=5)
    (place / "artifacts/gradients").rename(place / "six")
    stage("gradients", place)
    _, meta = read_table(place / "artifacts/gradients/units.parquet", "gradients")
    assert meta["sequences"] == 5
    change(place, "gradients", sequences=6)
    stage("gradients", place)
    assert_same(place / "artifacts/gradients", place / "six")


def test_a_value_that_is_not_finite_leaves_the_sums_before_it_usable(place, stopping, monkeypatch):
    """The message says how to finish with them, and that is true."""
    seen = 0
    sequence_losses = import_module("libprune.statistics.gradients").sequence_losses

    def broken(model, sequences):
        nonlocal seen
        seen += 1
        return sequence_losses(model, sequences) * (float("nan") if seen == 4 else 1.0)

    monkeypatch.setattr("libprune.statistics.gradients.sequence_losses", broken)
    with pytest.raises(
        StatisticsError, match=r"the loss is not finite for calibration sequence 3;.*sequences: 3 finishes"
    ):
        stage("gradients", place)
    monkeypatch.setattr("libprune.statistics.gradients.sequence_losses", sequence_losses)
    change(place, "gradients", sequences=3)
    stopping.run = 0
    stage("gradients", place)
    assert stopping.run == 0
    _, meta = read_table(place / "artifacts/gradients/units.parquet", "gradients")
    assert meta["sequences"] == 3


def test_a_second_run_waits_for_the_first(place, python):
    """As after DVC was killed and its stage went on."""
    work = place / ".work"
    work.mkdir()
    with (work / "hessian.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        second = subprocess.Popen(
            [python, "-m", "stages.hessian", "--params", place / "params.yaml", "--artifacts", "artifacts"],
            cwd=place,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for line in second.stderr:
            if "waits for process 4711" in line:
                break
        assert second.poll() is None
        assert not (place / "artifacts/hessian").exists()
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert (place / "artifacts/hessian/units.parquet").exists()


def test_kills_at_random_moments(python):
    """A few of `bench/kills.py`, which checks for itself."""
    done = subprocess.run(
        [python, "-m", "bench.kills", "--kills", "2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_saved_state_that_is_damaged_is_named(place, stopping):
    stopping.after = 4
    with pytest.raises(KeyboardInterrupt):
        stage("gradients", place)
    (saved,) = (place / ".work/gradients").glob("*/process-0-of-1/after-4-4")
    next(saved.iterdir()).write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"after-4-4 is damaged .*; delete it and run `dvc repro gradients`"):
        stage("gradients", place)


@pytest.mark.parametrize("left", [".unfinished-3", ".discarded-after-3-3"])
def test_what_a_kill_left_while_saving_or_deleting_is_cleared(project, place, stopping, left):
    stopping.after = 4
    with pytest.raises(KeyboardInterrupt):
        stage("gradients", place)
    (home,) = (place / ".work/gradients").iterdir()
    (home / "process-0-of-1" / left).mkdir()
    (home / "process-0-of-1" / left / "group-000.safetensors").write_bytes(b"half")
    shutil.copytree(home, home.with_name(f".discarded-{home.name}"))
    stopping.after = 10**6
    stage("gradients", place)
    assert not list((place / ".work/gradients").iterdir())
    assert_same(place / "artifacts/gradients", project / "gradients")


# Bytes


@pytest.mark.parametrize("name", STAGES)
def test_what_is_announced_is_what_is_written(place, name, capsys):
    stage(name, place)
    announced = next(line for line in capsys.readouterr().out.splitlines() if "will be written" in line)
    megabytes = float(announced.split()[1])
    written = sum(
        t.nbytes for path in (place / "artifacts" / name).glob("*.safetensors") for t in load_file(path).values()
    )
    assert megabytes == pytest.approx(written / 1e6, abs=0.1)


def test_a_disk_without_room_is_refused_before_any_work(place, stopping, monkeypatch):
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(LibpruneError, match=r"gradients needs .* MB below .*, where 0.0 MB are free; free some"):
        stage("gradients", place)
    assert stopping.run == 0
    assert not (place / "artifacts/gradients").exists()


def test_sums_that_would_take_half_of_the_memory_are_mapped_from_disk(monkeypatch, place, project, capsys):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    stage("gradients", place)
    assert "in files mapped from disk" in capsys.readouterr().out
    assert_same(place / "artifacts/gradients", project / "gradients")


def test_mapped_sums_hold_one_layer_in_memory_at_a_time(tmp_path):
    """Resident memory after every layer was written to, against all layers' sums."""
    groups = [{"w": Sum((1000, 1000))} for _ in range(40)]  # 160 MB
    sums = accumulator.Accumulator(groups, tmp_path)
    before, most = resident(), 0
    for group in range(len(groups)):
        sums.update(group, "w", torch.ones(1000, 1000), count(1))
        most = max(most, resident() - before)
    assert most < 60_000_000
    assert all(float(sums.finish(group)["w"].sum()) == 1e6 for group in range(len(groups)))


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# Ways of running


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("setting", [{"offload": "cpu"}, {"gradient_checkpointing": True}])
def test_ways_to_save_memory_change_no_bit(project, place, name, setting):
    change(place, "compute", **setting)
    stage(name, place)
    assert_same(place / "artifacts" / name, project / name)


def described(project: Path) -> tuple[Architecture, PreTrainedModel]:
    architecture = Architecture.from_json((project / "artifacts/architecture.json").read_text())
    return architecture, load_model(project / "artifacts/model", torch.float32)


def test_offloaded_weights_are_on_the_device_only_while_their_map_works(project):
    architecture, model = described(project)
    memory.offload_maps(model, architecture, torch.device("cpu"))
    memory.recompute_layers(model, architecture)
    maps = [model.get_submodule(entry.module) for entry in architecture.maps]
    seen = []
    for module in maps:
        module.register_forward_hook(lambda m, args, output: seen.append(output.shape))
    ids = torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad():
        model(ids)
    assert len(seen) == len(maps)
    assert {module.weight.device.type for module in maps} == {"meta"}
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda m, args, output: output.requires_grad_(True))
    model(ids).logits.sum().backward()
    assert len(seen) == 3 * len(maps)
    assert {module.weight.device.type for module in maps} == {"meta"}


def launch(place: Path, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes under torchrun, with gloo."""
    (place / "program.py").write_text(HEAD + program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"]
    everything = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=place, env=everything, capture_output=True, text=True, check=False)


def together(python: Path, place: Path, program: str, **environment: str) -> list[str]:
    """What the two processes say of a program that ends well; as `launch`, without the launcher and its imports."""
    (place / "program.py").write_text(HEAD + program)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    everything = os.environ | {"PYTHONPATH": str(ROOT)} | meeting | environment
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} for rank in "01"]
    processes = [
        subprocess.Popen([python, "program.py"], cwd=place, env=everything | rank, stdout=PIPE, stderr=PIPE, text=True)
        for rank in ranks
    ]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return [out for out, _ in said]


HEAD = """
import os
from pathlib import Path
from importlib import import_module

def run(name):
    import_module("stages." + name).main(Path("params.yaml"), Path("artifacts"))
"""
ALL = "".join(f"run({name!r})\n" for name in TOGETHER)
SHARDED = """
import torch
from torch.distributed.tensor import DTensor
from libprune.pipeline.layout import Layout
from libprune.collection.calibration import set_up
from libprune.pipeline.params import load_params
from libprune.models.sequences import Sequences

found = set_up(Layout(Path("artifacts")), load_params(Path("params.yaml")).compute, None)
with torch.no_grad():
    found.model(torch.ones(1, 3, dtype=torch.long))
for entry in found.architecture.maps:
    weight = found.model.get_submodule(entry.module).weight
    assert isinstance(weight, DTensor)
    assert weight.to_local().shape != weight.shape
"""


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_give_the_artifacts_of_one(project, place, python, sharded):
    """Whole models, and a model shared out (FSDP2) even after a pass; sums differ in their order alone."""
    together(python, place, SHARDED + ALL if sharded else ALL, LIBPRUNE_SHARD=str(int(sharded)))
    for name in STAGES:
        assert_same(place / "artifacts" / name, project / name, exact=False)
        assert_same_tables(project / name / "units.parquet", place / "artifacts" / name / "units.parquet")
    assert_same_tables(project / "ablation.parquet", place / "artifacts/ablation.parquet")


def assert_same_tables(one: Path, two: Path) -> None:
    expected, found = (read_table(path, "stage")[0] for path in (one, two))
    assert expected.keys() == found.keys()
    for column, values in expected.items():
        if values.dtype == object:
            assert (values == found[column]).all()
        else:
            np.testing.assert_allclose(found[column], values, rtol=1e-4, atol=1e-5 * np.abs(values).max())


def test_a_process_that_fails_fails_the_stage_and_all_go_on_together(project, place, python):
    """The second process stops after two of its three batches; the next run has the same bytes as if it had not.

    What `torchrun` launches before that is as without it.
    """
    together(python, place, "run('gradients')\n")
    (place / "artifacts/gradients").rename(place / "whole")
    program = """
run("hessian")
import libprune.statistics.gradients as g
losses, left = g.sequence_losses, [2]

def fails(*args):
    left[0] -= os.environ["RANK"] == "1"
    assert left[0] >= 0
    return losses(*args)

g.sequence_losses = fails
run("gradients")
"""
    stopped = launch(place, program, LIBPRUNE_CHECKPOINT_SECONDS="0")
    assert stopped.returncode != 0
    assert not (place / "artifacts/gradients").exists()
    assert_same(place / "artifacts/hessian", project / "hessian", exact=False)
    first, _ = together(python, place, "run('gradients')\n")
    assert "continues from a saved state: 4 of 6 are done" in first
    assert_same(place / "artifacts/gradients", place / "whole")


def test_processes_that_have_nothing_to_do_do_not_meet(place, python):
    change(place, "hessian", estimator="none")
    change(place, "ablation", units=0)
    first, _ = together(python, place, "for _ in range(20): run('hessian'); run('ablation')\n")
    assert first.count("nothing collected") == 20


def test_sharing_out_needs_two_processes(monkeypatch, place):
    monkeypatch.setenv("LIBPRUNE_SHARD", "1")
    with pytest.raises(LibpruneError, match="LIBPRUNE_SHARD is set for one process"):
        stage("gradients", place)
