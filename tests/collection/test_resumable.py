"""The collecting stages as a whole: they go on where they were stopped, announce their bytes, and run in any way."""

import ast
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from libprune.collection import resumable as collection
from libprune.collection.calibration import Calibration, Run, set_up
from libprune.collection.records import Sum, count
from libprune.collection.resumable import collecting, sums_identity
from libprune.engine.errors import ArtifactError, LibpruneError, StatisticsError
from libprune.models import memory
from libprune.models.parallel import World
from libprune.models.samples import Samples
from libprune.models.sequences import Sequences
from libprune.pipeline.artifacts import read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute
from tests.support import measured, tiny
from tests.support.closure import ROOT, closure
from tests.support.measured import write_project
from tests.support.models import FAMILIES
from tests.support.processes import launch, require_to_wait, together
from tests.support.tiny import change_params

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


def test_an_interval_that_is_no_number_is_told(place, monkeypatch):
    monkeypatch.setenv("LIBPRUNE_CHECKPOINT_SECONDS", "30s")
    with pytest.raises(LibpruneError, match="LIBPRUNE_CHECKPOINT_SECONDS = '30s' is no number of seconds"):
        stage("gradients", place)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("sums", ["memory", "disk"])
def test_a_stopped_stage_goes_on_and_ends_with_the_same_bytes(project, place, stopping, name, sums, capsys):
    change_params(place, "compute", sums=sums)
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
    change_params(place, section, **values)
    stopping.after, stopping.run = 10**6, 0
    stage("gradients", place)
    assert stopping.run == (3 if "batch_sequences" in values else 6)


def test_another_model_or_text_is_not_continued(project, place, stopping):
    stopping.after = 4
    with pytest.raises(KeyboardInterrupt):
        stage("gradients", place)
    change_params(place, "tokenize", seed=5)
    stage("tokenize", place)
    stopping.after, stopping.run = 10**6, 0
    stage("gradients", place)
    assert stopping.run == 6


def test_fewer_or_more_sequences_go_on_from_the_first_ones(project, place, stopping):
    stopping.after = 4
    with pytest.raises(KeyboardInterrupt):
        stage("gradients", place)
    change_params(place, "gradients", sequences=8)
    stopping.after, stopping.run = 10**6, 0
    stage("gradients", place)
    assert stopping.run == 4
    continued = place / "artifacts/gradients"
    continued.rename(place / "continued")
    stage("gradients", place)
    assert_same(place / "continued", place / "artifacts/gradients")


def test_a_batch_that_is_not_full_is_not_gone_on_from(place, stopping, monkeypatch):
    """The sums of 5 sequences in batches of 2 end in the middle of a batch of 6 or more."""
    change_params(place, "gradients", sequences=5, batch_sequences=2)
    monkeypatch.setattr(
        "libprune.statistics.gradients.write_artifact", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        stage("gradients", place)
    monkeypatch.undo()
    change_params(place, "gradients", sequences=6)
    stage("gradients", place)
    change_params(place, "gradients", sequences=5)
    (place / "artifacts/gradients").rename(place / "six")
    stage("gradients", place)
    _, meta = read_table(place / "artifacts/gradients/units.parquet", "gradients")
    assert meta["sequences"] == 5
    change_params(place, "gradients", sequences=6)
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
    change_params(place, "gradients", sequences=3)
    stopping.run = 0
    stage("gradients", place)
    assert stopping.run == 0
    _, meta = read_table(place / "artifacts/gradients/units.parquet", "gradients")
    assert meta["sequences"] == 3


def test_a_second_run_waits_for_the_first(place, python):
    """As after DVC was killed and its stage went on."""
    require_to_wait(python, place, "hessian", "hessian/units.parquet")


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


# What unfinished sums depend on


ELSEWHERE = (
    *("texts", "vocabulary", "statistics", "narrowing", "scoring", "repair", "allocation", "results", "report"),
    *("recovery", "export", "foresight", "experiments", "curves", "masks", "networks", "project", "cli"),
)
SUMS = [{"w": Sum((2,))}]


@pytest.fixture
def code(tmp_path, monkeypatch) -> Path:
    """A copy of libprune's code, which the sums are taken to depend on."""
    copy = shutil.copytree(collection.PACKAGE, tmp_path / "libprune", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(collection, "PACKAGE", Path(copy))
    return Path(copy)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Calibration:
    """A model and its text, on which nothing has been collected."""
    folder = write_project(FAMILIES["llama"](0), tmp_path_factory.mktemp("calibration"))
    return set_up(Layout(folder / "artifacts"), Compute(device="cpu", dtype="float32"), None)


def edit(code: Path, room: str) -> None:
    path = sorted((code / room).glob("*.py"))[-1]
    path.write_text(path.read_text() + "\n# edited\n")


def test_the_rooms_are_those_of_the_package(code):
    folders = {path.parent.name for path in code.glob("*/__init__.py")}
    assert {*collection.ROOMS, *ELSEWHERE} == folders, "a new room is either of collecting or not"
    assert not {*collection.ROOMS} & {*ELSEWHERE}


def test_a_copy_of_the_code_has_the_same_identity(calibration, code, monkeypatch):
    copied = sums_identity(calibration, {})
    monkeypatch.setattr(collection, "PACKAGE", ROOT / "libprune")
    assert sums_identity(calibration, {}) == copied


@pytest.mark.parametrize("room", collection.ROOMS)
def test_an_edit_of_the_code_that_collects_makes_other_sums(calibration, code, room):
    before = sums_identity(calibration, {})
    edit(code, room)
    assert sums_identity(calibration, {}) != before


@pytest.mark.parametrize("room", ELSEWHERE)
def test_an_edit_elsewhere_does_not_unless_the_room_is_named(calibration, code, room):
    before, named = sums_identity(calibration, {}), sums_identity(calibration, {}, (room,))
    assert before != named
    edit(code, room)
    assert sums_identity(calibration, {}) == before
    assert sums_identity(calibration, {}, (room,)) != named


@pytest.mark.parametrize("room", [*collection.ROOMS, "repair", "no_such_room"])
def test_a_room_without_code_is_an_error_and_not_hashed_as_nothing(calibration, code, room):
    shutil.rmtree(code / room, ignore_errors=True)
    with pytest.raises(AssertionError, match=f"{room} holds no code"):
        sums_identity(calibration, {}, ("repair", room))


def test_settings_processes_and_passes_are_part_of_the_identity(calibration):
    others = [
        sums_identity(calibration, {"a": 1}),
        sums_identity(calibration, {"a": 2}),
        sums_identity(replace(calibration, world=World(0, 2)), {}),
        sums_identity(replace(calibration, at_once=calibration.at_once + 1), {}),
        sums_identity(replace(calibration, meta=calibration.meta | {"tokens": "others"}), {}),
        sums_identity(replace(calibration, device=torch.device("meta")), {}),
    ]
    assert len({sums_identity(calibration, {}), *others}) == len(others) + 1
    fewer = replace(calibration, meta=calibration.meta | {"sequences": 2})
    assert sums_identity(fewer, {}) == sums_identity(calibration, {})


EDITED = [("collection", False), ("statistics", False), ("repair", False), ("allocation", True), ("report", True)]


@pytest.mark.parametrize(("room", "goes_on"), EDITED)
def test_sums_go_on_only_if_no_room_that_makes_them_was_edited(
    calibration, code, tmp_path, monkeypatch, capsys, room, goes_on
):
    monkeypatch.setenv("LIBPRUNE_CHECKPOINT_SECONDS", "0")
    run = replace(calibration, work=tmp_path / "work")

    def collect(stop: bool) -> None:
        with collecting(run, "levels", tmp_path / "target", SUMS, 1, {}, 3, 1, ("repair",)) as work:
            for number in work.steps():
                if stop and number == 2:
                    raise KeyboardInterrupt
                work.accumulator.update(0, "w", torch.ones(2), count(1))
            assert work.accumulator.finish(0)["w"].tolist() == [1, 1]

    with pytest.raises(KeyboardInterrupt):
        collect(stop=True)
    edit(code, room)
    collect(stop=False)
    assert ("continues from a saved state: 2 of 3 are done" in capsys.readouterr().out) is goes_on


COLLECTING = ("gradients", "hessian", "activations", "ablation", "sensitivity", "levels")


def rooms_given(stage: str) -> set[str]:
    """The rooms that a stage's statistic adds to those of collecting, read from the code of its module."""
    tree = ast.parse((ROOT / f"libprune/statistics/{stage}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    collects = [call for call in calls if call.func.id in {"collecting", "measuring"}]
    assert len(collects) == 1, f"{stage} collects in one place"
    given = [word.value for word in collects[0].keywords if word.arg == "rooms"]
    return {room for argument in given for room in ast.literal_eval(argument)}


@pytest.mark.parametrize("stage", COLLECTING)
def test_a_stage_names_all_rooms_whose_code_it_runs_and_no_others(stage):
    """The data of the families is in the description of the model, which the sums depend on too."""
    run = {file.split("/")[1] for file in closure(ROOT / f"stages/{stage}.py") if file.startswith("libprune/")}
    assert {*collection.ROOMS, "statistics"} | rooms_given(stage) == run - {"families", "__init__.py"}


@pytest.mark.parametrize("module", ["repair/repairs", "allocation/search"])
def test_a_repair_and_a_search_that_go_on_name_all_rooms_whose_code_they_run(module):
    path = ROOT / f"libprune/{module}.py"
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "sums_identity")
    run = {file.split("/")[1] for file in closure(path) if file.startswith("libprune/")}
    assert {*collection.ROOMS, *ast.literal_eval(call.args[2])} == run - {"families", "__init__.py"}


def test_levels_alone_adds_a_room():
    assert {stage: rooms_given(stage) for stage in COLLECTING if rooms_given(stage)} == {"levels": {"repair"}}


# Batches


def test_batches_and_passes_hold_all_that_the_sums_do_not(calibration, tmp_path):
    lengths = torch.tensor([3, 3, 4, 4, 4, 5])
    for sequences in (calibration.sequences, Sequences(calibration.sequences.ids, torch.arange(6), lengths)):
        run = replace(calibration, sequences=sequences, work=tmp_path / "work")
        with collecting(run, "gradients", tmp_path / "target", SUMS, 4, {}) as work:
            batches = list(work.batches())
        assert [(number, first, len(batch)) for number, first, batch in batches] == [(0, 0, 4), (1, 4, 2)]
        with collecting(run, "gradients", tmp_path / "target", SUMS, 4, {}) as work:
            passes = list(work.passes())
        sizes = [4, 2] if sequences.lengths is None else [2, 2, 1, 1]
        assert [len(one) for _, _, one in passes] == sizes
        assert [first for _, first, _ in passes] == np.cumsum([0, *sizes[:-1]]).tolist()
        assert {number for number, _, _ in passes} == {0, 1}
        for _, first, one in passes:
            assert torch.equal(one.ids, sequences.ids[first : first + len(one), : one.length])


def test_samples_of_a_network_come_in_batches_as_sequences_do(calibration, tmp_path):
    samples = Samples(torch.randn(5, 2), torch.arange(5))
    run = Run(
        architecture=calibration.architecture,
        weights=calibration.weights,
        sequences=samples,
        device=calibration.device,
        compute=calibration.compute,
        world=calibration.world,
        meta={},
        work=tmp_path / "work",
        at_once=2,
    )
    assert run.unit == "sample"
    with collecting(run, "gradients", tmp_path / "target", SUMS, 2, {}) as work:
        batches = list(work.batches())
    assert [(number, first) for number, first, _ in batches] == [(0, 0), (1, 2), (2, 4)]
    assert torch.equal(torch.cat([batch.inputs for _, _, batch in batches]), samples.inputs)


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


# Ways of running


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("setting", [{"offload": "cpu"}, {"gradient_checkpointing": True}])
def test_ways_to_save_memory_change_no_bit(project, place, name, setting):
    change_params(place, "compute", **setting)
    stage(name, place)
    assert_same(place / "artifacts" / name, project / name)


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
    weight = found.model.get_parameter(entry.weight)
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


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_two_processes_share_experts_out(kind, tmp_path, python):
    """With biases, without gates, and beside layers that have no experts."""
    folder = measured.write_project(FAMILIES[kind](0), tmp_path)
    for section, values in SETTINGS.items():
        change_params(folder, section, **values)
    change_params(folder, "hessian", estimator="fisher")
    stages = [*STAGES, "ablation"]
    for name in stages:
        stage(name, folder)
    (folder / "artifacts").rename(folder / "whole")
    shutil.copytree(folder / "whole", folder / "artifacts", ignore=shutil.ignore_patterns(*STAGES, "ablation.parquet"))
    together(python, folder, SHARDED + ALL, LIBPRUNE_SHARD="1")
    for name in STAGES:
        assert_same(folder / "artifacts" / name, folder / "whole" / name, exact=False)
    assert_same_tables(folder / "whole/ablation.parquet", folder / "artifacts/ablation.parquet")


@pytest.mark.parametrize("sequences", [6, 5])
def test_processes_that_share_weights_make_equally_many_passes_over_unequal_batches(sequences, tmp_path, python):
    """The first process has a batch of four passes, the second one of two or one."""
    folder = measured.write_project(FAMILIES["llama"](0), tmp_path)
    change_params(folder, "compute", batch_tokens=measured.LENGTH)
    change_params(folder, "gradients", sequences=sequences, batch_sequences=4, storage_dtype="float32")
    stage("gradients", folder)
    (folder / "artifacts/gradients").rename(folder / "whole")
    together(python, folder, "run('gradients')\n", LIBPRUNE_SHARD="1")
    assert_same(folder / "artifacts/gradients", folder / "whole", exact=False)
    assert_same_tables(folder / "whole/units.parquet", folder / "artifacts/gradients/units.parquet")


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
    change_params(place, "hessian", estimator="none")
    change_params(place, "ablation", units=0)
    first, _ = together(python, place, "for _ in range(20): run('hessian'); run('ablation')\n")
    assert first.count("nothing collected") == 20


def test_sharing_out_needs_two_processes(monkeypatch, place):
    monkeypatch.setenv("LIBPRUNE_SHARD", "1")
    with pytest.raises(LibpruneError, match="LIBPRUNE_SHARD is set for one process"):
        stage("gradients", place)
