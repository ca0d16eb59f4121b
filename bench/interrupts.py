"""Kills `dvc repro` of a tiny project at random moments, and checks that the same command goes on, with no help.

    python -m bench.interrupts --kills 200 --seed 0

SIGINT, SIGTERM or SIGKILL hits DVC, the stage at work, or their whole group, up to four seconds after the start. A
second later the same command runs, and may be hit too, until one comes to its end. Checked: no command fails that was
not hit; all outputs have the bytes of a run that nothing disturbed; no process, no half-written file and no temporary
folder is left. DVC and the stages are forks, which saves the imports; what identifies a process to others, its command
line and its environment, is that of the real programs.
"""

import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import psutil
import typer
from dvc.cli import main as dvc_main
from dvc.commands import repro as _repro  # noqa: F401 (imported here once, and not in every fork)
from dvc.stage import run as dvc_run

from bench.forks import CODE, PIPELINE, ROOT, content, ready, run_stage
from libprune.pipeline.atomic import remove
from libprune.pipeline.locks import leftovers, mend, running
from tests.support import tiny

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
AIMS = ("dvc", "stage", "group")
LATEST, PAUSE, SECONDS = 4.0, 1.0, 120
MADE = ("artifacts", "metrics", "report", "logs", ".work", ".dvc/cache", "dvc.lock")
_ARGUMENTS, _ENVIRONMENT = 47, 49


def name_as(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Let other processes see the command line and the environment that a program of its own would have."""
    stat = [
        int(word) if word.isdigit() else 0 for word in Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ]
    values = (words, [f"{key}={value}" for key, value in environment.items() if key.startswith("DVC_")])
    for index, texts in zip((_ARGUMENTS - 2, _ENVIRONMENT - 2), values, strict=True):
        start, end = stat[index : index + 2]
        held = b"".join(text.encode() + b"\0" for text in texts)
        assert len(held) <= end - start, f"{texts} has no place in {end - start} bytes"
        ctypes.memmove(start, held.ljust(end - start, b"\0"), end - start)


class StageFork:
    """Stands in for `subprocess.Popen` where DVC starts a stage: a fork in place of a new Python."""

    def __init__(self, command: Sequence[str], cwd: str, env: dict[str, str], **_: Any) -> None:
        self.returncode: int | None = None
        words = command[-1].split()
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid:
            return
        code = 1
        try:
            os.closerange(3, 256)
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.clear()
            os.environ.update(env)
            name_as(words[words.index("python") :], env)
            run_stage(words[-1].removeprefix("stages."), Path(cwd))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(code)

    def communicate(self) -> None:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def repro(folder: Path, log: Path, targets: Sequence[str]) -> int:
    """Start `dvc repro`, of all stages or of some, in a group of its own; the number of the process."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(folder)
        name_as(["python", "-m", "dvc", "repro"], {})
        dvc_run.subprocess = SimpleNamespace(Popen=StageFork)
        code = dvc_main(["repro", *targets])
    except KeyboardInterrupt:
        code = 130
    finally:
        sys.stdout.flush()
        os._exit(code)


def aim(pid: int, kind: str, number: int) -> None:
    """Send a signal to DVC, to its stage, or to their group; where no stage is at work, to DVC."""
    with suppress(ProcessLookupError, psutil.NoSuchProcess):
        if kind == "group":
            os.killpg(pid, number)
            return
        stages = psutil.Process(pid).children() if kind == "stage" else []
        os.kill(stages[0].pid if stages else pid, number)


def wait(pid: int, end: float) -> int | None:
    """The status of a process that ends before a time; None if it does not."""
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def whole(folder: Path, log: Path, targets: Sequence[str]) -> dict[str, str]:
    """The digests of all outputs, of which what a killed run may leave is removed first."""
    for name in MADE:
        remove(folder / name)
    pid = repro(folder, log, targets)
    if wait(pid, time.monotonic() + SECONDS):
        raise SystemExit(f"dvc repro failed: {log.read_text()[-2000:]}")
    return outputs(folder)


def outputs(folder: Path) -> dict[str, str]:
    return {path: digest for name in PIPELINE for path, digest in content(folder, name).items()}


def left_behind(folder: Path) -> list[str]:
    """What stays of killed runs when one has come to its end: processes, half-written files, folders, locks."""
    end = time.monotonic() + 20
    found: list[str] = []
    while time.monotonic() < end:
        found = [f"process {pid}" for pid in running(folder)]
        found += [str(path) for path in (*leftovers(folder), *folder.rglob(".*.partial"))]
        found += [str(path) for path in folder.glob(".dvc/tmp/libprune-*.lock")]
        if not found:
            break
        time.sleep(0.1)
    return found


UNREADABLE = "Unable to read RWLock-file"
"""What DVC says if it was killed in the middle of writing its locks, and nobody has mended them yet."""


def _mended(folder: Path) -> str:
    """Wait a while for the watcher of the killed run; where there is none, do what any command of libprune does."""
    lock, end = folder / ".dvc/tmp/rwlock", time.monotonic() + 10
    while time.monotonic() < end:
        if not lock.exists() or lock.stat().st_size:
            return "went on at the second try, a moment later"
        time.sleep(0.1)
    return "went on after a command of libprune" if mend(folder) else "did not go on"


def interrupt(
    folder: Path,
    log: Path,
    kills: int,
    seed: int,
    targets: Sequence[str] = (),
    latest: float = LATEST,
    minutes: float = 60,
) -> tuple[Counter[str], list[str]]:
    """Kill runs until there were enough; what was hit, and what does not hold."""
    expected = whole(folder, log, targets)
    rng, counted, broken = random.Random(seed), Counter[str](), []
    end = time.monotonic() + 60 * minutes
    while counted["kills"] < kills and time.monotonic() < end:
        for name in MADE:
            remove(folder / name)
        counted["projects"] += 1
        while True:
            pid, kind, number = repro(folder, log, targets), rng.choice(AIMS), rng.choice(SIGNALS)
            enough = counted["kills"] >= kills or time.monotonic() > end
            status = wait(pid, time.monotonic() + (SECONDS if enough else rng.uniform(0, latest)))
            hit = status is None
            if hit:
                aim(pid, kind, number)
                counted.update(["kills", f"{kind}, {signal.Signals(number).name}"])
                status = wait(pid, time.monotonic() + SECONDS)
            said = log.read_text()
            if status is None:
                broken.append(f"{kind} {number}: runs on after {SECONDS} s")
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if status and not hit and UNREADABLE in said:
                counted[_mended(folder)] += 1
                continue
            if status and not hit:
                broken.append(f"fails with {status} after kill {counted['kills']}: {said[-1500:]}")
            if hit and number != signal.SIGKILL and "Traceback (most recent call last)" in said:
                counted["tracebacks"] += 1
            counted["went on from a saved state"] += "continues from a saved state" in said
            if status == 0 or (status and not hit):
                break
            time.sleep(PAUSE)
        if status == 0 and (found := outputs(folder)) != expected:
            differ = sorted(path for path in expected | found if expected.get(path) != found.get(path))
            broken.append(f"other bytes after kill {counted['kills']}: {', '.join(differ[:5])}")
        broken += [f"left behind: {what}" for what in left_behind(folder)]
    return counted, broken


def project(folder: Path) -> Path:
    """A tiny project of DVC, in which nothing has run."""
    folder.mkdir()
    for name in ("libprune", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copyfile(ROOT / name, folder / name)
    text = tiny.write_text(folder / "text.txt", documents=120)
    tiny.write_params(
        folder / "params.yaml", str(tiny.write_model(folder / "model")), str(text), compute={"batch_tokens": 16}
    )
    if dvc_main(["--cd", str(folder), "init", "--no-scm", "-q"]):
        raise SystemExit("dvc init failed")
    return folder


def main(
    kills: Annotated[int, typer.Option(help="Kills altogether.")] = 200,
    seed: int = 0,
    target: Annotated[list[str] | None, typer.Option(help="Stages that `dvc repro` is to reach; none: all.")] = None,
    minutes: Annotated[float, typer.Option(help="No new project is begun later.")] = 60,
    latest: Annotated[float, typer.Option(help="Seconds from the start up to the latest hit.")] = LATEST,
    python: Annotated[Path | None, typer.Option(help="One of tests.support.preloaded that runs already.")] = None,
    again: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Kill, and print what held."""
    if not again:  # with a command line that has place for those of the forks
        words = [sys.executable, "-m", "bench.interrupts", "--again", "--kills", f"{kills:060d}", "--seed", str(seed)]
        words += ["--latest", str(latest), "--minutes", str(minutes)]
        words += [word for name in target or () for word in ("--target", name)]
        words += ["--python", str(python)] if python else []
        settings = {"DVC_NO_ANALYTICS": "1", "LIBPRUNE_CHECKPOINT_SECONDS": "0", "SHELL": "/bin/sh"} | CODE
        raise SystemExit(subprocess.run(words, env=os.environ | settings).returncode)
    start = time.perf_counter()
    with ready(python) as root, tempfile.NamedTemporaryFile() as log:
        counted, broken = interrupt(
            project(root / "project"), Path(log.name), kills, seed, target or (), latest, minutes
        )
    print(*(f"{name:28} {number}" for name, number in sorted(counted.items())), sep="\n")
    print(*broken[:20], sep="\n")
    print(f"{len(broken)} broken, {time.perf_counter() - start:.0f} s")
    raise SystemExit(int(bool(broken)))


if __name__ == "__main__":
    typer.run(main)
