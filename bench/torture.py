"""Damages what users give, in thousands of seeded ways, and checks that each ends in one line and soon.

    python -m bench.torture --tries 1000 --seed 0

Held is an input that is used as it is, or refused by one line; not held is a traceback, or more than 20 seconds. The
kinds: params files, family files and comparison files (bytes and values), configs of models (values), headers of
safetensors files (bytes), as models, as models with masks and as files of masks, and the records of folders for check.
"""

import copy
import json
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from libprune.cli.main import app
from libprune.engine.errors import LibpruneError
from libprune.engine.family import FOLDER, load_family
from libprune.pipeline import stage
from tests.support import tiny

SECONDS = 20
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**9,
    10**24,
    1.5,
    float("nan"),
    "",
    "x",
    "\x1b[31m",
    [],
    [1],
    {},
    {"a": 1},
    "9" * 50,
]
"""What a value is replaced by."""
Attack = Callable[[Path, random.Random], list[str]]


def change(data: Any, rng: random.Random) -> Any:
    """Structured data with one value, somewhere, replaced, removed, or put under another key."""
    data = copy.deepcopy(data)
    place = data
    while isinstance(place, dict | list) and place:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        inner = place[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            if rng.random() < 0.2:
                place.pop(key)
            else:
                place[key] = rng.choice(VALUES)
            break
        place = inner
    return data


def scramble(content: bytes, rng: random.Random, end: int) -> bytes:
    """Bytes of which some before `end` are others, gone, or twice there."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(end, len(changed)))
        match rng.randrange(3):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                del changed[at : at + rng.randint(1, 9)]
            case _:
                changed[at:at] = changed[at : at + rng.randint(1, 99)] * rng.randint(1, 3)
    return bytes(changed)


def yaml_of(source: Path, target: Path, rng: random.Random) -> None:
    """A damaged copy of a YAML file."""
    if rng.random() < 0.5:
        target.write_bytes(scramble(source.read_bytes(), rng, 1 << 20))
    else:
        target.write_text(yaml.safe_dump(change(yaml.safe_load(source.read_text()), rng)))


def attack_params(place: Path, rng: random.Random) -> list[str]:
    """A damaged params file."""
    yaml_of(place / "params.yaml", place / "bad.yaml", rng)
    return ["params", "--params", str(place / "bad.yaml")]


def attack_comparison(place: Path, rng: random.Random) -> list[str]:
    """A damaged comparison file."""
    yaml_of(Path(__file__).parents[1] / "comparisons/classical.yaml", place / "bad.yaml", rng)
    return ["comparison", str(place / "bad.yaml"), str(place / "params.yaml")]


def attack_family(place: Path, rng: random.Random) -> list[str]:
    """A damaged family file."""
    yaml_of(FOLDER / "llama.yaml", place / "bad.yaml", rng)
    return ["family", str(place / "bad.yaml")]


def damaged_model(place: Path) -> Path:
    """A fresh copy of the model."""
    shutil.rmtree(place / "bad", ignore_errors=True)
    return shutil.copytree(place / "model", place / "bad")


def attack_config(place: Path, rng: random.Random) -> list[str]:
    """A config with another value."""
    path = damaged_model(place) / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()), rng)))
    return [rng.choice(["inspect", "dense"]), str(place / "bad")]


def attack_weights(place: Path, rng: random.Random) -> list[str]:
    """A damaged header of the weights."""
    path = damaged_model(place) / "model.safetensors"
    path.write_bytes(scramble(path.read_bytes(), rng, 2000))
    return rng.choice([["masks", "inspect", str(place / "bad")], ["dense", str(place / "bad")]])


def attack_masks(place: Path, rng: random.Random) -> list[str]:
    """A damaged header of a file of masks."""
    path = place / "masks.safetensors"
    save_file({"model.layers.0.mlp.up_proj.weight_mask": torch.ones(40, 48)}, path)
    path.write_bytes(scramble(path.read_bytes(), rng, 120))
    return ["masks", "inspect", str(place / "model"), "--masks", str(path)]


def attack_folder(place: Path, rng: random.Random) -> list[str]:
    """A damaged record of a pruned folder."""
    path = damaged_model(place) / "libprune.json"
    record: dict[str, Any] = {
        "plan": {"shape": "uniform", "model": "a" * 16},
        "slice": {"repair": "none"},
        "recovery": None,
    }
    record["files"] = {"config.json": {"bytes": 1, "sha256": "0" * 64}}
    path.write_text(json.dumps(change(record, rng)))
    return ["check", str(place / "bad")]


ATTACKS: dict[str, Attack] = {
    "params": attack_params,
    "comparison": attack_comparison,
    "family": attack_family,
    "config": attack_config,
    "weights": attack_weights,
    "masks": attack_masks,
    "folder": attack_folder,
}


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError inside the context when the time is over."""

    def over(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(words: list[str]) -> str:
    """Run a command: `used`, `refused`, or what is wrong with how it ended."""
    from libprune.experiments.file import read_comparison
    from libprune.models.source import load_dense
    from libprune.pipeline.sections import Prepare

    kinds: dict[str, Callable[[], object]] = {
        "comparison": lambda: read_comparison(Path(words[1]), Path(words[2])),
        "family": lambda: load_family(Path(words[1])),
        "dense": lambda: load_dense(Prepare(model=words[1])),
    }
    try:
        with at_most(SECONDS):
            if words[0] in kinds:
                kinds[words[0]]()
                return "used"
            done = CliRunner().invoke(app, words)
    except LibpruneError:
        return "refused"
    except (Exception, RecursionError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return f"{type(done.exception).__name__}: {str(done.exception)[:200]}"
    if "\x1b" in done.output:
        return "an escape sequence reaches the terminal"
    return "refused" if done.exit_code else "used"


def torture(kind: str, tries: int, seed: int, place: Path) -> tuple[int, list[str]]:
    """Attack by one kind; how many were tried, and how those ended that did not hold."""
    broken = []
    for number in range(tries):
        words = ATTACKS[kind](place, random.Random(f"{kind} {seed} {number}"))
        end = outcome(words)
        if end not in {"used", "refused"}:
            broken.append(f"{kind} --seed {seed}, try {number}: {end}")
    return tries, broken


def project(place: Path) -> Path:
    """A tiny model and params for it."""
    tiny.write_params(place / "params.yaml", str(tiny.write_model(place / "model")), "text.txt")
    return place


def main(
    tries: Annotated[int, typer.Option(help="Attacks of each kind.")] = 1000,
    seed: int = 0,
    kind: Annotated[list[str] | None, typer.Option(help="Kinds; none: all.")] = None,
) -> None:
    """Attack, and print a table of what held."""
    stage.quiet()
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        place = project(Path(temporary))
        for name in kind or ATTACKS:
            start = time.perf_counter()
            tried, broken = torture(name, tries, seed, place)
            print(f"| {name} | {tried:,} | {tried - len(broken):,} | {time.perf_counter() - start:.0f} s |", flush=True)
            print(*broken[:20], sep="\n", end="\n" if broken else "", flush=True)
            failed = failed or bool(broken)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    typer.run(main)
