"""After a kill nothing is left that stops the next run, and nothing of a run that goes on is touched."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from libprune.cli.main import app
from libprune.pipeline.atomic import HERE
from libprune.pipeline.locks import UNREADABLE, clear_up, leftovers, mend, running
from libprune.pipeline.processes import runs
from tests.support.closure import ROOT

STAGE = """
import os, sys, time
from libprune.pipeline.locks import watch_dvc
from libprune.pipeline.processes import end_with_dvc
end_with_dvc()
watch_dvc()
print("began", os.getpid(), flush=True)
time.sleep(float(sys.argv[1]))
"""


RECORD = "schema: '2.0'\nstages:\n  one:\n    cmd: python one.py\n"


def dvc(project: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "dvc", *words]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": tempfile.gettempdir()}


@pytest.fixture(autouse=True)
def scratch(tmp_path_factory, monkeypatch) -> None:
    """A folder for scratch files that no test beside this one leaves files in."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("scratch")))


@pytest.fixture
def project(tmp_path) -> Path:
    """A project of DVC with one stage that takes a minute."""
    subprocess.run(dvc(tmp_path, "init", "--no-scm", "-q"), cwd=tmp_path, env=environment(), check=True)
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "dvc.yaml").write_text(f"stages:\n  one:\n    cmd: {sys.executable} stage.py 60\n")
    return tmp_path


def ended(process: int) -> int:
    """The number of a process that has ended."""
    deadline = time.monotonic() + 20
    while runs(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def test_a_lock_file_that_dvc_left_empty_is_gone_when_the_next_run_begins(project):
    """DVC is killed, and its lock file is as a kill in the middle of its writing leaves it."""
    lock = project / ".dvc/tmp/rwlock"
    with subprocess.Popen(
        dvc(project, "repro"), cwd=project, env=environment(), stdout=subprocess.PIPE, text=True
    ) as run:
        stage = next(int(line.split()[1]) for line in iter(run.stdout.readline, "") if line.startswith("began"))
        assert {run.pid, stage} <= set(running(project))
        while not list(project.glob(".dvc/tmp/libprune-*.lock")):
            time.sleep(0.02)
        assert clear_up(project) == []
        (project / "dvc.lock").write_text(RECORD)
        while not (project / ".dvc/tmp/libprune/dvc.lock").exists():
            time.sleep(0.02)
        lock.write_text("")
        (project / "dvc.lock").write_text("")
        assert clear_up(project) == [], "a run that goes on keeps what it has"
        run.kill()
    deadline = time.monotonic() + 20
    while (lock.exists() or list(project.glob(".dvc/tmp/libprune-*.lock"))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (project / "dvc.lock").read_text() == RECORD
    (project / "dvc.yaml").write_text(f"stages:\n  one:\n    cmd: {sys.executable} stage.py 0\n")
    done = subprocess.run(dvc(project, "repro"), cwd=project, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("content", "kept"), [("", False), ('{"write": {"/a"', False), ("{}", True)])
def test_only_an_unreadable_lock_file_goes(tmp_path, content, kept):
    lock = tmp_path / ".dvc/tmp/rwlock"
    lock.parent.mkdir(parents=True)
    lock.write_text(content)
    assert clear_up(tmp_path) == ([] if kept else [lock])
    assert lock.exists() == kept


def test_a_stage_that_still_runs_keeps_the_lock(tmp_path):
    lock = tmp_path / ".dvc/tmp/rwlock"
    lock.parent.mkdir(parents=True)
    lock.write_text("")
    named = os.environ | {"DVC_STAGE": "slice", "DVC_ROOT": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], env=named, **PIPES) as stage:
        stage.stdout.readline()
        assert running(tmp_path) == [stage.pid]
        assert clear_up(tmp_path) == []
        stage.communicate(b"\n")
    assert clear_up(tmp_path) == [lock]


PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


def test_half_written_files_of_the_dead_are_left_over_and_those_of_the_living_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    dead = ended(process.pid)
    left = [tmp_path / f"artifacts/.pruned.{HERE}.{dead}.partial", tmp_path / f"scratch/libprune-{HERE}-{dead}-abc"]
    kept = [
        tmp_path / f"artifacts/.plan.{HERE}.{os.getpid()}.partial",
        tmp_path / f"scratch/libprune-{HERE}-{os.getpid()}-abc",
    ]
    other = [tmp_path / f"artifacts/.pruned.another.{dead}.partial", tmp_path / f"scratch/libprune-another-{dead}-abc"]
    for path in (*left, *kept, *other):
        path.mkdir(parents=True)
        (path / "content.json").write_text(json.dumps({}))
    assert list(leftovers(tmp_path)) == left
    assert clear_up(tmp_path) == left
    assert [path.exists() for path in (*left, *kept, *other)] == [False, False, True, True, True, True]


FORK = "import os, sys; child = os.fork(); os.wait() if child else os.execv(sys.executable, sys.argv[1:])"


@pytest.mark.parametrize("called", ["repro", "daemon"])
def test_a_command_of_dvc_counts_and_its_daemon_and_the_fork_that_waits_for_it_do_not(tmp_path, called):
    (tmp_path / "dvc").write_text(FORK)
    (tmp_path / "__main__.py").write_text("print(1, flush=True); input()")
    command = [sys.executable, "dvc", sys.executable, "__main__.py", called]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), **PIPES) as process:
        process.stdout.readline()
        assert running(tmp_path) == ([process.pid] if called == "repro" else [])
        process.communicate(b"\n")


@pytest.mark.parametrize("cut", ["", "schema: '2.0'\nstages:\n  one", "stages: {}\n", "schema: [\n"])
@pytest.mark.parametrize("kept", [RECORD, None, "schema"])
def test_a_record_that_a_kill_has_cut_off_is_what_it_was_or_is_removed(tmp_path, cut, kept):
    record, copy = tmp_path / "dvc.lock", tmp_path / ".dvc/tmp/libprune/dvc.lock"
    copy.parent.mkdir(parents=True)
    if kept is not None:
        copy.write_text(kept)
    record.write_text(cut)
    assert mend(tmp_path) == [record]
    assert (record.read_text() if record.exists() else None) == (RECORD if kept == RECORD else None)
    assert (tmp_path / UNREADABLE).read_text() == cut
    assert mend(tmp_path) == []


@pytest.mark.parametrize("kept", [RECORD, None])
def test_a_record_with_the_marks_of_a_merge_is_left_to_the_user(tmp_path, kept):
    record, copy = tmp_path / "dvc.lock", tmp_path / ".dvc/tmp/libprune/dvc.lock"
    copy.parent.mkdir(parents=True)
    if kept is not None:
        copy.write_text(kept)
    merged = "schema: '2.0'\nstages:\n<<<<<<< HEAD\n  one: 1\n=======\n  one: 2\n>>>>>>> theirs\n"
    record.write_text(merged)
    assert mend(tmp_path) == []
    assert clear_up(tmp_path) == []
    assert record.read_text() == merged


def test_any_command_mends_what_a_kill_before_the_first_stage_has_left(tmp_path, monkeypatch):
    """No watcher was started then."""
    lock = tmp_path / ".dvc/tmp/rwlock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["params"])
    assert ".dvc/tmp/rwlock: unreadable since a kill, mended" in done.output
    assert not lock.exists()
