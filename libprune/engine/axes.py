"""The axis notation: what the positions of a tensor dimension mean.

    expr   := term ('+' term)*                concatenation                       "kv q d + kv d + kv d"
    term   := factor+                         product, the last axis fastest      "kv q d"
    factor := NAME | NUMBER | '(' expr ')'    interleaving                        "kv (d + d + d)", "ffn 2"
    map    := expr ('->' | '<-') expr         a linear map, input to output       "kv q d -> model"
    entry  := (expr '|')* (map | expr)        a tensor of several dimensions      "experts | ffn + ffn <- model"

An axis has a size, and an index of an axis is a unit. `Expr.units` says which unit each flat
position of a dimension belongs to; costs, masks, slices and statistics all follow from it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np
from numpy.typing import NDArray

from libprune.engine.errors import NotationError, missing_key

_TOKEN = re.compile(r"\s*(?:([A-Za-z_]\w*|[1-9]\d*)|([()+]))")

Sizes = Mapping[str, int]
Term = tuple["str | Expr", ...]


@dataclass(frozen=True)
class Expr:
    """A concatenation of products of axes; a factor of a product is an axis name, a number or an `Expr`."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return " + ".join(
            " ".join(factor if isinstance(factor, str) else f"({factor})" for factor in term) for term in self.terms
        )

    @property
    def names(self) -> frozenset[str]:
        """All axis names that occur in the expression."""
        occurring: set[str] = set()
        for term in self.terms:
            for factor in term:
                occurring |= factor.names if isinstance(factor, Expr) else set() if factor.isdigit() else {factor}
        return frozenset(occurring)

    def size(self, sizes: Sizes) -> int:
        """The number of positions of the dimension, for the given axis sizes."""
        total = 0
        for term in self.terms:
            product = 1
            for factor in term:  # most are names, and a call takes longer than looking them up
                if isinstance(factor, str) and factor in sizes:
                    product *= sizes[factor]
                else:
                    product *= _factor_size(factor, sizes)
            total += product
        return total

    def units(self, axis: str, sizes: Sizes) -> NDArray[np.int64]:
        """For each position the index of `axis` that it belongs to, or -1; shape ``[size]``."""
        return np.concatenate([_term_units(term, axis, sizes) for term in self.terms])

    def kept(self, axis: str, sizes: Sizes, keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether each position stays when the units of `axis` where ``keep`` is false go.

        Positions that belong to no unit of the axis stay. ``keep`` has shape ``[sizes[axis]]``.
        """
        units = self.units(axis, sizes)
        return np.where(units < 0, True, keep[units])


@dataclass(frozen=True)
class LinearMap:
    """A linear map: the axes of its input and of its output. A bias lives on the output.

    Attributes:
        input: the axes of its input.
        output: the axes of its output.
        backwards: whether it was written `output <- input`, the order in which a tensor without a module stores it.
    """

    input: Expr
    output: Expr
    backwards: bool = False

    def __str__(self) -> str:
        return f"{self.output} <- {self.input}" if self.backwards else f"{self.input} -> {self.output}"

    @property
    def names(self) -> frozenset[str]:
        """All axis names that occur on either side."""
        return self.input.names | self.output.names


@dataclass(frozen=True)
class Stack:
    """A tensor of several dimensions: leading ones, and behind them a vector or, for each of their indices, a map.

    Attributes:
        leading: the axes of each leading dimension.
        each: what lies behind them.
    """

    leading: tuple[Expr, ...]
    each: "LinearMap | Expr"

    def __str__(self) -> str:
        return " | ".join(map(str, (*self.leading, self.each)))

    @property
    def names(self) -> frozenset[str]:
        """All axis names that occur in the tensor."""
        return self.each.names.union(*(expr.names for expr in self.leading))


Entry = LinearMap | Expr | Stack
"""What a family file says of a module or of a tensor."""


def _factor_size(factor: "str | Expr", sizes: Sizes) -> int:
    if isinstance(factor, Expr):
        return factor.size(sizes)
    if factor.isdigit():
        return int(factor)
    if factor not in sizes:
        raise NotationError(missing_key(factor, sizes, "the table of axis sizes"))
    return sizes[factor]


def _term_units(term: Term, axis: str, sizes: Sizes) -> NDArray[np.int64]:
    """Units of a product: the one factor that holds the axis, repeated over the other factors."""
    shape = [_factor_size(factor, sizes) for factor in term]
    holders = [i for i, f in enumerate(term) if axis == f or (isinstance(f, Expr) and axis in f.names)]
    if not holders:
        return np.full(prod(shape), -1, dtype=np.int64)
    if len(holders) > 1:
        raise NotationError(f"axis {axis!r} occurs twice in the product {Expr((term,))}")
    holder = term[holders[0]]
    inner = np.arange(sizes[axis]) if isinstance(holder, str) else holder.units(axis, sizes)
    others_after = len(shape) - holders[0] - 1
    column = inner.reshape((-1,) + (1,) * others_after)
    return np.broadcast_to(column, shape).reshape(-1).astype(np.int64)


@cache
def parse_expr(text: str) -> Expr:
    """Read an expression such as ``"kv q d + kv d"``.

    Raises:
        NotationError: if the text does not follow the grammar, with the place.
    """
    tokens = _tokens(text)
    expr, rest = _parse_expr(tokens, text)
    if rest:
        raise NotationError(f"axis expression {text!r}: unexpected {rest[0]!r}")
    return expr


@cache
def parse_map(text: str) -> LinearMap | Expr:
    """Read a map (``"model -> kv d"``, or ``"kv d <- model"``) or a vector (``"d"``)."""
    sides = re.split(r"(->|<-)", text)
    if len(sides) == 1:
        return parse_expr(text)
    if len(sides) != 3:
        raise NotationError(f"axis expression {text!r}: more than one '->'")
    first, arrow, last = parse_expr(sides[0].strip()), sides[1], parse_expr(sides[2].strip())
    return LinearMap(first, last) if arrow == "->" else LinearMap(last, first, backwards=True)


@cache
def parse_entry(text: str) -> Entry:
    """Read a map, a vector, or a tensor of several dimensions (``"experts | ffn + ffn <- model"``)."""
    *leading, each = text.split("|")
    if not leading:
        return parse_map(text)
    return Stack(tuple(parse_expr(expr.strip()) for expr in leading), parse_map(each.strip()))


def _tokens(text: str) -> list[str]:
    tokens, position = [], 0
    end = len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise NotationError(f"axis expression {text!r}: cannot read {text[position:].strip()!r}")
        tokens.append(match.group(1) or match.group(2))
        position = match.end()
    return tokens


def _parse_expr(tokens: list[str], text: str) -> tuple[Expr, list[str]]:
    terms = []
    while True:
        term, tokens = _parse_term(tokens, text)
        terms.append(term)
        if not tokens or tokens[0] != "+":
            return Expr(tuple(terms)), tokens
        tokens = tokens[1:]


def _parse_term(tokens: list[str], text: str) -> tuple[Term, list[str]]:
    factors: list[str | Expr] = []
    while tokens and tokens[0] not in {"+", ")"}:
        if tokens[0] == "(":
            inner, rest = _parse_expr(tokens[1:], text)
            if not rest or rest[0] != ")":
                raise NotationError(f"axis expression {text!r}: a '(' is not closed")
            factors.append(inner)
            tokens = rest[1:]
        else:
            factors.append(tokens[0])
            tokens = tokens[1:]
    if not factors:
        raise NotationError(f"axis expression {text!r}: an axis name is missing")
    return tuple(factors), tokens


@dataclass(frozen=True)
class Equation:
    """``expr`` has ``value`` positions; ``where`` names the config key or weight that says so."""

    expr: Expr
    value: int
    where: str


def solve(equations: list[Equation]) -> dict[str, int]:
    """Axis sizes from equations such as ``kv q = 9``, ``kv = 3``, ``kv q d = 576``.

    An equation is solved when one unknown is left in it and it is linear in that unknown.

    Raises:
        NotationError: if two equations contradict each other or an axis stays unknown.
    """
    sizes: dict[str, int] = {}
    progress = True
    while progress:
        progress = False
        for equation in equations:
            unknown = equation.expr.names - sizes.keys()
            if len(unknown) == 1:
                axis = next(iter(unknown))
                sizes[axis] = _solve_one(equation, axis, sizes)
                progress = True
    _check(equations, sizes)
    return sizes


def _solve_one(equation: Equation, axis: str, sizes: Sizes) -> int:
    constant = equation.expr.size({**sizes, axis: 0})
    slope = equation.expr.size({**sizes, axis: 1}) - constant
    value, remainder = divmod(equation.value - constant, slope) if slope else (0, 1)
    if remainder or value < 1:
        raise NotationError(
            f"{equation.where} = {equation.value} does not fit {equation.expr} with {_show(sizes)}: "
            f"no whole size of axis {axis!r} solves it"
        )
    return value


def _check(equations: list[Equation], sizes: Sizes) -> None:
    for equation in equations:
        unknown = sorted(equation.expr.names - sizes.keys())
        if unknown:
            raise NotationError(f"nothing says how large axis {unknown[0]!r} is ({equation.where} is {equation.expr})")
        positions = equation.expr.size(sizes)
        if positions != equation.value:
            raise NotationError(
                f"{equation.where} = {equation.value}, but {equation.expr} is {positions} with {_show(sizes)}"
            )


def _show(sizes: Sizes) -> str:
    return ", ".join(f"{name}={size}" for name, size in sorted(sizes.items())) or "no size known"
