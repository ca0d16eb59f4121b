"""Whether a process still runs, and the end of processes that others have left.

These are stages whose DVC has ended, processes whose stage has, and those of a stage of which another one has failed.
"""

import _thread
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

_POLL_SECONDS = 0.5

_WAIT = """
import json, os, queue, sys, threading
sys.modules["libprune"] = None
given = queue.SimpleQueue()
def listen():
    line = b""
    while not line.endswith(b"\\n"):
        line += os.read(0, 1 << 16) or os._exit(1)
    given.put(json.loads(line))
    os.read(0, 1) or os._exit(1)
threading.Thread(target=listen, daemon=True).start()
import torch
import transformers.modeling_utils
program, *sys.argv[1:] = given.get()
exec(program)
"""


def environment() -> dict[str, str]:
    """The variables of a command, by which `python` is the Python that runs now, also where it is not activated."""
    own = str(Path(sys.executable).parent)
    path = os.pathsep.join([own, os.environ.get("PATH", os.defpath)])
    return os.environ | {"PATH": path, "DVC_NO_ANALYTICS": "1"}


def isolated(program: str, *arguments: str) -> list[str]:
    """The command of a Python that finds the packages of this one, and is deaf to variables and to its own folder.

    Its option for that alone would leave out packages that the user has installed for himself, or that `PYTHONPATH`
    names.

    Args:
        program: the text of a Python program.
        arguments: what it finds in `sys.argv[1:]`.
    """
    places = json.dumps([str(Path(place).absolute()) for place in sys.path if place])
    return [sys.executable, "-I", "-c", _FINDING + program, places, *arguments]


_FINDING = "import json, sys\nsys.path += json.loads(sys.argv.pop(1))\n"


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


class FreshPython:
    """A new process that cannot import libprune and has no network; it loads PyTorch and transformers, and then waits.

    It ends soon after the process that started it, however that ends.

    Attributes:
        folder: an empty folder, in which the process runs; programs and results can be passed there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._errors = folder / "errors.txt"
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder)}
        streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(isolated(_WAIT), stderr=errors, cwd=folder, env=offline, **streams)

    def run(self, program: str, arguments: Sequence[str]) -> str | None:
        """Run a program to its end; the process runs no other one after it.

        Args:
            program: the text of a Python program.
            arguments: what it finds in `sys.argv[1:]`.

        Returns:
            Why it failed: the last line of what it printed to standard error, or the signal that ended it; else None.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has failed before, and has said why
            self._process.stdin.write(json.dumps([program, *arguments]) + "\n")
            self._process.stdin.flush()
        if (code := self._process.wait()) == 0:
            return None
        if code < 0:
            short = ", as the system does where memory is short" if -code == signal.SIGKILL else ""
            return f"its process was ended by {signal.Signals(-code).name}{short}"
        return (self._errors.read_text().strip() or "no message").splitlines()[-1]

    def close(self) -> None:
        """End the process, if it runs yet."""
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()


@contextmanager
def fresh_python() -> Iterator[FreshPython]:
    """Start a `FreshPython`, which loads what it needs while this process goes on, and end it with the block."""
    from libprune.pipeline.atomic import scratch_folder  # which asks this module whether processes run

    with scratch_folder() as folder:
        python = FreshPython(folder)
        try:
            yield python
        finally:
            python.close()


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


_FAILED = "libprune/failed"
"""The key under which a process of a stage that has failed says so to the others."""
_LEAVE_SECONDS = 3.0
"""How long a process stays after another one has failed, so that a launcher sees that one end first."""
_LOST = ("Connection closed by peer", "Connection reset by peer")
"""What gloo says where another process has ended."""


class _Others:
    """The other processes of this stage, as far as this process knows of them.

    Attributes:
        store: where all processes can write and read; None for a process that is alone.
        rank: number of this process.
        failed: whether another one has said that it failed.
    """

    store: Any = None
    rank = 0
    failed = False


def end_with_others(store: Any, rank: int) -> None:
    """End this process soon after another one of its stage has failed, where it would wait for that one.

    Args:
        store: that of `torch.distributed`, which all processes share.
        rank: number of this process.
    """
    _Others.store, _Others.rank = store.clone(), rank
    own = store.clone()  # each call waits for the others of the same client
    in_background(lambda: _end_with_others(own, rank))


def leave_others() -> None:
    """Go on without the other processes of this stage: its work is done, and they may end before this one."""
    _Others.store = None


def _end_with_others(store: Any, rank: int) -> None:
    try:
        while _Others.store is not None and not store.check([_FAILED]):
            time.sleep(_POLL_SECONDS)
        if _Others.store is None:
            return
        other, place, said = json.loads(store.get(_FAILED))
    except RuntimeError:  # the process that holds the store has ended
        return
    if other == rank:
        return
    _Others.failed = True
    told = f"error: process {other} of this stage, on {place}, has failed, so process {rank} ends: {said}"
    print(told, file=sys.stderr)
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    time.sleep(_LEAVE_SECONDS)
    os._exit(1)


def tell_others(said: str) -> None:
    """Tell the other processes of this stage that this one has failed, and leave them the time to hear it.

    Args:
        said: why, in one line.
    """
    if _Others.store is None or _Others.failed:
        return
    with suppress(RuntimeError):
        _Others.store.compare_set(_FAILED, "", json.dumps([_Others.rank, socket.gethostname(), said]))
        time.sleep(2 * _POLL_SECONDS)  # the store may end with this process


def left_by_others(error: Exception) -> str | None:
    """What to say of an error that arose because another process of this stage has ended; None for any other error.

    It is empty where that process has told why.
    """
    if _Others.store is None:
        return None
    if _Others.failed:
        return ""
    if isinstance(error, RuntimeError) and any(said in str(error) for said in _LOST):
        return "another process of this stage has ended without a word, as where memory is short; see what it printed"
    return None
