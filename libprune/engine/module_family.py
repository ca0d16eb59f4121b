"""Family files of networks: which axes the modules are made of, and which axes can lose units."""

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from libprune.engine.axes import Expr, LinearMap, parse_expr, parse_map
from libprune.engine.errors import FamilyError, ParamsError, missing_key, nearest
from libprune.engine.yaml_file import problems, read_yaml

WILD = "*"
RESERVED = re.compile(r"k\d+")
"""Names that the axes of kernels have: `k3` is the side of a kernel of size 3."""


def _readable(text: str) -> str:
    reserved = sorted(filter(RESERVED.fullmatch, parse_map(text.replace(WILD, "0")).names))
    if reserved:
        raise ValueError(f"axis {reserved[0]!r} in {text!r}: such names stand for the sides of kernels; take another")
    return text


Pattern = Annotated[str, AfterValidator(_readable)]
"""A map, vector or expression of the notation, with `*` in names where the path has one."""


class NetworkFamily(BaseModel):
    """The description of a network.

    A `*` in a path stands for any one name of it, such as the number of a layer, and in the expressions for the same.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    """The name of the family, for messages and records."""
    prunable: list[str] = Field(min_length=1)
    """The axes whose units can be removed; `*` stands for anything."""
    modules: dict[str, Pattern]
    """Module path to its map (`a -> b`), or to the axis of a vector (a batch norm, a depthwise convolution)."""
    attributes: dict[str, Pattern] = Field(default_factory=dict)
    """Path of a number that the network's code works out from a width, to the expression that it must equal."""

    @staticmethod
    def read(path: Path) -> "NetworkFamily":
        """Read a family file.

        Raises:
            FamilyError: if the file is not valid, with the place.
        """
        try:
            return NetworkFamily.model_validate(read_yaml(path))
        except ValidationError as error:
            raise FamilyError(f"family file {path}: {problems(error, NetworkFamily)}") from error
        except ParamsError as error:
            raise FamilyError(f"family file {error}") from error

    @staticmethod
    def of(family: "NetworkFamily | Path | str") -> "NetworkFamily":
        """The family itself, or that of a file.

        Raises:
            FamilyError: as `read`.
        """
        return family if isinstance(family, NetworkFamily) else NetworkFamily.read(Path(family))

    def described(self, network: nn.Module) -> dict[str, LinearMap | Expr]:
        """Module path to description, for all modules of a network that the family speaks of.

        Raises:
            FamilyError: for a path that the network lacks, or a module described twice.
        """
        names = [name for name, _ in network.named_modules()]
        entries: dict[str, LinearMap | Expr] = {}
        for pattern, text in self.modules.items():
            for name, index in self._matches(pattern, names, "module"):
                if name in entries:
                    raise FamilyError(f"family {self.family!r} describes module {name!r} twice")
                entries[name] = parse_map(text.replace(WILD, index))
        return entries

    def numbers(self, network: nn.Module) -> dict[str, Expr]:
        """Attribute path to expression.

        Raises:
            FamilyError: for a path that the network lacks.
        """
        names = [
            f"{name}.{key}".removeprefix(".")
            for name, module in network.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, int) and not isinstance(value, bool)
        ]
        return {
            name: parse_expr(text.replace(WILD, index))
            for pattern, text in self.attributes.items()
            for name, index in self._matches(pattern, names, "attribute")
        }

    def axes(self, known: Iterable[str]) -> list[str]:
        """The axes that can be pruned, in the order of the file.

        Raises:
            FamilyError: for one that no module carries.
        """
        names = list(known)
        chosen: dict[str, None] = {}
        for pattern in self.prunable:
            matching = [name for name in names if fnmatchcase(name, pattern)]
            if not matching:
                raise FamilyError(
                    f"family {self.family!r} lists axis {pattern!r} as prunable, but no module carries it"
                    f"{nearest(pattern, names)}"
                )
            chosen |= dict.fromkeys(matching)
        return list(chosen)

    def _matches(self, pattern: str, names: list[str], what: str) -> Iterator[tuple[str, str]]:
        """Names that a pattern stands for, each with what its `*` stand for."""
        expression = re.compile(re.escape(pattern).replace(re.escape(WILD), "([^.]+)"))
        matching = [(name, match) for name in names if (match := expression.fullmatch(name))]
        if not matching:
            raise FamilyError(
                f"family {self.family!r} describes {what} {pattern!r}: {missing_key(pattern, names, 'this network')}"
            )
        return ((name, "_".join(match.groups())) for name, match in matching)
