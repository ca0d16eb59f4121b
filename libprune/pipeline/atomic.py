"""Atomic writes: files and folders appear whole or not at all.

Nothing is ever opened for writing in place: outputs may be hard links into a cache.
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from libprune.engine.errors import LibpruneError, MeansError, lacking
from libprune.pipeline.processes import runs

HERE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
"""Names this machine in the names of half-written files, since several machines may write to one file system."""


def left_unfinished(folder: Path, name: str = "*") -> Iterator[Path]:
    """What processes of this machine that have ended left half-written in a folder.

    Args:
        folder: the folder.
        name: of the file or folder that was written; by default of any.
    """
    for path in folder.glob(f".{name}.{HERE}.*.partial"):
        number = path.name.split(".")[-2]
        if number.isdecimal() and not runs(int(number)):
            yield path


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder at; it replaces `target` when the block ends without an error.

    Raises:
        LibpruneError: if a file was written, and the target is a folder.
        MeansError: where space, permission or memory lack, naming the target, and the bytes that are free.
    """
    partial = target.with_name(f".{target.name}.{HERE}.{os.getpid()}.partial")
    try:
        with _partial(target, partial):
            yield partial
    except LibpruneError:
        raise
    except Exception as error:
        if (lacks := lacking(error)) is None:
            raise
        raise MeansError(f"{target} cannot be written: {lacks}{_free(target)}") from error


@contextmanager
def _partial(target: Path, partial: Path) -> Iterator[None]:
    """Replace the target by what the block writes at another path; leave nothing there otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in left_unfinished(target.parent, target.name):  # a process that was killed cannot clear up
        remove(left)
    remove(partial)
    spare = [os.open(os.devnull, os.O_RDONLY) for _ in range(_SPARE)]
    try:
        yield
        _let_others_read(partial)
        if partial.is_dir():
            remove(target)
        elif target.is_dir() and not target.is_symlink():
            raise LibpruneError(f"{target} is a folder, and a file is to be written there; name another, or remove it")
        partial.replace(target)
    finally:
        for number in spare:
            os.close(number)
        remove(partial)


_SPARE = 3
"""Files that are held open while something is written: where no more can be opened, a folder cannot be removed."""


def _free(target: Path) -> str:
    """The bytes that are free where the target is to lie, as a part of a sentence; nothing if that cannot be asked."""
    folder = next(path for path in target.absolute().parents if path.is_dir())
    try:
        return f" ({shutil.disk_usage(folder).free:,} bytes are free in {folder})"
    except OSError:
        return ""


def _let_others_read(written: Path) -> None:
    """Give files the mode that files usually get here: safetensors writes some that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (written, *written.rglob("*")):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


@contextmanager
def writing_folder(target: Path) -> Iterator[Path]:
    """An empty folder to write files in; it replaces `target` when the block ends without an error."""
    with writing(target) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder for passing files, named by this process, so that it can be cleared away if that is killed."""
    with tempfile.TemporaryDirectory(prefix=f"libprune-{HERE}-{os.getpid()}-") as folder:
        yield Path(folder)


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with writing(target) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
