"""Whether a process still runs, and the end of a stage whose DVC has ended."""

import os
import signal
import threading
import time

import psutil

_POLL_SECONDS = 0.5


def runs(pid: int) -> bool:
    """Whether a process of this number exists and has not ended."""
    try:
        return _runs(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def end_with_dvc() -> None:
    """Kill this process soon after the DVC that started it has ended; without a DVC, do nothing.

    A stage that runs on alone could mix its output with that of a second run.
    """
    if (stage := os.environ.get("DVC_STAGE")) is None:
        return
    dvc = next((process for process in psutil.Process().parents() if not _is_of(stage, process)), None)
    if dvc is not None:
        threading.Thread(target=_end_with, args=(dvc,), daemon=True).start()


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
