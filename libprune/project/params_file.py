"""The params.yaml of a project: that of the repository with values of its own; comments and order stay."""

import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import SingleQuotedScalarString

from libprune.engine.errors import ParamsError, SourceError, missing_key
from libprune.engine.yaml_file import parsed
from libprune.foresight.foresee import require_possible
from libprune.pipeline.faults import written
from libprune.pipeline.params import validate_params
from libprune.pipeline.sources import resolve
from libprune.project.pipeline_file import TEMPLATES

_OF_THE_DEMO = {"preset": "balanced", "recover.method": "none"}
"""Values for a project where those of the repository serve its demo."""
_SOURCES = (
    *("prepare.model", "prepare.families", "prepare.vocabulary", "prepare.vocabulary.text", "tokenize.text"),
    *("tokenize.evaluation_text", "recover.teacher", "recover.text", "evaluate.task_folder"),
)
_WIDTH = 1 << 16
_NAME = "params"


def params_text(changes: Mapping[str, Any]) -> str:
    """The text of the params.yaml of a project.

    Args:
        changes: values by key, such as `allocate.ratio`; all others have their defaults. Paths are seen from the
            current folder, and become absolute.

    Raises:
        ParamsError: if there is no such key, or the params ask for what cannot be.
        SourceError: if a model or a text is given as a path that does not exist.
    """
    return changed(_defaults(), changes)


def changed(text: str, changes: Mapping[str, Any]) -> str:
    """The text of a params file with other values as for `params_text`; its comments and its order stay.

    Raises:
        LibpruneError: as for `params_text`.
    """
    text = replaced(text, placed(changes))
    require_possible(validate_params(parsed(text), _NAME), _NAME)
    return text


def replaced(text: str, changes: Mapping[str, Any]) -> str:
    """The text of a params file with other values by key, whatever they are; its comments and its order stay.

    Raises:
        ParamsError: if there is no such key.
    """
    round_trip = _yaml()
    content = round_trip.load(text)
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        inner = content
        for part in (*sections, leaf):
            if not isinstance(inner, Mapping):
                above = key.removesuffix(f".{part}") if part is leaf else key.partition(f".{part}")[0]
                raise ParamsError(
                    f"{key}: params has no keys in {above}, which is {inner!r}; set it whole, such as "
                    f"{above}={{{part}: ...}}"
                )
            if part not in inner:
                raise ParamsError(missing_key(part, [*inner], f"{key}: {_NAME}"))
            inner = inner if part is leaf else inner[part]
        inner[leaf] = _quoted(value)
    return _dump(round_trip, content)


def completed(text: str) -> str:
    """The text of a params file with the keys that it lacks, at their defaults."""
    round_trip = _yaml()
    content, template = round_trip.load(text), round_trip.load(_defaults())
    for section, default in template.items():
        if section not in content:
            content[section] = default
        elif isinstance(default, Mapping) and isinstance(content[section], Mapping):
            for place, (key, value) in enumerate(default.items()):
                if key not in content[section]:
                    content[section].insert(place, key, value)
    return _dump(round_trip, content)


def settings(words: Iterable[str]) -> dict[str, Any]:
    """Values by key from words of the command line, such as `allocate.ratio=0.3`; a value is written as in YAML.

    Raises:
        ParamsError: naming a word that is not of this form.
    """
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise ParamsError(f"--set {word!r}: write KEY=VALUE, for example --set allocate.ratio=0.3")
        try:
            found[key.strip()] = parsed(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ParamsError(f"--set {word!r}: {value!r} is not a value of YAML; write text in quotes") from error
    return found


def placed(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values by key, in which the paths of models and texts, seen from the current folder, are absolute.

    Raises:
        SourceError: if a model or a text is given as a path that does not exist.
    """
    found = dict(changes)
    for key in set(_SOURCES) & found.keys():
        if isinstance(found[key], str):
            found[key] = _absolute(key, found[key])
        elif isinstance(found[key], list | tuple):
            found[key] = [_placed_text(key, one) for one in found[key]]
        else:
            found[key] = _placed_text(key, found[key])
    return found


def _placed_text(key: str, one: Any) -> Any:
    """A text with keys of its own with an absolute path; anything else as it is."""
    named = isinstance(one, Mapping) and isinstance(one.get("text"), str)
    return {**one, "text": _absolute(key, one["text"])} if named else one


def _absolute(key: str, source: str) -> str:
    try:
        path = resolve(source)
    except SourceError as error:
        raise SourceError(f"{key}: {error}") from error
    return source if path is None or source.startswith("package://") else str(path.absolute())


def _defaults() -> str:
    return replaced((TEMPLATES / "defaults.yaml").read_text(), _OF_THE_DEMO)


def _yaml() -> YAML:
    round_trip = YAML()
    round_trip.width, round_trip.preserve_quotes = _WIDTH, True
    for kind in (type(None), float):
        round_trip.representer.add_representer(kind, _represent)
    return round_trip


def _represent(representer: Any, value: float | None) -> Any:
    """A value as YAML 1.1 and 1.2 read it alike: numbers with a point."""
    if value is None:
        return representer.represent_scalar("tag:yaml.org,2002:null", "null")
    return representer.represent_scalar(
        "tag:yaml.org,2002:float", written(value) if math.isfinite(value) else f".{value}".replace(".-", "-.")
    )


def _quoted(value: Any) -> Any:
    """A value whose texts YAML 1.1 and 1.2 read alike: `yes` in quotes. What a file holds already stays as it is."""
    if isinstance(value, str) and _looks_plain(value):
        return SingleQuotedScalarString(value)
    if isinstance(value, Mapping):
        return {key: _quoted(one) for key, one in value.items()}
    return [_quoted(one) for one in value] if isinstance(value, list | tuple) else value


def _looks_plain(value: str) -> bool:
    """Whether a text would be read as a number or a truth value without quotes."""
    try:
        return isinstance(parsed(value), bool | int | float)
    except (yaml.YAMLError, ValueError):
        return False


def _dump(round_trip: YAML, content: Any) -> str:
    text = io.StringIO()
    round_trip.dump(content, text)
    return text.getvalue()
