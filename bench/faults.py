"""Takes from every stage what a machine may lack, at random, and checks how it ends and that it goes on afterwards.

    python -m bench.faults --tries 200 --seed 0

For each try the outputs of a stage are removed, the stage runs under a fault, and then once more without it. Held is a
fault under which the stage makes the same bytes, or ends in one line that says that nothing was lost; nothing
half-written is left then, what is left is whole, and the second run makes the bytes of a run without any fault. The
faults: the size of a file, the number of open files and the memory are limited (`RLIMIT_FSIZE`, `RLIMIT_NOFILE`,
`RLIMIT_AS`), the folders belong to another user, no process can be started, and the disk of the artifacts is small.
The last three need root.
"""

import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bench.forks import PIPELINE, Ended, content, forked, made_by, project, ready, run_stage
from libprune.pipeline.atomic import remove

STAGES = ("prepare", "tokenize", "gradients", "activations", "score", "allocate", "slice", "evaluate")
NOBODY = 65534
SECONDS, ROOM = 30, 1 << 26
KEPT = "What was finished is kept"
Fault = Callable[[random.Random, Path], object]


def lower(what: int, limit: int) -> None:
    resource.setrlimit(what, (limit, limit))


def file_size(rng: random.Random, folder: Path) -> None:
    """Files may have no more than some bytes."""
    lower(resource.RLIMIT_FSIZE, int(2 ** rng.uniform(0, 19)))


def open_files(rng: random.Random, folder: Path) -> None:
    """No more than some files may be open."""
    lower(resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) + rng.randint(-1, 12))  # noqa: PTH208


def memory(rng: random.Random, folder: Path) -> None:
    """No more than some MB may be taken in addition."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    lower(resource.RLIMIT_AS, held + int(2 ** rng.uniform(10, 27)))


def read_only(rng: random.Random, folder: Path) -> None:
    """The files and folders belong to another user, and can only be read."""
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def processes(rng: random.Random, folder: Path) -> None:
    """Neither a thread nor a process can be started, by a user who may write."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    lower(resource.RLIMIT_NPROC, 0)
    read_only(rng, folder)


def small_disk(rng: random.Random, folder: Path) -> None:
    """The disk of the artifacts, a file system in memory, has little room left."""
    free = shutil.disk_usage(folder / "artifacts").free
    resize(folder, ROOM - free + int(2 ** rng.uniform(0, 19)))


def resize(folder: Path, size: int, kind: str = "remount,") -> None:
    options = f"{kind}size={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder / "artifacts"], check=True)


FAULTS: dict[str, Fault] = {
    "file size": file_size,
    "open files": open_files,
    "memory": memory,
    "read-only": read_only,
    "processes": processes,
    "small disk": small_disk,
}
ROOT_ALONE = ("read-only", "processes", "small disk")


def clear(folder: Path, name: str) -> None:
    for out in made_by(name):
        remove(folder / out)


def attempt(name: str, fault: Fault, folder: Path, whole: dict[str, str], rng: random.Random) -> tuple[str, list[str]]:
    """Run a stage under a fault, then without it; how the first ended, and what does not hold."""
    clear(folder, name)

    def work() -> None:
        fault(rng, folder)
        run_stage(name, folder)

    ended = forked(work, SECONDS)
    wrong = [*_of_end(ended)]
    left = content(folder, name)
    wrong += [f"{path} is not as it would be" for path, digest in left.items() if whole.get(path) != digest]
    wrong += [f"{path} is left" for path in folder.rglob(".*.partial")]
    if fault is small_disk:
        resize(folder, ROOM)
    again = forked(lambda: run_stage(name, folder), SECONDS)
    if again.status or content(folder, name) != whole:
        wrong.append(f"the next run ends with {again.status} and other bytes: {again.output[-300:]}")
    return "done" if not ended.status else "refused", wrong


def _of_end(ended: Ended) -> list[str]:
    lines = ended.output.strip().splitlines() or ["silence"]
    if ended.late:
        return [f"more than {SECONDS} s: {lines[-1][:300]}"]
    if ended.status == 0:
        return []
    errors = [line for line in lines if line.startswith("error: ")]
    if ended.status != 1 or "Traceback" in ended.output or len(errors) != 1 or KEPT not in errors[0]:
        return [f"status {ended.status}: {' / '.join(lines[-4:])[-700:]}"]
    return []


def faults(
    root: Path, tries: int, seed: int, kinds: list[str], names: list[str]
) -> dict[tuple[str, str], tuple[int, int, list[str]]]:
    """Try faults on stages by turns; by fault and stage how many were tried, how many were refused, what broke."""
    folder = root / "project"
    (folder / "artifacts").mkdir(parents=True)
    if "small disk" in kinds:
        resize(folder, ROOM, "")
    try:
        return _faults(folder, tries, seed, kinds, names)
    finally:
        if "small disk" in kinds:
            subprocess.run(["umount", folder / "artifacts"], check=True)


def _faults(
    folder: Path, tries: int, seed: int, kinds: list[str], names: list[str]
) -> dict[tuple[str, str], tuple[int, int, list[str]]]:
    project(folder, max(names, key=list(PIPELINE).index))
    whole = {name: content(folder, name) for name in names}
    found: dict[tuple[str, str], tuple[int, int, list[str]]] = {}
    for number in range(tries):
        kind, name = kinds[number % len(kinds)], names[number // len(kinds) % len(names)]
        rng = random.Random(f"{kind} {name} {seed} {number}")
        end, wrong = attempt(name, FAULTS[kind], folder, whole[name], rng)
        for path in (folder, *folder.rglob("*")) if kind == "processes" else ():
            os.chown(path, os.getuid(), os.getgid())
        tried, refused, broken = found.get((kind, name), (0, 0, []))
        broken += [f"{kind}, {name}, --seed {seed}, try {number}: {one}" for one in wrong]
        found[kind, name] = (tried + 1, refused + (end == "refused"), broken)
    return found


def possible(kinds: list[str]) -> list[str]:
    """The faults that can be made here; the others are named."""
    alone = os.getuid() != 0 or not shutil.which("mount")
    mounts = "unshare --mount mount -t tmpfs none /mnt"
    refused = alone or subprocess.run(mounts.split(), capture_output=True).returncode
    skipped = [kind for kind in kinds if (kind in ROOT_ALONE and alone) or (kind == "small disk" and refused)]
    for kind in skipped:
        print(f"skipped: {kind}, which this user or this machine cannot make")
    return [kind for kind in kinds if kind not in skipped]


def main(
    tries: Annotated[int, typer.Option(help="Tries altogether.")] = 480,
    seed: int = 0,
    fault: Annotated[list[str] | None, typer.Option(help="Faults; none: all.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Stages; none: all.")] = None,
) -> None:
    """Try, and print a table of what held."""
    start, failed = time.perf_counter(), False
    with ready() as root:
        root.chmod(0o755)
        kinds = possible(fault or list(FAULTS))
        found = faults(root, tries, seed, kinds, stage or list(STAGES))
        for kind in kinds:
            of_kind = [value for (one, _), value in found.items() if one == kind]
            tried, refused = (sum(value[index] for value in of_kind) for index in (0, 1))
            broken = [line for value in of_kind for line in value[2]]
            print(f"| {kind} | {tried} | {tried - len(broken)} | {refused} |")
            print(*broken[:40], sep="\n", end="\n" if broken else "", flush=True)
            failed = failed or bool(broken)
    print(f"{time.perf_counter() - start:.0f} s")
    raise SystemExit(int(failed))


if __name__ == "__main__":
    typer.run(main)
