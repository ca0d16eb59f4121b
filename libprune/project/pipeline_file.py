"""The dvc.yaml of a project: that of the repository, whose stages and code are those of the installed package."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

import libprune

PACKAGE = Path(libprune.__file__).parent
"""The folder of the installed package."""
TEMPLATES = Path(__file__).parent
"""The folder with dvc.yaml and params.yaml of the repository, under names that DVC does not look for."""
CODE = "artifacts/code"
"""The folder of a project that holds a link to each file and folder of code that a stage depends on."""
_DIGITS = 16


def pipeline_text() -> str:
    """The text of the dvc.yaml of a project, whose first line holds the digest of the rest."""
    content = yaml.safe_load((TEMPLATES / "pipeline.yaml").read_text())
    links = {dep: f"{CODE}/{name}" for name, dep in _code(content["stages"]).items()}
    stages: dict[str, Any] = {
        "code": {
            "desc": "links to the installed code, so that a change of it by an upgrade is noticed",
            "cmd": "python -m libprune.project.code",
            "outs": [{link: {"cache": False, "persist": True}} for link in links.values()],
        }
    }
    for name, stage in content["stages"].items():
        command = stage["cmd"].replace("-m stages.", "-m libprune.stages.")
        stages[name] = stage | {"cmd": command, "deps": [links.get(dep, dep) for dep in stage["deps"]]}
    text = yaml.safe_dump(content | {"stages": stages}, sort_keys=False, width=120)
    own = f"written by libprune {version('libprune')}. `libprune update` writes it anew."
    return f"# Pipeline {digest(text)}, {own}\n{text}"


def is_current(text: str) -> bool:
    """Whether a dvc.yaml was made from the pipeline that this version of libprune has, whatever users changed in it."""
    return text.partition(",")[0] == pipeline_text().partition(",")[0]


def is_untouched(text: str) -> bool:
    """Whether a dvc.yaml is what some version of libprune wrote, to the letter."""
    first, _, rest = text.partition("\n")
    return first.startswith(f"# Pipeline {digest(rest)},")


def code_paths() -> dict[str, Path]:
    """Where the code lies that stages depend on, by the name of the link to it."""
    declared = _code(yaml.safe_load((TEMPLATES / "pipeline.yaml").read_text())["stages"])
    return {name: _installed(dep) for name, dep in declared.items()}


def _code(stages: dict[str, Any]) -> dict[str, str]:
    """The code that stages of the repository depend on, by the name of the link to it."""
    deps = [dep for stage in stages.values() for dep in stage["deps"] if dep.startswith(("libprune/", "stages/"))]
    return {dep.removeprefix("libprune/").replace("/", "-"): dep for dep in deps}


def _installed(dep: str) -> Path:
    """A path of the repository in the installed package, or in the repository, if this is what is installed."""
    beside = PACKAGE.parent / dep
    return beside if dep.startswith("libprune/") or beside.exists() else PACKAGE / dep


def digest(text: str) -> str:
    """The first digits of the SHA-256 digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
