"""YAML files that people write: one mapping of keys, each said once, of bounded size."""

import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel, ValidationError

from libprune.engine.errors import MeansError, ParamsError, lacking, nearest

_FAST = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The parser in C, where PyYAML was built with it."""

Place = tuple[int | str, ...]
"""The keys and the positions in lists that lead to a value."""
Lines = Mapping[Place, int]
"""The line of a file, from 1, in which the key or entry of a place stands."""
NO_LINES: Lines = {}

_LARGEST = 1 << 20
"""Bytes of a file that is read."""
_MOST = 20_000
"""Entries of a file, those counted again that it repeats by reference."""


class _Loader(yaml.SafeLoader):
    """Reads `1e-5` as a number, as YAML 1.2 does, by which DVC writes it; to YAML 1.1 it is a text without a point."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parsed(text: str) -> Any:
    """What a text of YAML holds, read as `read_yaml` reads files, but of any kind and size.

    Raises:
        yaml.YAMLError: if it is not YAML.
        ValueError: if a value is none, such as a date that there is not.
    """
    return yaml.load(text, _Loader)


class _OnceLoader(_Loader):
    """Refuses a key that is there twice, of which YAML would take the last, and names the place of every fault."""

    lines = NO_LINES

    def get_single_data(self) -> Any:
        return self.content(self.get_single_node())

    def content(self, node: yaml.Node | None) -> Any:
        if node is not None and _entries(node, {}) > _MOST:
            raise yaml.YAMLError(f"it holds more than {_MOST:,} entries, counting what is repeated by reference")
        if node is None:
            return None
        self.lines = dict(_places(node, ()))
        return self.construct_document(node)

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


def _places(node: yaml.Node, above: Place) -> Iterator[tuple[Place, int]]:
    """The place of everything below a node, with its line; a value is where its key is."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*above, str(key.value)), key.start_mark.line + 1
            yield from _places(value, (*above, str(key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*above, number), value.start_mark.line + 1
            yield from _places(value, (*above, number))


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a file.

    Raises:
        ParamsError: if it does not exist, is too large, is not YAML, says a key twice, or holds no mapping.
    """
    return read_lines(path)[0]


def read_shipped(path: Path) -> dict[str, Any]:
    """The content of a file that ships with libprune; ten times as fast, but nothing bounds how deep it nests.

    Raises:
        ParamsError: as `read_yaml` does.
    """
    try:
        data = _OnceLoader("").content(yaml.compose(path.read_text(encoding="utf-8"), Loader=_FAST))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        data = None
    return data if isinstance(data, dict) else read_yaml(path)


def read_lines(path: Path) -> tuple[dict[str, Any], Lines]:
    """The content of a file, and the line of everything in it.

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
        raise ParamsError(f"{path} is not valid YAML: {_said(error)[:400]}") from error
    if not isinstance(data, dict):
        raise ParamsError(f"{path} holds {'nothing' if data is None else type(data).__name__}, not sections of keys")
    return cast(dict[str, Any], data), loader.lines


def _said(error: yaml.YAMLError) -> str:
    """What is wrong, after the line and the column at which reading stopped."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None or error.problem is None:
        return " ".join(str(error).split())
    mark, begun, problem = error.problem_mark, error.context_mark, error.problem
    hint = next((hint for said, hint in _HINTS.items() if said in problem), "")
    since = f", {error.context} of line {begun.line + 1}" if begun is not None and begun.line != mark.line else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(problem.split())}{since}{hint}"


_HINTS = {
    "'\\t'": "; indent by spaces, not by tabs",
    "mapping values are not allowed": "; a text that holds ': ' stands in quotes, and a key begins its own line",
    "expected <block end>": "; keys of one section begin in one column",
    "could not find expected ':'": "; a key ends in a colon and a space",
}
"""What to do, by a part of what PyYAML says."""


def problems(error: ValidationError, model: type[BaseModel]) -> str:
    """What is wrong with the content of a file, in one line; of many faults only the first.

    Args:
        error: of pydantic.
        model: the model of the whole file.
    """
    found = error.errors(include_url=False, include_context=False, include_input=False)
    told = "; ".join(_explain(e["loc"], e["type"], e["msg"], model) for e in found[:_SHOWN])
    return told + (f"; and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else "")


_SHOWN = 10
"""Problems of a file that are told."""


def _explain(loc: Place, kind: str, message: str, model: type[BaseModel]) -> str:
    place, said = ".".join(map(str, loc)), " ".join(message.removeprefix("Value error, ").split())
    if loc[-1:] == ("[key]",):
        return f"{'.'.join(map(str, loc[:-1]))}: write this key in quotes"
    if kind != "extra_forbidden":
        return f"{place}: {said}" if place else said
    if len(loc) > 1:
        return f"unknown key {place!r}"
    known = [of.alias or name for name, of in model.model_fields.items()]
    return f"unknown key {place!r}{nearest(place, known)} (known: {', '.join(known)})"
