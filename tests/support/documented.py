"""Reading artifacts by docs/formats.md and nothing else; libprune is not imported here."""

import fnmatch
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from safetensors import safe_open

DOCUMENT = Path(__file__).parents[2] / "docs/formats.md"
Row = dict[str, str]

TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "whole": (int,),
    "number": (int, float),
    "truth": (bool,),
    "list": (list,),
    "object": (dict,),
    "null": (type(None),),
    "any": (object,),
}


@dataclass
class Section:
    """What the document says of a file, or of a folder of files: rows of its tables by their first header."""

    path: str
    tables: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def pattern(self) -> str:
        return self.path.replace("NNN", "[0-9][0-9][0-9]")


def sections() -> list[Section]:
    """Every section of the document that has a path for a heading."""
    found: list[Section] = []
    header: list[str] = []
    for line in DOCUMENT.read_text().splitlines():
        if heading := re.fullmatch(r"### `(.*)`", line):
            found.append(Section(heading[1]))
        cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            header = []
        elif not header:
            header = cells
        elif not set(line) <= set("|-"):
            row = dict(zip(header, cells, strict=True))
            row[header[0]] = row[header[0]].strip("`")
            found[-1].tables.setdefault(header[0], []).append(row)
    return found


def matching(path: str, known: list[Section]) -> Section | None:
    """The section of a file: its own, or that of its folder if that lists it."""
    for section in known:
        if fnmatch.fnmatch(path, section.pattern):
            return section
    folder, _, name = path.rpartition("/")
    for section in known:
        listed = [row["file"] for row in section.tables.get("file", [])]
        if section.path == f"{folder}/" and any(fnmatch.fnmatch(name, pattern) for pattern in listed):
            return section
    return None


def required(rows: list[Row], name: str) -> set[str]:
    """What may not be absent."""
    return {row[name] for row in rows if not row["when"]}


def is_of(value: object, kinds: str) -> bool:
    """Whether a value is of one of the types of a cell."""
    allowed = tuple(kind for name in kinds.split(" or ") for kind in TYPES[name])
    return isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed or object in allowed)


def parquet(path: Path) -> tuple[dict[str, str], dict[str, list], dict[str, Any]]:
    """Types and values of the columns, and the metadata."""
    table = pq.read_table(path)
    types = {
        name: str(kind).replace("element: ", "")
        for name, kind in zip(table.column_names, table.schema.types, strict=True)
    }
    return types, table.to_pydict(), content(table.schema.metadata[b"libprune"])


def content(text: str | bytes) -> dict[str, Any]:
    """What a JSON text says, without the digest that any of them may have."""
    said: dict[str, Any] = json.loads(text)
    said.pop("sha256", None)
    return said


def shard(path: Path) -> tuple[dict[str, tuple[str, list[int]]], dict[str, Any]]:
    """Type and shape of every tensor, and the metadata."""
    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (one.get_dtype(), one.get_shape()) for name, one in slices.items()}, content(
            file.metadata()["libprune"]
        )


def size(expression: str, sizes: Mapping[str, int]) -> int:
    """The size of an axis expression: + is a sum, and what stands beside each other a product."""
    product = re.sub(r"(?<=[\w)])\s+(?=[\w(])", " * ", expression)
    value: int = eval(product, {"__builtins__": {}}, dict(sizes))  # the document's own notation
    return value


def tensors(rows: list[Row], architecture: dict[str, Any], layer: int) -> Iterator[tuple[Row, str, list[int]]]:
    """Every tensor of a layer's shard that the document speaks of: its row, its name, and its shape."""
    sizes = architecture["sizes"]
    parameters = {
        one["name"]: [size(dim, sizes) for dim in one["dims"]]
        for one in architecture["parameters"]
        if one["layer"] == layer
    }
    maps = [one for one in architecture["maps"] if one["layer"] == layer]
    for row in rows:
        start, _, rest = row["tensor"].partition(">")
        names: dict[str, dict[str, int]] = {}
        if start == "<parameter":
            yield from ((row, name, shape) for name, shape in parameters.items())
            continue
        for one in maps:
            axis = architecture["parts"][one["part"]]["axis"]
            if start == "<map" or (start == "<consumer" and axis in re.findall(r"\w+", one["input"])):
                names[one["module"] + rest] = {side: size(one[side], sizes) for side in ("input", "output")}
        for name, sides in names.items() if start.startswith("<") else [(row["tensor"], {})]:
            if row["shape"] == "parameter":
                if name in parameters:
                    yield row, name, parameters[name]
            else:
                words = [] if row["shape"] == "1" else row["shape"].split(", ")
                yield row, name, [sides[word] if word in sides else int(word) for word in words]


def metadata_rows(rows: list[Row], params: Path) -> list[Row]:
    """The rows, with one for each param of a section in the place of `section.*`."""
    settings, found = yaml.safe_load(params.read_text()), []
    for row in rows:
        section, _, rest = row["metadata"].partition(".")
        names = settings[section] if rest == "*" else [row["metadata"]]
        found += [row | {"metadata": name} for name in names]
    return found


def leaves(rows: list[Row], content: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a JSON text at the places that the document speaks of or stops at."""
    inner = [row["key"] for row in rows if row["key"].startswith((f"{place}.", f"{place}[]"))] if place else ["-"]
    if isinstance(content, dict) and inner:
        for key, value in content.items():
            yield from leaves(rows, value, f"{place}.{key}" if place else key)
    elif isinstance(content, list) and inner:
        for value in content:
            yield from leaves(rows, value, f"{place}[]")
    else:
        yield place, content
