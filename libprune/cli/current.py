"""Whether a result still belongs to the params: what DVC noted down of the run is compared with what is there now."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from libprune.engine.errors import ArtifactError
from libprune.engine.yaml_file import read_yaml
from libprune.pipeline.faults import written
from libprune.pipeline.layout import Layout

Stages = Mapping[str, Mapping[str, Any]]
"""The stages of `dvc.lock`: command, dependencies, params and outputs of the last run of each."""
_FIRST = "sources"
"""The stage that reads all params only to check them."""
_MEND = "`dvc repro` brings it up to date"
_ABSENT = object()


def require_current(layout: Layout) -> None:
    """Stop where the evaluation is not that of the project's params, or later stages have run since.

    The project is the folder that holds the artifacts. Where it has no `dvc.lock`, or the stages were run without DVC,
    nothing is known, and nothing said.

    Args:
        layout: of the artifacts.

    Raises:
        ArtifactError: in a sentence that names what differs.
    """
    project = layout.root.absolute().parent
    lock, params = project / "dvc.lock", project / "params.yaml"
    if not lock.is_file() or not params.is_file():
        return
    stages: Stages = read_yaml(lock).get("stages") or {}
    result = layout.evaluation.absolute().relative_to(project).as_posix()
    makers = {out["path"]: name for name, stage in stages.items() for out in stage.get("outs", ())}
    if result not in makers:
        return
    behind = _behind(stages, makers, makers[result])
    differing = list(_differing(stages, behind, read_yaml(params)))
    if differing:
        key, now, then = differing[0]
        more = f" ({len(differing)} keys differ)" if len(differing) > 1 else ""
        raise ArtifactError(f"{params.name} says {key}: {now}, and the last result was made with {then}{more}; {_MEND}")
    for name in behind:
        for dep in stages[name].get("deps", ()):
            maker = makers.get(dep["path"])
            if maker in behind and dep.get("md5") != _digest(stages[maker], dep["path"]):
                raise ArtifactError(f"the stage {maker} has run since the last result was made; {_MEND}")
    noted = _digest(stages[makers[result]], result)
    if noted and layout.evaluation.is_file() and hashlib.md5(layout.evaluation.read_bytes()).hexdigest() != noted:
        raise ArtifactError(f"{layout.evaluation} is not the file that {lock.name} records; {_MEND}")


def _behind(stages: Stages, makers: Mapping[str, str], last: str) -> list[str]:
    """The stages that a stage builds on, itself included, in the order of the file."""
    found, todo = {last}, [last]
    while todo:
        deps = {makers.get(dep["path"]) for dep in stages[todo.pop()].get("deps", ())}
        new = {name for name in deps if name is not None} - found
        found |= new
        todo += new
    return [name for name in stages if name in found and name != _FIRST]


def _differing(stages: Stages, behind: list[str], data: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Each param that stages have read and that differs now: its name, what it is and what it was."""
    seen = set()
    for name in behind:
        for key, then in (stages[name].get("params", {}).get("params.yaml") or {}).items():
            now: Any = data
            for part in key.split("."):
                now = now.get(part, _ABSENT) if isinstance(now, dict) else _ABSENT
            if now != then and key not in seen:
                seen.add(key)
                yield key, "nothing" if now is _ABSENT else written(now), written(then)


def _digest(stage: Mapping[str, Any], path: str) -> str | None:
    """The digest of an output of a stage."""
    return next((out.get("md5") for out in stage.get("outs", ()) if out["path"] == path), None)
