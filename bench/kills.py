"""Kills every collecting stage at random moments, and checks that the next run finishes it bit by bit the same.

    python -m bench.kills --kills 100                    the tiny model of the tests, all collecting stages
    python -m bench.kills --root FOLDER --stage gradients --kills 3    params.yaml and artifacts/ of a project

For each kill the artifact is deleted, the stage starts, SIGKILL hits it after a random share of the time
that a whole run takes, and the stage runs once more to its end. Checked: what the kill left is nothing
or the whole artifact; the second run gives the bytes of the run that nothing interrupted; and a saved
state, where there was one, was used. Stages run in forks of this process, to save the imports.
"""

import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml

from libprune.pipeline.atomic import remove
from tests.support import tiny

COLLECTING = ("gradients", "hessian", "activations", "ablation")
TARGETS = dict.fromkeys(COLLECTING[:3], "artifacts/{}") | {"ablation": "artifacts/{}.parquet"}


def fork(work: Callable[[], None], log: Path) -> int:
    """Run a function in a child process with its output in a file; returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            work()
            sys.stdout.flush()
        code = 0
    finally:
        os._exit(code)


def run(stage: str, log: Path) -> int:
    """Start a stage in a child process."""
    return fork(lambda: import_module(f"stages.{stage}").main(Path("params.yaml"), Path("artifacts")), log)


def finish(stage: str, log: Path) -> float:
    """Run a stage to its end; seconds."""
    start = time.perf_counter()
    _, status = os.waitpid(run(stage, log), 0)
    if status != 0:
        raise SystemExit(f"{stage} failed: {log.read_text()}")
    return time.perf_counter() - start


def digest(target: Path) -> str:
    """Digest of a file or of all files of a folder."""
    total = hashlib.sha256()
    for path in sorted(target.rglob("*")) if target.is_dir() else [target]:
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def try_stage(stage: str, kills: int, rng: random.Random, log: Path) -> str:
    """Kill a stage many times; a line that says what was found."""
    target = Path(TARGETS[stage].format(stage))
    remove(target)
    whole = finish(stage, log)
    expected = digest(target)
    hits = saved = continued = complete = 0
    for _ in range(kills):
        remove(target)
        pid = run(stage, log)
        time.sleep(rng.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        hits += os.waitpid(pid, 0)[1] == signal.SIGKILL
        if target.exists():
            complete += 1
            assert digest(target) == expected, f"{stage}: a kill left a different artifact"
        states = list(Path(".work", stage).glob("*/process-*/after-*"))
        saved += bool(states)
        finish(stage, log)
        continued += "continues from a saved state" in log.read_text()
        assert digest(target) == expected, f"{stage}: the artifact after a kill differs"
        assert not list(Path("artifacts").glob(".*")), f"{stage}: something half-written is left"
    assert continued == saved, f"{stage}: {saved} saved states, {continued} continued"
    return (
        f"{stage:12} {kills:5} kills, {hits:5} hit, {continued:5} continued, {complete:3} after the artifact was whole"
    )


def tiny_project(folder: Path) -> None:
    """The tests' tiny model and text, cut into many batches."""
    params = tiny.write_params(
        folder / "params.yaml",
        str(tiny.write_model(folder / "model")),
        str(tiny.write_text(folder / "text.txt")),
        compute={"batch_tokens": 16},
        gradients={"sequences": 8, "batch_sequences": 1},
        hessian={"sequences": 8},
        ablation={"units": 12, "sequences": 4},
    )
    assert yaml.safe_load(params.read_text())


def main(
    root: Annotated[Path | None, typer.Option(help="A project with its artifacts; none: a tiny one is made.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Stages; none: all collecting ones.")] = None,
    kills: int = 100,
    seed: int = 0,
    checkpoint_seconds: int = 0,
) -> None:
    """Kill and check."""
    torch.set_num_threads(1)
    os.environ["LIBPRUNE_CHECKPOINT_SECONDS"] = str(checkpoint_seconds)
    with tempfile.TemporaryDirectory() as temporary:
        folder, log = root or Path(temporary), Path(temporary) / "log.txt"
        if root is None:
            tiny_project(folder)
        os.chdir(folder)
        if root is None:
            for first in ("prepare", "tokenize"):
                finish(first, log)
        rng = random.Random(seed)
        for name in stage or COLLECTING:
            import_module(f"stages.{name}")
            print(try_stage(name, kills, rng, log), flush=True)


if __name__ == "__main__":
    typer.run(main)
