"""A process of a stage ends with the DVC that started it, whatever stands between them."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from libprune.pipeline import processes
from libprune.pipeline.processes import environment, fresh_python, isolated, runs

STAGE = """
import os, time
from libprune.pipeline.processes import end_with_dvc

end_with_dvc()
print(os.getpid(), flush=True)
time.sleep(60)
"""
DVC = """
import os, subprocess, sys
subprocess.run(sys.argv[1:], env=os.environ | {"DVC_STAGE": "gradients"})
"""
BETWEEN = {
    "nothing": [],
    "a shell that waits": ["/bin/sh", "-c", '"$@"; exit 0', "sh"],
    "a launcher": [sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])"],
}

WAITING = """
import time
from libprune.pipeline.processes import fresh_python
with fresh_python() as python:
    DO
"""


def ends(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    deadline = time.monotonic() + 20
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not runs(pid)


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_a_stage_ends_with_its_dvc(between):
    command = [sys.executable, "-c", DVC, *between, sys.executable, "-c", STAGE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as dvc:
        assert dvc.stdout is not None
        stage = int(dvc.stdout.readline())
        time.sleep(1)
        assert runs(stage)
        dvc.kill()
    assert ends(stage)


def test_a_stage_whose_dvc_ended_before_it_began_ends_too(tmp_path):
    """The system has made another process its parent, which would never end."""
    program = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(1)\n" + STAGE
    command = [sys.executable, "-c", DVC, sys.executable, "-c", program]
    environment = os.environ | {"DVC_ROOT": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as dvc:
        stage = int(dvc.stdout.readline())
        dvc.kill()
    assert ends(stage)


@pytest.mark.parametrize("does", ["time.sleep(60)", "python.run('import time; time.sleep(60)', [])"])
def test_a_fresh_python_ends_with_the_process_that_started_it(does):
    with subprocess.Popen([sys.executable, "-c", WAITING.replace("DO", does)]) as running:
        deadline = time.monotonic() + 20
        while not (inner := psutil.Process(running.pid).children()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        assert runs(inner[0].pid)
        running.kill()
    assert ends(inner[0].pid)


def test_a_fresh_python_runs_a_program_in_its_folder_and_without_libprune(quick_proof):
    program = """
import sys
from pathlib import Path
assert {"torch", "transformers.modeling_utils"} <= sys.modules.keys()
try:
    import libprune
except ImportError:
    Path("said.txt").write_text(" ".join(sys.argv[1:]))
"""
    with fresh_python() as python:
        assert python.run(program, ["two", "words\n"]) is None
        assert (python.folder / "said.txt").read_text() == "two words\n"
    assert not python.folder.exists()


def test_an_isolated_python_finds_what_this_one_does_but_nothing_in_its_folder(tmp_path, monkeypatch):
    for place, name in (("packages", "of_a_user"), ("own", "of_a_folder")):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    for name, found in (("of_a_user", 0), ("of_a_folder", 1)):
        command = isolated("import importlib, sys\nimportlib.import_module(sys.argv[1])", name)
        done = subprocess.run(command, cwd=tmp_path / "own", stderr=subprocess.DEVNULL)
        assert done.returncode == found, name


@pytest.mark.parametrize(
    ("program", "fault"),
    [("print(1)\nraise ValueError('of some kind')", "ValueError: of some kind"), ("exit(3)", "no message")],
)
def test_a_program_that_fails_in_a_fresh_python_is_told_of_by_its_last_line(quick_proof, program, fault):
    with fresh_python() as python:
        assert python.run(program, []) == fault


def test_a_fresh_python_that_the_system_ends_is_told_of_by_the_signal(monkeypatch):
    """Whatever it printed before."""
    shorter = processes._WAIT.replace("import torch\nimport transformers.modeling_utils\n", "")
    monkeypatch.setattr(processes, "_WAIT", shorter)
    program = "import os, sys\nprint('a warning', file=sys.stderr, flush=True)\nos.kill(os.getpid(), int(sys.argv[1]))"
    for number, fault in ((9, "SIGKILL, as the system does where memory is short"), (11, "SIGSEGV")):
        with fresh_python() as python:
            assert python.run(program, [str(number)]) == f"its process was ended by {fault}"


def test_a_program_of_the_tests_that_is_killed_before_it_says_what_to_run_harms_no_other(python):
    (address,) = re.findall(r"connect\('(.*)'\)", python.read_text())
    for said in (b"", b"0", b'0["/", {'):
        with socket.socket(socket.AF_UNIX) as killed:
            killed.connect(address)
            killed.sendall(said)
    done = subprocess.run([python, "-c", "print(2 + 3)"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr


def test_a_fresh_python_that_is_not_needed_ends_with_the_block():
    others = set(psutil.Process().children())
    with pytest.raises(ValueError, match="before"), fresh_python() as python:
        (process,) = set(psutil.Process().children()) - others
        raise ValueError("before it is asked")
    assert not runs(process.pid)
    assert not python.folder.exists()


def test_what_no_dvc_started_goes_on(monkeypatch):
    monkeypatch.delenv("DVC_STAGE", raising=False)
    subprocess.run([sys.executable, "-c", STAGE.replace("60", "1")], check=True)


def test_an_ended_process_that_nobody_waits_for_does_not_run():
    process = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 20
    while runs(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(process.pid)
    process.wait()


def test_python_is_the_one_that_runs_now(monkeypatch):
    monkeypatch.setenv("PATH", os.defpath)
    said = subprocess.run(["python", "-c", "import sys; print(sys.prefix)"], env=environment(), capture_output=True)
    assert Path(said.stdout.decode().strip()) == Path(sys.prefix)
