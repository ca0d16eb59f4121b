"""What a run leaves behind when it is killed, and its removal once nothing runs: DVC's lock file, half-written folders.

DVC rewrites `.dvc/tmp/rwlock` in place, before and after every stage. Killed in between, it leaves the file empty, and
every later command of DVC fails to read it. DVC calls no code of this project before that, so that each run has a
watcher: a process of its own, started by the first stage, that waits for the end of DVC and then looks.
"""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path

import psutil

from libprune.pipeline.atomic import remove
from libprune.pipeline.processes import dvc_of, runs

_POLL_SECONDS, _LONGEST_SECONDS = 0.2, 60
_TMP = Path(".dvc/tmp")


def watch_dvc() -> None:
    """Start the watcher of the DVC that has started this process, unless it has one; without a DVC, do nothing."""
    dvc, root = dvc_of(), os.environ.get("DVC_ROOT")
    if dvc is None or root is None or not Path(root, _TMP).is_dir():
        return
    environment = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "libprune.pipeline.locks", root, str(dvc.pid)]
    nowhere = subprocess.DEVNULL
    with suppress(OSError):  # where no process can be started, the stage will say so itself
        subprocess.Popen(
            command, stdin=nowhere, stdout=nowhere, stderr=nowhere, cwd="/", env=environment, start_new_session=True
        )


def _watch(root: Path, pid: int) -> None:
    """Wait until a process has ended, then clear up after it; at once if another watcher does so already."""
    name = root / _TMP / f"libprune-{pid}.lock"
    with _held(name) as held:
        if held:
            while runs(pid):
                time.sleep(_POLL_SECONDS)
            end = time.monotonic() + _LONGEST_SECONDS
            while not _readable(root / _TMP / "rwlock") and not mend_lock(root) and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)  # until its stage has ended too
            clear_up(root)
            name.unlink(missing_ok=True)


def clear_up(root: Path) -> list[Path]:
    """Remove what killed runs have left in a project; return what was removed. What still runs keeps what it has.

    Args:
        root: the project's folder.
    """
    return [path for path in leftovers(root) if _removed(path)] + mend_lock(root)


def mend_lock(root: Path) -> list[Path]:
    """Remove DVC's lock file if it cannot be read and nothing runs that may stand in it; return what was removed."""
    lock = root / _TMP / "rwlock"
    with _held(root / _TMP / "rwlock.lock") as held:  # which DVC holds while it reads or writes the other
        if not held or _readable(lock) or running(root, began_before=lock.stat().st_mtime):
            return []
        lock.unlink()
        return [lock]


def running(root: Path, began_before: float = inf) -> list[int]:
    """The numbers of the processes of DVC and of stages that run in a project, this one left out.

    Args:
        root: the project's folder.
        began_before: seconds since the epoch; processes that began later are left out.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            words = [Path(word).name for word in process.cmdline()[:4]]
            of_dvc = "dvc" in words[:3] and "daemon" not in words  # a daemon asks for news of DVC, and runs nothing
            called = of_dvc and process.cwd() is not None and Path(process.cwd()).is_relative_to(root.resolve())
            stage = "DVC_STAGE" in (variables := process.environ()) and variables.get("DVC_ROOT") == str(root.resolve())
            others = process.pid != os.getpid() and process.create_time() < began_before
            if (called or stage) and others and runs(process.pid):
                found.append(process.pid)
    return found


def leftovers(root: Path) -> Iterator[Path]:
    """Half-written files and folders of processes that have ended, of the project and in the place for scratch."""
    for place in (root, root / "artifacts", root / "artifacts/tokens", root / "metrics", root / "report"):
        for path in place.glob(".*.partial"):
            number = path.name.split(".")[-2]
            if number.isdecimal() and not runs(int(number)):
                yield path
    for path in Path(tempfile.gettempdir()).glob("libprune-*-*"):
        number = path.name.split("-")[1]
        if number.isdecimal() and not runs(int(number)) and path.stat().st_uid == os.getuid():
            yield path


def _removed(path: Path) -> bool:
    with suppress(OSError):
        remove(path)
    return not path.exists()


def _readable(lock: Path) -> bool:
    """Whether a lock file is missing, or holds what DVC can read."""
    try:
        content = json.loads(lock.read_text())
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    return isinstance(content, dict)


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Hold a lock inside the context; the value is False if another process holds it, or it has no folder."""
    try:
        file = path.open("a")
    except FileNotFoundError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


if __name__ == "__main__":
    _watch(Path(sys.argv[1]), int(sys.argv[2]))
