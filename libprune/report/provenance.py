"""How a result was made: from which model and text, and at which commit of the project."""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from libprune.pipeline.artifacts import read_architecture, read_json, read_table, same_origin
from libprune.pipeline.layout import NOTHING, Layout

_INPUTS = ("params.yaml", "dvc.yaml", "libprune", "stages")


@dataclass(frozen=True)
class Provenance:
    """How a result was made, beyond what `evaluation.json` says.

    Attributes:
        name: the name of the model, without a path.
        model: the model as `prepare.model` names it.
        family: the family that describes it.
        text: the calibration text as `tokenize.text` names it, then data set, config, split and commit of a hub text.
        sequences: number of calibration sequences.
        length: tokens of each calibration sequence.
        seed: the seed of their draw.
        commit: the git commit of the project; None outside of a repository.
        changed: whether params, pipeline or code differ from that commit.
    """

    name: str
    model: str
    family: str
    text: str
    sequences: int
    length: int
    seed: int
    commit: str | None
    changed: bool


def gather_provenance(layout: Layout, origin: Mapping[str, str], project: Path) -> Provenance:
    """Read the provenance of a result from its artifacts and the project's repository.

    Args:
        origin: `model`, the digest of the dense model that they must belong to, and `tokens`, that of the calibration
            text.
        project: a folder of the project, for its commit.

    Raises:
        ArtifactError: if an artifact is missing, or belongs to another model or text.
    """
    architecture = read_architecture(layout)
    _, weights = read_table(layout.weights, "prepare")
    _, tokens = read_table(layout.calibration_tokens, "tokenize")
    model = {"model": origin["model"]}
    same_origin(layout.architecture, {"model": architecture.fingerprint}, model)
    same_origin(layout.weights, weights, model)
    same_origin(layout.calibration_tokens, tokens, origin)
    drawn = {name: tokens[name] for name in ("sequences", "length", "seed")}
    commit, changed = project_state(project)
    text, named = _text(tokens), read_json(layout.origin, "prepare")
    same_origin(layout.origin, named, model)
    return Provenance(
        named["name"], weights["source"], architecture.family, text, **drawn, commit=commit, changed=changed
    )


def _text(tokens: Mapping[str, Any]) -> str:
    """The name of a text: its source, and what is recorded of a hub data set."""
    named = [tokens["source"]]
    if tokens.get("revision"):
        named += [tokens[key] for key in ("data_set", "config", "split", "revision")]
    return ", ".join(dict.fromkeys(filter(None, named)))


@dataclass(frozen=True)
class Seen:
    """How much text a step saw.

    Attributes:
        step: the step, in words.
        text: which text: calibration, repair, training or evaluation.
        sequences: number of different sequences.
        length: tokens of each; the most, where documents with labels differ in length.
        tokens: tokens of all, those that were seen again counted again.
        exact: whether all sequences have this length.
    """

    step: str
    text: str
    sequences: int
    length: int
    tokens: int
    exact: bool


def gather_seen(layout: Layout, origin: Mapping[str, str], result: Mapping[str, Any]) -> list[Seen]:
    """How much text each step of a result saw, in the order of the steps; a step that did nothing is left out.

    Args:
        origin: as for `gather_provenance`.
        result: the content of `artifacts/evaluation.json`.

    Raises:
        ArtifactError: if an artifact is missing, or belongs to another model or text.
    """
    _, text = read_table(layout.calibration_tokens, "tokenize")
    exact = text.get("mode") != "labelled"
    found: dict[str, tuple[str, str, int, int]] = {}
    for stage, name in _TABLES.items():
        if (number := _collected_on(layout.root / name, stage, origin)) is not None:
            found[stage] = (stage, "calibration", *number)
    pruning, recovery, protocol = result["pruning"], result.get("recovery"), result["protocol"]
    if fitted := pruning["repair_text"]:
        name = "calibration" if fitted["tokens"] == pruning["tokens"] else "repair"
        found["repair"] = (f"repair, {pruning['slice']['repair']}", name, fitted["sequences"], fitted["length"])
    elif (repair := pruning["slice"]["repair"]) != "none":
        found["repair"] = (f"repair, {repair}, from the activations", *found["activations"][1:])
    found["evaluation"] = ("evaluation", "evaluation", protocol["windows"], protocol["length"])
    seen = [Seen(*one, tokens=one[2] * one[3], exact=exact) for one in found.values()]
    if recovery:
        drawn = ("training", "training", recovery["sequences"], recovery["length"])
        seen.insert(-1, Seen(*drawn, tokens=recovery["tokens"], exact=exact))
    return seen


_TABLES = {
    "gradients": "gradients/layers.parquet",
    "hessian": "hessian/units.parquet",
    "activations": "activations/units.parquet",
    **{name: f"{name}.parquet" for name in ("ablation", "sensitivity", "depth", "levels", "width")},
}
"""The stages that collect statistics, each with a small table of what it wrote."""


def _collected_on(path: Path, stage: str, origin: Mapping[str, str]) -> tuple[int, int] | None:
    """Number and length of the sequences that a stage collected statistics on; None if it had nothing to do."""
    if (path.parent / NOTHING).exists():
        return None
    _, meta = read_table(path, stage)
    if "sequences" not in meta:
        same_origin(path, meta, {"model": origin["model"]})
        return None
    same_origin(path, meta, origin)
    return int(meta["sequences"]), int(meta["length"])


def project_state(folder: Path) -> tuple[str | None, bool]:
    """The commit that a folder's repository is at, and whether params, pipeline or code differ from it.

    The commit is None without a repository, without a commit, or without git.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *_INPUTS)
    return commit, bool(changed)


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command; None if it fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
