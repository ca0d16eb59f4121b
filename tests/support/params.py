"""The sections and keys of params.yaml, and the file that ships with the project."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from libprune.pipeline.params import Params, load_params

SHIPPED = Path(__file__).parents[2] / "params.yaml"


def sections() -> dict[str, type[BaseModel]]:
    """The sections of params.yaml by name."""
    return {name: field.annotation for name, field in Params.model_fields.items() if name != "preset"}


PLACES = [(name,) for name in sections()] + [
    (name, key) for name, section in sections().items() for key in section.model_fields
]
"""Every key of params.yaml: the sections, and the keys in them."""


def shipped() -> dict:
    """The content of the file that ships with the project."""
    return deepcopy(_parsed())


@cache
def _parsed() -> dict:
    """What nobody may change."""
    return yaml.safe_load(SHIPPED.read_text())


def write_and_load(path: Path, content: object) -> Params:
    """Write a text or the given content as a params file and read it."""
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return load_params(path)


def untrained() -> dict[str, Any]:
    """The content of the shipped file with the preset `balanced`, and without training."""
    data: dict[str, Any] = shipped()
    return data | {"preset": "balanced", "recover": data["recover"] | {"method": "none"}}
