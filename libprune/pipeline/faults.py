"""What is wrong with a params file: each fault once, with its line, and what to write instead where that is known."""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from libprune.engine.errors import ParamsError, nearest
from libprune.engine.yaml_file import Lines, Place, parsed
from libprune.pipeline.terminal import masked

MOST = 100
"""Faults of a file that are told."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a params file.

    Attributes:
        text: what was found and what to do; it names the key.
        place: where it is, as keys; the fault is in the whole file if it is empty.
    """

    text: str
    place: Place = ()


class ConflictError(ValueError):
    """Settings that do not go together, each with a sentence; a validator of a section raises it."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__("; ".join(texts))
        self.texts = texts


def conflicts(texts: Iterator[str]) -> None:
    """Stop if there is a sentence on a conflict.

    Raises:
        ConflictError: with all of them.
    """
    if found := list(texts):
        raise ConflictError(found)


def params_error(where: str, faults: Sequence[Fault], lines: Lines) -> ParamsError:
    """The error that tells all faults of a file, each with its line.

    Args:
        where: the name of the file.
        faults: at least one.
        lines: of the file; empty where the lines are not known.
    """
    numbered = [(_line(fault, lines), fault.text) for fault in faults]
    numbered = list(dict.fromkeys(sorted(numbered, key=lambda one: one[0] or 0)))
    told = [f"{where}{f', line {line}' if line else ''}: {text}" for line, text in numbered[:MOST]]
    if len(numbered) > MOST:
        told.append(f"{where}: and {len(numbered) - MOST:,} more faults")
    return ParamsError("; ".join(told), tuple(told))


_NAMED = re.compile(r"\b([a-z]+)\.([a-z_]+)\b")


def _line(fault: Fault, lines: Lines) -> int | None:
    """The line of a fault's place, or of what it lies in; else of the first key that its text names."""
    named = (match.groups() for match in _NAMED.finditer(fault.text))
    for place in (*(fault.place[:end] for end in range(len(fault.place), 1, -1)), *named, fault.place[:1]):
        if place in lines:
            return lines[place]
    return None


def faults_of(error: ValidationError, model: type[BaseModel]) -> list[Fault]:
    """What is wrong, in the words of YAML; what was tried for one value is told as one fault.

    Args:
        error: of pydantic.
        model: the model of the whole file.
    """
    by_place: dict[Place, list[Mapping[str, Any]]] = {}
    for one in error.errors(include_url=False):
        by_place.setdefault(_place(model, one["loc"], one["type"] == "extra_forbidden"), []).append(one)
    meant = {(*place[:-1], word) for place, (first, *_) in by_place.items() for word in _meant(model, place, first)}
    found: list[Fault] = []
    for place, tried in by_place.items():
        if tried[0]["type"] != "missing" or place not in meant:  # it is there, but misspelled
            found += _told(model, place, tried)
    return found


def _place(model: type[BaseModel], loc: Place, unknown: bool) -> Place:
    """A place without the parts that say which type was tried; whether its last key is an unknown one."""
    place: Place = ()
    for part in loc[:-1] if unknown else loc:
        if isinstance(part, int) or part in _keys(model, place):
            place = (*place, part)
    return (*place, loc[-1]) if unknown else place


def _meant(model: type[BaseModel], place: Place, error: Mapping[str, Any]) -> list[str]:
    """The key that an unknown key stands for."""
    if error["type"] != "extra_forbidden":
        return []
    hint = re.search("'([^']*)'", nearest(str(place[-1]), _keys(model, place[:-1]), count=1))
    return [hint[1]] if hint else []


def name_of(place: Place) -> str:
    """A place as it is written in texts, such as `recover.text[0].share`; of a long key the beginning."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part[:60]}" for part in place).removeprefix(".")


def _told(model: type[BaseModel], place: Place, tried: Sequence[Mapping[str, Any]]) -> list[Fault]:
    error, name = tried[0], name_of(place)
    kind, context = error["type"], error.get("ctx", {})
    if isinstance(context.get("error"), ConflictError):
        return [Fault(text, place) for text in context["error"].texts]
    if kind == "extra_forbidden":
        known = _keys(model, place[:-1])
        hint = _elsewhere(model, place) or nearest(str(place[-1]), known, count=1)
        return [Fault(f"unknown key {name!r}{hint} (known: {', '.join(known)})", place)]
    if kind == "invalid_key":
        hint = "write decimals with a point, and a key that is no word in quotes"
        return [Fault(f"{name_of(place[:-1])}: {place[-1]} is no key; {hint}", place[:-1])]
    if kind == "missing":
        return [Fault(f"{name} is missing", place[:-1])]
    if kind == "model_type":
        return [
            Fault(
                f"{name}: expected keys with values, found {_yaml(error['input'])}; the keys are "
                f"{', '.join(_keys(model, place))}",
                place,
            )
        ]
    value, expected = error["input"], list(dict.fromkeys(filter(None, map(_expected, tried))))
    if not expected:
        text = error["msg"].removeprefix("Value error, ")
        return [Fault(f"{name}: {text}" if name else text, place)]
    hint = _instead(_type_at(model, place), value, tried)
    return [Fault(f"{name}: expected {' or '.join(expected)}, found {_yaml(value)}{hint}", place)]


def _elsewhere(model: type[BaseModel], place: Place) -> str:
    """The sections that a key belongs to, which stands in another one."""
    owners = [name for name in model.model_fields if name != place[0] and place[-1] in _keys(model, (name,))]
    return f"; it is a key of {' and of '.join(owners)}" if owners else ""


_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
_KINDS = {
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "tuple_type": "a list",
}


def _expected(error: Mapping[str, Any]) -> str | None:
    """What would be right, for an error of type or range."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _BOUNDS:
        key, word = _BOUNDS[kind]
        return f"a number {word} {context[key]:g}"
    return str(context["expected"]).replace("'", "") if kind == "literal_error" else _KINDS.get(kind)


def _yaml(value: Any) -> str:
    """A value as a message shows it: what it is, and for numbers and texts what it says."""
    if isinstance(value, str):
        return f"the text {masked(value)[:60]!r}"
    return "keys with values" if isinstance(value, dict) else "a list" if isinstance(value, list) else written(value)


def _instead(kind: Any, value: Any, tried: Sequence[Mapping[str, Any]]) -> str:
    """What to write instead, as the end of a message: only what the key takes; empty where nothing is near."""
    if kind is None or (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return ""
    allowed = TypeAdapter(kind, config=ConfigDict(strict=True))
    share = any(error.get("ctx", {}).get(bound) == 1 for error in tried for bound in ("lt", "le"))
    for other, why in _readings(value, share):
        try:
            allowed.validate_python(other)
        except ValidationError:
            continue
        return f"; write {written(other)}{why}"
    words = [word for error in tried for word in re.findall("'([^']*)'", error.get("ctx", {}).get("expected", ""))]
    return nearest(value.lower(), words) if isinstance(value, str) else ""


def written(value: Any) -> str:
    """A value as YAML 1.1 reads it again."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, str) and not isinstance(_read(value), str):  # it would be read as a number, or as nothing
        return "'" + value.replace("'", "''") + "'"
    if not isinstance(value, float):
        return str(value)
    plain = f"{value:.12f}".rstrip("0")
    plain = f"{plain}0" if plain.endswith(".") else plain
    return plain if float(plain) == value else re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))


_LONGEST = 40
"""Characters of a text that may stand for a number."""
_LETTERS = {"k": 10**3, "m": 10**6, "g": 10**9}


def _readings(value: Any, share: bool) -> Iterator[tuple[Any, str]]:
    """What a value may stand for, the likeliest first, each with why it is not that already.

    Args:
        value: as YAML reads it.
        share: whether a share from 0 to 1 is wanted.
    """
    if value is False:
        yield "none", " (YAML reads no and off as false)"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if share and 1 < value < 100:
            yield value / 100, f" for {value:g} %"
        if math.isfinite(value) and value == int(value):
            yield int(value), ""
        if value in (0, 1):
            yield bool(value), ""
    elif isinstance(value, str):
        text = value.strip()
        quoted = len(text) <= _LONGEST and isinstance(_read(text), int | float)
        for number in numbers_in(text):
            yield number, " without quotes" if quoted else ""
        if quoted and isinstance(_read(text), bool):
            yield _read(text), " without quotes"
        if text.lower() in {"none", "null", "~", ""}:
            yield None, ""
        yield re.sub(r"[\s-]+", "_", text.lower()), ""
        yield [part.strip() for part in re.split(r"[,\s]+", text) if part], ""


def _read(text: str) -> Any:
    """A text as YAML would read it without quotes; None if it would not."""
    try:
        return parsed(text)
    except (yaml.YAMLError, ValueError):  # of a date that there is not
        return None


def numbers_in(text: str) -> Iterator[int | float]:
    """The numbers that a text may stand for as people write them: `1e-3`, `30 %`, `0,3`, `1,000`, `40k`, `1/3`."""
    if len(text) > _LONGEST:
        return
    compact = re.sub(r"(?<=\d)[\s_'’](?=\d{3})", "", text)
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", compact):
        yield int(compact.replace(",", ""))
    plain = re.fullmatch(r"([+-]?(?:\d+(?:[.,]\d*)?|[.,]\d+)(?:[eE][+-]?\d+)?)\s*([%kKmMgG]?)", compact)
    parts = re.fullmatch(r"(\d+)\s*/\s*(\d+)", compact)
    if plain:
        number = float(plain[1].replace(",", "."))
        if plain[2] == "%":
            number = float(f"{number / 100:.15g}")
        elif plain[2]:
            number *= _LETTERS[plain[2].lower()]
        if number.is_integer():
            yield int(number)
        if math.isfinite(number):
            yield number
    elif parts and int(parts[2]):
        yield float(f"{int(parts[1]) / int(parts[2]):.6g}")


def _keys(model: type[BaseModel], place: Place) -> Collection[str]:
    """The keys that may stand below a place."""
    inner = _inner(_type_at(model, place)) if place else model
    return list(inner.model_fields) if inner else []


def _type_at(model: type[BaseModel], place: Place) -> Any:
    """The type of what stands at a place, with its limits; None where nothing is known to stand."""
    kind: Any = model
    for part in place:
        if isinstance(part, int):
            kind = next((get_args(one)[0] for one in _parts(kind) if get_origin(one) is tuple), None)
        elif (inner := _inner(kind)) is not None and part in inner.model_fields:
            kind = _limited(inner.model_fields[part])
        else:
            return None
    return kind


def _limited(field: FieldInfo) -> Any:
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _inner(kind: Any) -> type[BaseModel] | None:
    """The section that a type is, or that its list is made of."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((found for part in get_args(kind) if (found := _inner(part))), None)


def _parts(kind: Any) -> Iterator[Any]:
    """A type, and all types that it is made of."""
    yield kind
    for part in get_args(kind):
        yield from _parts(part)
