"""Stages in forks of this process, which has the imports, so that hundreds of runs take minutes."""

import hashlib
import inspect
import json
import os
import pkgutil
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import libprune
import stages
from libprune.pipeline import stage
from tests.support import tiny
from tests.support.preloaded import preloaded

ROOT = Path(__file__).parents[1]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
CODE = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Ended:
    """A run that has ended.

    Attributes:
        status: the exit status; the negative number of the signal that ended it.
        output: all that it and its own processes have printed.
        late: whether it was killed because its time was over.
    """

    status: int
    output: str
    late: bool = False


def forked(work: Callable[[], object], seconds: float = 20) -> Ended:
    """Run a function in a child process of a group of its own, and wait until nobody writes to its output any more."""
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        _child(work, write)
    os.close(write)
    end, output = time.monotonic() + seconds, b""
    while (left := end - time.monotonic()) > 0 and select.select([read], [], [], left)[0]:
        if not (piece := os.read(read, 1 << 16)):
            break
        output += piece
    os.close(read)
    late = left <= 0 or time.monotonic() >= end
    if late:
        os.killpg(pid, signal.SIGKILL)
    return Ended(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output.decode(errors="replace"), late)


def _child(work: Callable[[], object], write: int) -> None:
    os.setsid()
    for number in (1, 2):
        os.dup2(write, number)
    os.close(write)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    code = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            code = 120
        os._exit(code)


def run_stage(name: str, folder: Path) -> None:
    """Run a stage of the project in a folder as its command does, and end this process."""
    os.chdir(folder)
    sys.argv = [f"stages/{name}.py"]
    import_module(f"stages.{name}").app(args=[])


def made_by(name: str) -> list[str]:
    """The paths that a stage writes."""
    entries = [*PIPELINE[name].get("outs", []), *PIPELINE[name].get("metrics", []), *PIPELINE[name].get("plots", [])]
    return [entry if isinstance(entry, str) else str(next(iter(entry))) for entry in entries]


TIMED = ("latency", "recover", "export", "evaluate", "report")
"""Stages whose outputs hold measured times, or figures of them."""


def content(folder: Path, name: str) -> dict[str, str]:
    """The digests of what there is of a stage's outputs; of what evaluate measures those of the perplexities alone."""
    found = {}
    for out in made_by(name):
        place = folder / out
        for path in sorted(one for one in (place.rglob("*") if place.is_dir() else [place]) if one.is_file()):
            kept = path.read_bytes() if name not in TIMED else _timeless(name, path)
            found[str(path.relative_to(folder))] = hashlib.sha256(kept).hexdigest()
    return found


def _timeless(name: str, path: Path) -> bytes:
    if name != "evaluate" or path.suffix != ".json":
        return b""
    data = json.loads(path.read_text())
    return json.dumps([data.get(key, {}).get("perplexity") for key in ("dense", "pruned")]).encode()


@contextmanager
def ready(preloading: Path | None = None) -> Iterator[Path]:
    """A folder for passing files, in a process that has imported all of libprune and proves models in a fork.

    `preloading` is a `python` of `tests.support.preloaded` that there is already; without it one is started.
    """
    torch.set_num_threads(1)
    stage.quiet()
    disable_progress_bar()
    set_verbosity_error()
    for package in (libprune, stages):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)
    own = sys.executable
    with TemporaryDirectory() as temporary:
        python = preloading or Path(temporary) / "python"
        with nullcontext() if preloading else preloaded(python, os.environ | CODE):
            sys.executable = str(python)
            try:
                yield Path(temporary)
            finally:
                sys.executable = own


def project(folder: Path, last: str = "report") -> Path:
    """A tiny project whose stages have run, up to the last one."""
    folder.mkdir(exist_ok=True)
    text = tiny.write_text(folder / "text.txt", documents=120)
    small = {"tokens": 64, "method": "full"}
    tiny.write_params(folder / "params.yaml", str(tiny.write_model(folder / "model")), str(text), recover=small)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name in PIPELINE:
            main = import_module(f"stages.{name}").main
            main(*(parameter.default for parameter in inspect.signature(main).parameters.values()))
            if name == last:
                break
    finally:
        os.chdir(before)
    return folder
