"""A process of a stage ends with the DVC that started it, whatever stands between them."""

import subprocess
import sys
import time

import pytest

from libprune.pipeline.processes import runs

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


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_a_stage_ends_with_its_dvc(between):
    command = [sys.executable, "-c", DVC, *between, sys.executable, "-c", STAGE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as dvc:
        assert dvc.stdout is not None
        stage = int(dvc.stdout.readline())
        time.sleep(1)
        assert runs(stage)
        dvc.kill()
    deadline = time.monotonic() + 20
    while runs(stage) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(stage)


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
