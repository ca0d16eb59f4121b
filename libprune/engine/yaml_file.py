"""YAML files that people write: one mapping of keys, each said once, of bounded size."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any, cast

import yaml

from libprune.engine.errors import MeansError, ParamsError, lacking

_LARGEST = 1 << 20
"""Bytes of a file that is read."""
_MOST = 20_000
"""Entries of a file, those counted again that it repeats by reference."""


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last, and names the place of every fault."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is not None and _entries(node, {}) > _MOST:
            raise yaml.YAMLError(f"it holds more than {_MOST:,} entries, counting what is repeated by reference")
        return None if node is None else self.construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, OverflowError, AttributeError, LookupError) as error:
            text = f" {node.value[:40]!r}" if isinstance(node, yaml.ScalarNode) else ""
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}:{text} cannot be read as {kind}: {error}; write text in quotes"
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Any, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"the key in line {key.start_mark.line + 1} is no single word")
            if key.value in lines:
                again = key.start_mark.line + 1
                raise yaml.YAMLError(f"key {key.value!r} is in line {lines[key.value]} and again in line {again}")
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _entries(node: yaml.Node, counted: dict[int, int]) -> int:
    """The number of nodes below a node, itself included; a node that holds itself counts as too many."""
    if id(node) not in counted:
        counted[id(node)] = _MOST + 1
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        nodes = [child for entry in inner for child in (entry if isinstance(entry, tuple) else (entry,))]
        counted[id(node)] = 1 + sum(_entries(child, counted) for child in nodes)
    return counted[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a file.

    Raises:
        ParamsError: if it does not exist, is too large, is not YAML, says a key twice, or holds no mapping.
    """
    loader = None
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise ParamsError(f"{path} has {size:,} bytes; a file of settings has at most {_LARGEST:,}")
        loader = _OnceLoader(path.read_text(encoding="utf-8"))
        data = loader.get_single_data()
    except FileNotFoundError as error:
        raise ParamsError(f"{path} does not exist; run from the project folder or name another file") from error
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}") from error
    except OSError as error:
        kind = ParamsError if lacking(error) is None else MeansError
        raise kind(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        line = loader.get_mark().line + 1 if loader is not None else 1
        raise ParamsError(f"{path} is not valid YAML: what begins in or before line {line} nests too deep") from error
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not valid YAML: {' '.join(str(error).split())[:400]}") from error
    if not isinstance(data, dict):
        raise ParamsError(f"{path} holds {'nothing' if data is None else type(data).__name__}, not sections of keys")
    return cast(dict[str, Any], data)
