"""The notation: what it says of sizes and positions, and that sizes are solved from equations."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.axes import Equation, Expr, LinearMap, parse_expr, parse_map, solve
from libprune.engine.errors import NotationError

AXES = ("kv", "q", "d", "ffn")
DECODER = {"model": 5, "ffn": 7, "kv": 3, "q": 2, "d": 4}


@st.composite
def terms(draw, names, depth):
    """A product in which no axis occurs twice."""
    rest = draw(st.permutations(names))[: draw(st.integers(1, len(names)))]
    factors = []
    while rest:
        taken = draw(st.integers(1, len(rest))) if depth else 0
        factors.append(draw(expressions(tuple(rest[:taken]), depth - 1)) if taken else rest[0])
        rest = rest[max(taken, 1) :]
    return tuple(factors)


@st.composite
def expressions(draw, names=AXES, depth=2):
    return Expr(tuple(draw(st.lists(terms(names, depth), min_size=1, max_size=1 + depth))))


axis_sizes = st.fixed_dictionaries({name: st.integers(1, 3) for name in AXES})


def positions(expr: Expr, sizes: dict[str, int]) -> list[dict[str, int]]:
    """The index of every axis at every position, by plain enumeration: the meaning of the notation."""
    return [place for term in expr.terms for place in _term_positions(term, sizes)]


def _term_positions(term, sizes):
    choices = [positions(f, sizes) if isinstance(f, Expr) else [{f: i} for i in range(sizes[f])] for f in term]
    return [{axis: index for place in places for axis, index in place.items()} for places in product(*choices)]


# The grammar


@pytest.mark.parametrize(
    ("text", "expr"),
    [
        ("model", Expr((("model",),))),
        ("kv q d", Expr((("kv", "q", "d"),))),
        ("kv q d + kv d", Expr((("kv", "q", "d"), ("kv", "d")))),
        ("kv (d + d)", Expr((("kv", Expr((("d",), ("d",)))),))),
        ("  kv\n( d+d )", Expr((("kv", Expr((("d",), ("d",)))),))),
        ("((d))", Expr(((Expr(((Expr((("d",),)),),)),),))),
    ],
)
def test_expressions_are_read(text, expr):
    assert parse_expr(text) == expr


def test_maps_and_vectors_are_told_apart():
    assert parse_map("kv q d -> model") == LinearMap(parse_expr("kv q d"), parse_expr("model"))
    assert str(parse_map("kv q d -> model")) == "kv q d -> model"
    assert parse_map("d") == parse_expr("d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an axis name is missing"),
        ("kv +", "an axis name is missing"),
        ("+ kv", "an axis name is missing"),
        ("kv + + d", "an axis name is missing"),
        ("kv ()", "an axis name is missing"),
        ("kv (d + d", r"a '\(' is not closed"),
        ("kv d)", r"unexpected '\)'"),
        ("kv - d", "cannot read '- d'"),
        ("kv 0", "cannot read '0'"),
        ("-> model", "an axis name is missing"),
        ("model ->", "an axis name is missing"),
        ("a -> b -> c", "more than one '->'"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_place(text, message):
    with pytest.raises(NotationError, match=message):
        parse_map(text)


@given(expressions())
def test_an_expression_reads_back_as_written(expr):
    assert parse_expr(str(expr)) == expr


# Sizes and units


@given(expressions(), axis_sizes)
def test_positions_are_enumerated_with_the_last_axis_fastest(expr, sizes):
    expected = positions(expr, sizes)
    assert expr.size(sizes) == len(expected)
    for axis in AXES:
        assert expr.units(axis, sizes).tolist() == [place.get(axis, -1) for place in expected]


@given(expressions(), axis_sizes)
def test_every_unit_owns_equally_many_positions(expr, sizes):
    for axis in expr.names:
        units = expr.units(axis, sizes)
        assert len(set(np.bincount(units[units >= 0], minlength=sizes[axis]))) == 1


@given(expressions(), axis_sizes, st.data())
def test_keeping_in_two_steps_is_keeping_once(expr, sizes, data):
    axis = data.draw(st.sampled_from(sorted(expr.names)))
    first = _draw_keep(data, sizes[axis])
    second = _draw_keep(data, int(first.sum()))
    both = first.copy()
    both[first] = second

    once = np.flatnonzero(expr.kept(axis, sizes, both))
    after_first = np.flatnonzero(expr.kept(axis, sizes, first))
    twice = after_first[expr.kept(axis, {**sizes, axis: int(first.sum())}, second)]
    assert twice.tolist() == once.tolist()
    assert expr.size({**sizes, axis: int(both.sum())}) == len(once)


def _draw_keep(data, size):
    """A mask that keeps at least one unit."""
    return np.isin(np.arange(size), data.draw(st.lists(st.integers(0, size - 1), min_size=1)))


@given(expressions(), axis_sizes)
def test_keeping_all_or_none_spares_what_belongs_to_no_unit(expr, sizes):
    for axis in AXES:
        unowned = [axis not in place for place in positions(expr, sizes)]
        assert expr.kept(axis, sizes, np.ones(sizes[axis], bool)).all()
        assert expr.kept(axis, sizes, np.zeros(sizes[axis], bool)).tolist() == unowned


def test_an_axis_twice_in_a_product_has_no_units():
    with pytest.raises(NotationError, match=r"axis 'd' occurs twice in the product d \(kv \+ d\)"):
        parse_expr("d (kv + d)").units("d", DECODER)


def test_an_axis_of_unknown_size_is_named_with_the_nearest():
    with pytest.raises(NotationError, match=r"no entry 'fnn'.*did you mean 'ffn'"):
        parse_expr("kv fnn").size(DECODER)


# Layouts, on rows labelled by hand: hundreds say query, key or value, tens the head, units the position in the head.

PHI3 = [100, 101, 110, 111, 120, 121, 130, 131, 200, 201, 210, 211, 300, 301, 310, 311]  # query heads 2g, 2g+1 in g
NEOX = [100, 101, 200, 201, 300, 301, 110, 111, 210, 211, 310, 311]
GPT2 = [100, 101, 110, 111, 200, 201, 210, 211, 300, 301, 310, 311]
GATE_UP = [100, 101, 102, 200, 201, 202]


@pytest.mark.parametrize(
    ("layout", "text", "axis", "unit", "expected"),
    [
        (PHI3, "kv q d + kv d + kv d", "kv", 0, [100, 101, 110, 111, 200, 201, 300, 301]),
        (PHI3, "kv q d + kv d + kv d", "kv", 1, [120, 121, 130, 131, 210, 211, 310, 311]),
        (PHI3, "kv q d + kv d + kv d", "d", 1, [101, 111, 121, 131, 201, 211, 301, 311]),
        (NEOX, "kv (d + d + d)", "kv", 1, [110, 111, 210, 211, 310, 311]),
        (NEOX, "kv (d + d + d)", "d", 0, [100, 200, 300, 110, 210, 310]),
        (GPT2, "kv d + kv d + kv d", "kv", 0, [100, 101, 200, 201, 300, 301]),
        (GATE_UP, "ffn + ffn", "ffn", 2, [102, 202]),
    ],
)
def test_a_unit_is_the_rows_that_its_labels_say(layout, text, axis, unit, expected):
    sizes = {"kv": 2, "q": 2, "d": 2, "ffn": 3}
    units = parse_expr(text).units(axis, sizes)
    assert np.array(layout)[units == unit].tolist() == expected


@pytest.mark.parametrize(
    ("layout", "queries", "wrong"),
    [
        (PHI3, 2, "q kv d + kv d + kv d"),
        (PHI3, 2, "kv (q d + d + d)"),
        (NEOX, 1, "kv d + kv d + kv d"),
        (GPT2, 1, "kv (d + d + d)"),
    ],
)
def test_a_wrong_layout_shows_as_mixed_heads(layout, queries, wrong):
    units = parse_expr(wrong).units("kv", {"kv": 2, "q": 2, "d": 2})
    labels = np.array(layout)[units == 0]
    groups = np.where(labels < 200, labels % 100 // 10 // queries, labels % 100 // 10)
    assert set(groups) == {0, 1}


# Equations

LLAMA = {"hidden": "model", "heads": "kv q", "kv_heads": "kv", "q_proj": "kv q d", "qkv": "kv q d + kv d", "mlp": "ffn"}


def equations(sizes, texts):
    return [Equation(parse_expr(text), parse_expr(text).size(sizes), where) for where, text in texts.items()]


@given(st.permutations(list(LLAMA)), axis_sizes, st.integers(1, 9))
def test_sizes_are_solved_in_any_order(order, sizes, model):
    sizes = {**sizes, "model": model}
    assert solve(equations(sizes, {where: LLAMA[where] for where in order})) == sizes


@given(expressions(), axis_sizes, st.randoms())
def test_any_expression_is_solved_for_its_last_unknown(expr, sizes, random):
    axis = sorted(expr.names)[-1]
    known = [Equation(parse_expr(name), sizes[name], name) for name in expr.names - {axis}]
    told = [*known, Equation(expr, expr.size(sizes), "weight")]
    random.shuffle(told)
    assert solve(told) == {name: sizes[name] for name in expr.names}


@given(st.sampled_from(sorted(LLAMA)), st.sampled_from([-1, 1]), st.permutations(list(LLAMA)))
def test_one_changed_number_is_a_contradiction(changed, by, order):
    told = equations(DECODER, {where: LLAMA[where] for where in order} | {"again": LLAMA[changed]})
    with pytest.raises(NotationError, match=" = "):
        solve([*told[:-1], Equation(told[-1].expr, told[-1].value + by, "again")])


def test_a_contradiction_names_both_sides():
    told = [*equations(DECODER, {"kv_heads": "kv"}), Equation(parse_expr("kv"), 4, "dimension 0 of k_proj")]
    with pytest.raises(NotationError, match="dimension 0 of k_proj = 4, but kv is 3 with kv=3"):
        solve(told)


@pytest.mark.parametrize(("heads", "text"), [(8, "kv q"), (3, "kv q + kv")])
def test_a_size_that_is_not_whole_or_not_positive_is_refused(heads, text):
    told = [*equations(DECODER, {"kv_heads": "kv"}), Equation(parse_expr(text), heads, "heads")]
    with pytest.raises(NotationError, match=rf"heads = {heads} does not fit .*kv=3.*no whole size of axis 'q'"):
        solve(told)


def test_an_axis_that_nothing_determines_is_named():
    with pytest.raises(NotationError, match=r"nothing says how large axis 'd' is \(q_proj is kv q d\)"):
        solve(equations(DECODER, {"kv_heads": "kv", "q_proj": "kv q d"}))
