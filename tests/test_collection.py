"""The collecting stages as a whole: they go on where they were stopped, announce their bytes, and run in any way."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from libprune import accumulator, collection, memory
from libprune.artifacts import read_table
from libprune.errors import LibpruneError, StatisticsError
from tests import tiny
from tests.closure import ROOT

STAGES = ("gradients", "hessian", "activations")
SETTINGS = {
    "compute": {"batch_tokens": 16},
    "gradients": {"sequences": 6, "batch_sequences": 1, "storage_dtype": "float32"},
    "hessian": {"sequences": 6, "storage_dtype": "float32"},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The tiny model, prepared and tokenized, with the artifacts of uninterrupted runs in `whole/`."""
    folder = tmp_path_factory.mktemp("project")
    model, text = str(tiny.write_model(folder / "model")), str(tiny.write_text(folder / "text.txt"))
    tiny.write_params(folder / "params.yaml", model, text, **SETTINGS)
    for name in ("prepare", "tokenize", *STAGES):
        stage(name, folder)
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
    monkeypatch.setattr(collection, "write_artifact", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
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
    sequence_losses = import_module("libprune.gradients").sequence_losses

    def broken(model, ids):
        nonlocal seen
        seen += 1
        return sequence_losses(model, ids) * (float("nan") if seen == 4 else 1.0)

    monkeypatch.setattr("libprune.gradients.sequence_losses", broken)
    with pytest.raises(
        StatisticsError, match=r"the loss is not finite for calibration sequence 3;.*sequences: 3 finishes"
    ):
        stage("gradients", place)
    monkeypatch.setattr("libprune.gradients.sequence_losses", sequence_losses)
    change(place, "gradients", sequences=3)
    stopping.run = 0
    stage("gradients", place)
    assert stopping.run == 0
    _, meta = read_table(place / "artifacts/gradients/units.parquet", "gradients")
    assert meta["sequences"] == 3


def test_a_second_run_waits_for_the_first(place):
    """As after DVC was killed and its stage went on."""
    work = place / ".work"
    work.mkdir()
    with (work / "hessian-0.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        second = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "stages.hessian",
                "--params",
                str(place / "params.yaml"),
                "--artifacts",
                "artifacts",
            ],
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


def test_kills_at_random_moments():
    """A few of `bench/kills.py`, which checks for itself."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.kills", "--kills", "2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


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
    from libprune.statistics import Sum, count

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


def test_offloaded_weights_are_on_the_device_only_while_their_map_works(project):
    from libprune.architecture import Architecture
    from libprune.checkpoint import load_model

    architecture = Architecture.from_json((project / "artifacts/architecture.json").read_text())
    model = load_model(project / "artifacts/model", torch.float32)
    memory.offload_maps(model, architecture, torch.device("cpu"))
    module = model.get_submodule("model.layers.2.mlp.up_proj")
    assert module.weight.device.type == "meta"
    seen = []
    module.register_forward_hook(lambda m, args, output: seen.append(output.shape))
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long))
    assert seen
    assert module.weight.device.type == "meta"


@pytest.mark.parametrize("shard", ["0", "1"])
def test_two_processes_give_the_artifact_of_one(project, place, shard):
    """Under torchrun with gloo, whole models and a model shared out (FSDP2); sums differ in their order alone."""
    program = "import sys; from pathlib import Path; from importlib import import_module\n"
    program += f"for name in {STAGES!r}: import_module('stages.' + name).main(Path('params.yaml'), Path('artifacts'))"
    (place / "all.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LIBPRUNE_SHARD": shard, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "all.py"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in STAGES:
        assert_same(place / "artifacts" / name, project / name, exact=False)
        one, two = (
            read_table(folder / "units.parquet", name)[0] for folder in (project / name, place / "artifacts" / name)
        )
        for column, values in one.items():
            if values.dtype != object:
                np.testing.assert_allclose(two[column], values, rtol=1e-4, atol=1e-5 * np.abs(values).max())


def test_a_process_that_fails_fails_the_stage(place):
    program = "import os; from pathlib import Path; from stages.gradients import main; import libprune.gradients as g\n"
    program += "if os.environ['RANK'] == '1': g.sequence_losses = None\n"
    program += "main(Path('params.yaml'), Path('artifacts'))"
    (place / "fails.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "fails.py"],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert not (place / "artifacts/gradients").exists()


def test_sharing_out_needs_two_processes(monkeypatch, place):
    monkeypatch.setenv("LIBPRUNE_SHARD", "1")
    with pytest.raises(LibpruneError, match="LIBPRUNE_SHARD is set for one process"):
        stage("gradients", place)
