"""Whether a process still runs, and the end of processes whose parent has ended: stages of DVC, and those of stages."""

import _thread
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import psutil

_POLL_SECONDS = 0.5

END_WITH_PARENT = """
import os, threading
threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
"""
"""The beginning of a Python program that `run_bound` starts: it ends when its input does."""


def environment() -> dict[str, str]:
    """The variables of a command, by which `python` is the Python that runs now, also where it is not activated."""
    own = str(Path(sys.executable).parent)
    path = os.pathsep.join([own, os.environ.get("PATH", os.defpath)])
    return os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"}


def runs(pid: int) -> bool:
    """Whether a process of this number exists and has not ended."""
    try:
        return _runs(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def in_background(work: Callable[[], object]) -> None:
    """Run a function in a thread that ends with this process.

    `threading.Thread.start` waits for the thread to begin, and so for ever for one that finds no memory to do so.
    """
    _thread.start_new_thread(work, ())


def run_bound(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program that begins with `END_WITH_PARENT` to its end, which comes soon after that of this process.

    Args:
        command: the program and its arguments.
        options: those of `subprocess.run`.

    Returns:
        The ended process, with its output as text.
    """
    read, write = os.pipe()  # which closes with this process, however that ends
    try:
        return subprocess.run(command, stdin=read, capture_output=True, text=True, check=False, **options)
    finally:
        os.close(read)
        os.close(write)


@cache
def dvc_of() -> psutil.Process | None:
    """The DVC that started this process, whatever stands between them; None if none did.

    Where that DVC has ended, it is the process that the system has made the parent of its orphans.
    """
    if (stage := os.environ.get("DVC_STAGE")) is None:
        return None
    return next((process for process in psutil.Process().parents() if not _is_of(stage, process)), None)


def end_with_dvc() -> None:
    """Kill this process soon after the DVC that started it has ended; without a DVC, do nothing.

    A stage that runs on alone could mix its output with that of a second run. If DVC has ended while this process
    began, so does this process.
    """
    if (dvc := dvc_of()) is None:
        return
    if _adopts(dvc):
        os.kill(os.getpid(), signal.SIGKILL)
    in_background(lambda: _end_with(dvc))


def _adopts(process: psutil.Process) -> bool:
    """Whether a process has become the parent of this one by the end of DVC, which then holds no lock any more."""
    if process.pid != 1 and process.name() != "systemd":
        return False
    try:
        locks = json.loads(Path(os.environ["DVC_ROOT"], ".dvc/tmp/rwlock").read_text())
        return not any(runs(holder["pid"]) for holder in locks["write"].values())
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _is_of(stage: str, process: psutil.Process) -> bool:
    """Whether a process belongs to the stage's command, as a shell or a launcher does: DVC names the stage to them."""
    try:
        return bool(process.environ().get("DVC_STAGE") == stage)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def _end_with(process: psutil.Process) -> None:
    while _runs(process):
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _runs(process: psutil.Process) -> bool:
    try:
        # A container may have nobody who takes note of an orphan's end: it stays in the table as a zombie.
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
