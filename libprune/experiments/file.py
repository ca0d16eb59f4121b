"""Comparison files: settings by name, or a grid of them, each to be run with several calibration seeds."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, Field, ValidationError, model_validator

from libprune.engine.errors import ParamsError, nearest
from libprune.engine.yaml_file import problems, read_yaml
from libprune.foresight.settings import setting_faults
from libprune.pipeline.params import Params, validate_params
from libprune.pipeline.sections import Floor, Section

Data = Mapping[str, Any]
"""The content of a params file: sections of keys, and `preset`."""

SEED = "tokenize.seed"
"""The param that `seeds` sets: which calibration sequences are drawn."""

_NAME = r"^[A-Za-z0-9]([A-Za-z0-9_+-]|\.(?=[A-Za-z0-9]))*$"
"""Pattern of a setting's name, which becomes part of the names of git references and folders."""

_MOST = 10_000
"""Runs of a comparison."""

FullName = Annotated[str, Field(pattern=r"^[a-z_0-9.]+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class ComparisonFile(Section):
    """The content of a comparison file; params stand under their full names, such as `score.criterion`."""

    name: Name
    """The first part of the experiments' names, and the folder below report/compare."""
    title: str = ""
    """The heading of what is written; the name if empty."""
    base: dict[FullName, Any] = Field(default={}, alias="set")
    """The params under `set`, which all settings share and which differ from params.yaml."""
    settings: dict[str, dict[FullName, Any]] = Field(default={})
    """The params that each setting changes, by the setting's name."""
    grid: dict[FullName, list[Any]] = Field(default={})
    """Values by param, in place of `settings`: every combination of them is a setting."""
    seeds: Annotated[tuple[Floor, ...], Field(strict=False, min_length=1)]
    """Values of `tokenize.seed`; two at least, for an interval."""
    reference: str | None = None
    """The setting that the others are compared with; if null, the one with the lowest perplexity."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "ComparisonFile":
        if bool(self.settings) == bool(self.grid):
            raise ValueError("give either settings or a grid")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} names one twice")
        number = len(self.seeds) * (len(self.settings) or prod(map(len, self.grid.values())))
        if number > _MOST:
            raise ValueError(f"it asks for {number:,} runs; a comparison has at most {_MOST:,}")
        if [key for key, values in self.grid.items() if not values]:
            raise ValueError("grid: a param has no values")
        return self

    def changes(self) -> dict[str, dict[str, Any]]:
        """The params that each setting changes, by its name; a combination of a grid is named by its values.

        Raises:
            ParamsError: if two combinations would have the same name.
        """
        if self.settings:
            return dict(self.settings)
        combinations: dict[str, dict[str, Any]] = {}
        for values in product(*self.grid.values()):
            name = "-".join(re.sub(r"[^A-Za-z0-9.+]+", "_", str(value)).strip("_.") or "none" for value in values)
            if name in combinations:
                raise ParamsError(f"grid: two combinations are called {name!r}; write them as settings with names")
            combinations[name] = dict(zip(self.grid, values, strict=True))
        return combinations


@dataclass(frozen=True)
class Setting:
    """A setting of a comparison.

    Attributes:
        name: as in the file.
        changes: the params that differ from params.yaml, by full name, with those of `set`.
        params: all params with these changes and the first seed.
    """

    name: str
    changes: Mapping[str, Any]
    params: Params


@dataclass(frozen=True)
class ExperimentRun:
    """One run of a comparison: a setting with a calibration seed.

    Attributes:
        experiment: the run's name in DVC.
        setting: the setting's name in the comparison.
        seed: the value of `tokenize.seed`.
        changes: the params that differ from params.yaml, by full name, with the seed.
        leaves: every param by its full name.
    """

    experiment: str
    setting: str
    seed: int
    changes: Mapping[str, Any]
    leaves: Mapping[str, Any]

    def is_of(self, params: Mapping[str, Any]) -> bool:
        """Whether params are those of this run.

        They are compared as text, since YAML 1.1 and 1.2 disagree whether 1e-05 is a number.
        """
        return {key: str(value) for key, value in params.items()} == {k: str(v) for k, v in self.leaves.items()}


@dataclass(frozen=True)
class Comparison:
    """A valid comparison of this project.

    Attributes:
        name: the first part of the experiments' names, and the folder's name.
        title: the heading.
        settings: at least one, in the file's order.
        seeds: values of `tokenize.seed`.
        reference: the name of a setting, or None for the best.
        data: the content of params.yaml, which the settings change.
    """

    name: str
    title: str
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    reference: str | None
    data: Data

    def runs(self) -> Iterator[ExperimentRun]:
        """Every setting with every seed; seeds are outermost, so that the statistics of a seed serve all settings."""
        for seed in self.seeds:
            for setting in self.settings:
                changes = {**setting.changes, SEED: seed}
                leaves = leaves_of(with_changes(self.data, changes))
                yield ExperimentRun(f"{self.name}-{setting.name}-s{seed}", setting.name, seed, changes, leaves)


def leaves_of(data: Data, prefix: str = "") -> dict[str, Any]:
    """The params by their full names: `preset`, `section.key`, `section.key.part`."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        flat |= leaves_of(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def with_changes(data: Data, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Params with some of them, by full name, set to other values."""
    changed = dict(data)
    for name, value in changes.items():
        key, _, inner = name.partition(".")
        changed[key] = with_changes(changed.get(key) or {}, {inner: value}) if inner else value
    return changed


def read_comparison(path: Path, params: Path = Path("params.yaml")) -> Comparison:
    """Read a comparison file and check that all its settings are valid changes to the project's params.

    Raises:
        LibpruneError: naming the setting, the key, what is wrong with it, and the nearest known key.
    """
    file, data = read_file(path), read_yaml(params)
    changes = {name: {**file.base, **own} for name, own in file.changes().items()}
    if file.reference is not None and file.reference not in changes:
        known = ", ".join(changes)
        raise ParamsError(
            f"{path}: reference {file.reference!r} is no setting{nearest(file.reference, changes)} (known: {known})"
        )
    settings = tuple(read_setting(name, own, data, file.seeds[0], path) for name, own in changes.items())
    _require_different(settings, data, path)
    return Comparison(file.name, file.title or file.name, settings, file.seeds, file.reference, data)


def read_file(path: Path) -> ComparisonFile:
    """Read a comparison file without checking the params that it names.

    Raises:
        ParamsError: naming the key and the nearest known one.
    """
    try:
        return ComparisonFile.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ParamsError(f"{path}: {problems(error, ComparisonFile)}") from error


def read_setting(name: str, changes: Mapping[str, Any], data: Data, seed: int, path: Path) -> Setting:
    """Make a setting; its name must be usable, and its changes must give valid params.

    Raises:
        LibpruneError: naming what is wrong.
    """
    where = f"{path}: setting {name!r}"
    if not re.fullmatch(_NAME, name):
        raise ParamsError(f"{where}: a name has letters, digits, and between them - _ + or single dots")
    known = _known()
    for key in changes:
        if key == SEED:
            raise ParamsError(f"{where}: {SEED} is what `seeds` sets; leave it out")
        if key not in known:
            raise ParamsError(f"{where}: unknown param {key!r}{nearest(key, known)}")
    valid = validate_params(with_changes(data, {**changes, SEED: seed}), where)
    if faults := tuple(dict.fromkeys(f"{where}: {fault.text}" for fault in setting_faults(valid))):
        raise ParamsError("; ".join(faults), faults)
    return Setting(name, changes, valid)


def _known(model: type[BaseModel] = Params, prefix: str = "") -> list[str]:
    """The full names of all params."""
    names = []
    for key, of in model.model_fields.items():
        name, inner = f"{prefix}{key}", cast(Any, of.annotation)
        has_keys = isinstance(inner, type) and issubclass(inner, BaseModel)
        names += _known(inner, f"{name}.") if has_keys else [name]
    return names


def _require_different(settings: tuple[Setting, ...], data: Data, path: Path) -> None:
    seen: dict[str, str] = {}
    for setting in settings:
        content = repr(sorted(leaves_of(with_changes(data, setting.changes)).items()))
        if content in seen:
            raise ParamsError(f"{path}: settings {seen[content]!r} and {setting.name!r} have the same params")
        seen[content] = setting.name
