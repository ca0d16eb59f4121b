"""YAML files that people write: one mapping of keys, each said once."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any, cast

import yaml

from libprune.engine.errors import ParamsError


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if key.value in lines:
                again = key.start_mark.line + 1
                raise yaml.YAMLError(f"key {key.value!r} is in line {lines[key.value]} and again in line {again}")
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a file.

    Raises:
        ParamsError: if it does not exist, is not YAML, says a key twice, or holds no mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
    except FileNotFoundError as error:
        raise ParamsError(f"{path} does not exist; run from the project folder or name another file") from error
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}") from error
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ParamsError(f"{path} holds {'nothing' if data is None else type(data).__name__}, not sections of keys")
    return cast(dict[str, Any], data)
