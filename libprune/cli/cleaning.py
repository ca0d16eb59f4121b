"""What a project and its caches hold that is no longer needed, how much it is, and its removal."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from libprune.engine.errors import LibpruneError
from libprune.pipeline.atomic import remove
from libprune.pipeline.locks import clear_up, leftovers, running

_GC = ("gc", "--workspace", "--all-commits", "--all-experiments")
"""The command of DVC that keeps what the workspace, a commit or an experiment refers to."""


@dataclass(frozen=True)
class Stock:
    """One kind of what can be freed.

    Attributes:
        name: as the command line names it.
        what: it is, and what is lost with it.
        paths: the files and folders; those of DVC's cache are known to DVC alone.
        free: removes it.
    """

    name: str
    what: str
    paths: list[Path]
    free: Callable[[], None]

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(map(_size, self.paths))


def stocks(root: Path) -> list[Stock]:
    """Everything that can be freed in a project and in the caches that it uses.

    Args:
        root: the project's folder.
    """
    work, sets = root / ".work", _data_sets()
    unfinished = sorted(work.iterdir()) if work.is_dir() else []
    cached = sorted(sets.iterdir()) if sets.is_dir() else []
    cache = [root / ".dvc/cache"] if (root / ".dvc/cache").is_dir() else []
    return [
        Stock("leftovers", "half-written files of killed runs", list(leftovers(root)), lambda: _clear(root)),
        Stock("work", "unfinished work, from which stopped stages go on", unfinished, lambda: _remove(unfinished)),
        Stock("datasets", f"texts prepared by `datasets`, of all projects ({sets})", cached, lambda: _remove(cached)),
        Stock("dvc", "DVC's cache; freed of what no commit and no experiment refers to", cache, lambda: _collect(root)),
    ]


def clean(root: Path, names: list[str]) -> Iterator[str]:
    """Say how much there is of everything; then free what is named, and say how much less there is.

    Args:
        root: the project's folder.
        names: of stocks; none: nothing is removed.

    Raises:
        LibpruneError: for an unknown name, while DVC or a stage runs here, or if DVC cannot collect.
    """
    there = stocks(root)
    known = [stock.name for stock in there]
    if unknown := [name for name in names if name not in known]:
        raise LibpruneError(f"{unknown[0]!r} is nothing to clean; name some of {', '.join(known)}")
    sizes = {stock.name: stock.size for stock in there}
    for stock in there:
        yield f"{stock.name:<10} {sizes[stock.name] / 1e6:>10,.1f} MB  {stock.what}"
    if not names:
        yield f"nothing was removed; name what is to go: libprune clean {' '.join(known)}"
        return
    if others := running(root):
        raise LibpruneError(f"DVC or a stage runs here (process {others[0]}); wait for its end, or stop it")
    for stock in there:
        if stock.name in names:
            stock.free()
            yield f"freed {stock.name}: {(sizes[stock.name] - stock.size) / 1e6:,.1f} MB"


def _size(path: Path) -> int:
    """Bytes of a file, or of the files of a folder; of hard links to elsewhere, too, which free nothing."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.lstat().st_size for file in files if file.is_file() or file.is_symlink())


def _data_sets() -> Path:
    """Where `datasets` keeps what it has prepared."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))
    return Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets"))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        remove(path)


def _clear(root: Path) -> None:
    clear_up(root)


def _collect(root: Path) -> None:
    command = [sys.executable, "-m", "dvc", *_GC, "--force"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise LibpruneError(f"dvc {' '.join(_GC)} failed: {last}")
