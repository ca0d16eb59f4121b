"""Damages what users give, in thousands of seeded ways, and checks that each ends in one line and soon.

    python -m bench.torture --tries 1000 --seed 0

Held is an input that is used as it is, or refused by one line; not held is a traceback, more than 20 seconds, or an
artifact of which a stage makes something else than of the whole one. Each is used in a fork. The kinds: params files,
family files and comparison files (bytes and values), configs of models (values), headers of safetensors files (bytes),
as models, as models with masks and as files of masks; GGUF files, texts, artifacts, and pruned folders for check.
"""

import json
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from safetensors.torch import save_file

from bench.attacks import (
    Attack,
    attack_artifact,
    attack_folder,
    attack_gguf,
    attack_text,
    change,
    scramble,
)
from bench.forks import content, forked, project, ready, run_stage
from libprune.cli.main import app
from libprune.engine.family import FOLDER, load_family
from libprune.pipeline.layout import Layout
from libprune.pipeline.stage import user_errors

SECONDS, MEMORY = 20, 6 << 30
"""What a use may take, and the bytes that it may take beside those that this process has."""


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


ATTACKS: dict[str, Attack] = {
    "params": attack_params,
    "comparison": attack_comparison,
    "family": attack_family,
    "config": attack_config,
    "weights": attack_weights,
    "masks": attack_masks,
    "gguf": attack_gguf,
    "text": attack_text,
    "artifact": attack_artifact,
    "folder": attack_folder,
}


def used(words: list[str]) -> None:
    """Use what the words name; in the end it was used, or an error is raised."""
    from libprune.experiments.file import read_comparison
    from libprune.pipeline.sections import Prepare, Tokenize
    from libprune.statistics.dense import prepare_layout
    from libprune.texts.tokenize import tokenize_layout

    small = {"calibration_sequences": 4, "calibration_length": 16, "evaluation_windows": 2, "evaluation_length": 16}
    kinds: dict[str, Callable[..., object]] = {
        "comparison": lambda path, params: read_comparison(Path(path), Path(params)),
        "family": lambda path: load_family(Path(path)),
        "dense": lambda path: prepare_layout(Layout(Path(path).with_name("prepared")), Prepare(model=path)),
        "text": lambda artifacts, path: tokenize_layout(
            Layout(Path(artifacts)), Tokenize.model_validate({"text": path, **small}), "cpu", "float32"
        ),
        "stage": lambda name, folder, artifact: run_stage(name, Path(folder)),
    }
    with user_errors():
        kinds[words[0]](*words[1:]) if words[0] in kinds else app(words)


def outcome(words: list[str], seconds: float = SECONDS) -> str:
    """Use what the words name, in a fork: `used`, `refused`, or what is wrong with how it ended."""

    def work() -> None:
        limit_memory()
        used(words)

    ended = forked(work, seconds)
    lines = ended.output.strip().splitlines() or ["silence"]
    if ended.late:
        return f"more than {seconds} s"
    if ended.status not in {0, 1, 2} or "Traceback (most recent call last)" in ended.output:
        return f"status {ended.status}: {lines[-1][:300]}"
    if "\x1b" in ended.output:
        return "an escape sequence reaches the terminal"
    if words[0] == "stage" and ended.status and not (words[-1] in lines[-1] and "dvc repro" in lines[-1]):
        return f"the file or the stage to run is not named: {lines[-1][:300]}"
    if words[0] == "stage" and not ended.status:
        name, folder = words[1], Path(words[2])
        if content(folder, name) != content(folder.with_name("done"), name):
            return f"what {name} makes of the damaged {words[-1]} is accepted"
    return "refused" if ended.status else "used"


def limit_memory() -> None:
    """Let this process take some GB more than it has, so that a file without an end does not fill the machine."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))


def torture(kind: str, tries: int, seed: int, place: Path) -> tuple[int, list[str]]:
    """Attack by one kind; how many were refused, and how those ended that did not hold."""
    refused, broken = 0, []
    for number in range(tries):
        words = ATTACKS[kind](place, random.Random(f"{kind} {seed} {number}"))
        end = outcome(words)
        refused += end == "refused"
        if end not in {"used", "refused"}:
            broken.append(f"{kind} --seed {seed}, try {number}: {' '.join(words)}: {end}")
    return refused, broken


def place_in(folder: Path) -> Path:
    """A tiny model, a text, params for both, and a project all of whose stages have run."""
    done = project(folder / "done")
    for name in ("model", "text.txt", "params.yaml"):
        (folder / name).symlink_to(done / name)
    return folder


def main(
    tries: Annotated[int, typer.Option(help="Attacks of each kind.")] = 1000,
    seed: int = 0,
    kind: Annotated[list[str] | None, typer.Option(help="Kinds; none: all.")] = None,
) -> None:
    """Attack, and print a table of what held."""
    failed = False
    with ready() as temporary:
        place = place_in(temporary)
        for name in kind or ATTACKS:
            start = time.perf_counter()
            refused, broken = torture(name, tries, seed, place)
            seconds = time.perf_counter() - start
            print(
                f"| {name} | {tries:,} | {tries - len(broken):,} | {refused:,} | {seconds:.0f} s |",
                flush=True,
            )
            print(*broken[:20], sep="\n", end="\n" if broken else "", flush=True)
            failed = failed or bool(broken)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    typer.run(main)
