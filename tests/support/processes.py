"""Programs that run in two processes, in the folder of a project."""

import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

from tests.support.closure import ROOT

HEAD = """
import os
from pathlib import Path
from importlib import import_module

def run(name):
    import_module("stages." + name).main(Path("params.yaml"), Path("artifacts"))
"""
"""The beginning of every program; `run` runs a stage by its name."""


def launch(place: Path, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes under torchrun, with gloo."""
    (place / "program.py").write_text(HEAD + program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "program.py"]
    everything = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=place, env=everything, capture_output=True, text=True, check=False)


def together(python: Path, place: Path, program: str, **environment: str) -> list[str]:
    """Run a program that ends well in two processes, without the launcher and its imports; return what each prints."""
    done = both(python, place, program, **environment)
    assert [process.returncode for process in done] == [0, 0], done
    return [process.stdout for process in done]


def both(python: Path, place: Path, program: str, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """Run a program in two processes, without the launcher and its imports."""
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
    said = [process.communicate(timeout=60) for process in processes]
    return [
        subprocess.CompletedProcess(one.args, one.returncode, *two) for one, two in zip(processes, said, strict=True)
    ]


def require_to_wait(python: Path, place: Path, stage: str, made: str) -> None:
    """Check that a stage waits while another process holds its lock, and ends well afterwards.

    `made` is a file that the stage writes, below the artifacts.
    """
    work = place / ".work"
    work.mkdir()
    with (work / f"{stage}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        command = [python, "-m", f"stages.{stage}", "--params", place / "params.yaml", "--artifacts", "artifacts"]
        everything = os.environ | {"PYTHONPATH": str(ROOT)}
        second = subprocess.Popen(command, cwd=place, env=everything, stderr=PIPE, stdout=subprocess.DEVNULL, text=True)
        for line in second.stderr:
            if "waits for process 4711" in line:
                break
        assert second.poll() is None
        assert not (place / "artifacts" / stage).exists()
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert (place / "artifacts" / made).exists()
