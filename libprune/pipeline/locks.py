"""What a run leaves behind when it is killed, and its removal once nothing runs: DVC's files, half-written folders.

DVC rewrites `.dvc/tmp/rwlock` and `dvc.lock` in place, before and after every stage. Killed in between, it leaves such
a file empty or cut off, and every later command of DVC fails to read it. DVC calls no code of this project before that,
so that each run has a watcher: a process of its own, started by the first stage, that waits for the end of DVC and then
looks. Meanwhile it keeps a copy of `dvc.lock`.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path

import psutil
import yaml

from libprune.engine.errors import LibpruneError
from libprune.pipeline.atomic import HERE, left_unfinished, remove, writing
from libprune.pipeline.processes import dvc_of, runs

_POLL_SECONDS, _LONGEST_SECONDS = 0.2, 60
_TMP = Path(".dvc/tmp")
RECORD, _COPY = "dvc.lock", Path(".dvc/tmp/libprune/dvc.lock")
UNREADABLE = _COPY.with_name("dvc.lock.unreadable")
"""Where a `dvc.lock` that could not be read is kept, below the folder of a project."""


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
                _keep_record(root)
                time.sleep(_POLL_SECONDS)
            end = time.monotonic() + _LONGEST_SECONDS
            while _broken(root) and not mend(root) and time.monotonic() < end:
                time.sleep(_POLL_SECONDS)  # until its stage has ended too
            clear_up(root)
            name.unlink(missing_ok=True)


def clear_up(root: Path) -> list[Path]:
    """Remove what killed runs have left in a project; return what was removed. What still runs keeps what it has.

    Args:
        root: the project's folder.
    """
    return [path for path in leftovers(root) if _removed(path)] + mend(root)


def mend(root: Path) -> list[Path]:
    """Mend files of DVC that cannot be read, if nothing runs that may write them; return those that were mended.

    The file of locks is removed. `dvc.lock` becomes what it last was, or goes where that is not known: DVC then finds
    in its cache what was made. What it held is kept beside its copy, as `dvc.lock.unreadable`: a person may have
    written it. With the marks of a merge it is left to that person.

    Args:
        root: the project's folder.
    """
    with _held(root / _TMP / "rwlock.lock") as held:  # which DVC holds while it reads or writes the locks
        broken = _broken(root) if held else []
        if not broken or running(root, began_before=max(path.stat().st_mtime for path in broken)):
            return []
        for path in broken:
            if path.name != RECORD:
                path.unlink()
                continue
            kept = root / UNREADABLE
            kept.parent.mkdir(parents=True, exist_ok=True)
            path.replace(kept)
            if _whole(root / _COPY):
                shutil.copyfile(root / _COPY, path)
        return broken


def _broken(root: Path) -> list[Path]:
    """The files of DVC that are there and cannot be read, but for a merge."""
    lock, record = root / _TMP / "rwlock", root / RECORD
    good = {lock: _readable(lock), record: _whole(record) or _merged(record)}
    return [path for path in good if not good[path] and path.exists()]


def _merged(record: Path) -> bool:
    """Whether a file has the marks that git leaves where both sides of a merge changed it."""
    try:
        return any(line.startswith(b"<<<<<<< ") for line in record.read_bytes().splitlines())
    except OSError:
        return False


def _keep_record(root: Path) -> None:
    """Keep a copy of `dvc.lock`, if it has changed and is whole."""
    record, copy = root / RECORD, root / _COPY
    with suppress(OSError, LibpruneError):
        if not copy.exists() or copy.stat().st_mtime_ns < record.stat().st_mtime_ns:
            content = record.read_bytes()
            if _whole(record) and content == record.read_bytes():
                with writing(copy) as partial:
                    partial.write_bytes(content)


def _whole(record: Path) -> bool:
    """Whether a file can be read as `dvc.lock`, with all of its stages."""
    try:
        text = record.read_text()
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the same, and ten times as fast
    except (OSError, ValueError, yaml.YAMLError):
        return False
    known = isinstance(content, dict) and "schema" in content and isinstance(content.get("stages", {}), dict)
    return known and text.endswith("\n")


def running(root: Path, began_before: float = inf) -> list[int]:
    """The numbers of the processes of DVC and of stages that run in a project, this one left out.

    Args:
        root: the project's folder.
        began_before: seconds since the epoch; processes that began later are left out.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            of_dvc = "dvc" in _words(process) and not any(map(_asks_for_news, (process, *process.children())))
            called = of_dvc and process.cwd() is not None and Path(process.cwd()).is_relative_to(root.resolve())
            stage = "DVC_STAGE" in (variables := process.environ()) and variables.get("DVC_ROOT") == str(root.resolve())
            others = process.pid != os.getpid() and process.create_time() < began_before
            if (called or stage) and others and runs(process.pid):
                found.append(process.pid)
    return found


def _words(process: psutil.Process) -> list[str]:
    words = [Path(word).name for word in process.cmdline()[:4]]
    return words[2:] if words[1:2] == ["-c"] else words[:3]  # a program in a word, then the name that it goes by


def _asks_for_news(process: psutil.Process) -> bool:
    """Whether it is the daemon that DVC leaves behind for its own purposes; a fork of DVC waits for it."""
    return "daemon" in process.cmdline()[:4]


def leftovers(root: Path) -> Iterator[Path]:
    """Half-written files and folders of processes that have ended, of the project and in the place for scratch."""
    for place in (root, root / "artifacts", root / "artifacts/tokens", root / "metrics", root / "report"):
        yield from left_unfinished(place)
    for path in Path(tempfile.gettempdir()).glob(f"libprune-{HERE}-*-*"):
        number = path.name.split("-")[2]
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
