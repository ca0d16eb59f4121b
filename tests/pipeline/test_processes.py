"""A process of a stage ends with the DVC that started it, whatever stands between them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from libprune.pipeline.processes import END_WITH_PARENT, environment, run_bound, runs

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


RUN = END_WITH_PARENT + "import time; time.sleep(60)"


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


def test_a_program_that_a_stage_runs_ends_with_the_stage():
    stage = f"import sys; from libprune.pipeline.processes import run_bound; run_bound([sys.executable, '-c', {RUN!r}])"
    with subprocess.Popen([sys.executable, "-c", stage]) as running:
        deadline = time.monotonic() + 20
        while not (inner := psutil.Process(running.pid).children()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        assert runs(inner[0].pid)
        running.kill()
    assert ends(inner[0].pid)


def test_a_program_that_is_bound_gives_its_output_and_its_status():
    done = run_bound([sys.executable, "-c", END_WITH_PARENT + "import sys; print('done'); sys.exit(3)"])
    assert (done.stdout, done.returncode) == ("done\n", 3)


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
