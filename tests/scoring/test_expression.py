"""Expressions of criteria: how they are read, written and refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.describe import describe
from libprune.engine.errors import LibpruneError
from libprune.pipeline.sections import Score
from libprune.scoring.expression import criteria_of, format_criteria, named_criteria, parse_criteria
from tests.support.models import FAMILIES
from tests.support.shapes import Shape

NAMES = st.lists(st.sampled_from(["taylor", "taylor_2nd", "wanda", "obs"]), min_size=1, max_size=4, unique=True)


@given(NAMES, st.data())
def test_an_expression_reads_back_as_the_weights_that_it_was_written_from(names, data):
    counts = data.draw(st.lists(st.integers(1, 8), min_size=len(names), max_size=len(names)))
    written = "+".join(f" {count}*{name} " for name, count in zip(names, counts, strict=True))
    weights = parse_criteria(written, "weighted")
    assert list(weights) == names
    assert weights == pytest.approx({name: c / sum(counts) for name, c in zip(names, counts, strict=True)})
    assert parse_criteria(format_criteria(weights), "weighted") == pytest.approx(weights, rel=1e-4)


@pytest.mark.parametrize("fusion", ["simple", "adaptive", "learned", "best", "weighted"])
def test_names_without_weights_count_alike_under_every_fusion(fusion):
    assert parse_criteria("taylor+wanda", fusion) == {"taylor": 0.5, "wanda": 0.5}
    assert parse_criteria("taylor", fusion) == {"taylor": 1}


@pytest.mark.parametrize(
    ("text", "fusion", "message"),
    [
        ("taylor+", "weighted", "'' in score.criterion"),
        ("taylor-wanda", "weighted", "'taylor-wanda' in score.criterion = 'taylor-wanda' is no criterion"),
        ("-1*taylor+wanda", "weighted", "'-1\\*taylor' in"),
        ("taylor+2*taylor", "weighted", "names taylor twice"),
        ("0*taylor+0*wanda", "weighted", "all weights .* are 0"),
        ("2*taylor+wanda", "learned", "learned does not read"),
    ],
)
def test_what_is_no_expression_is_refused_by_name(text, fusion, message):
    with pytest.raises(LibpruneError, match=message):
        parse_criteria(text, fusion)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("taylor + ?", r"^'\?' in score\.mlp = 'taylor \+ \?' is no criterion"),
        ("taylor + wonda", r"^score\.mlp = 'wonda' is unknown; did you mean 'wanda'"),
    ],
)
def test_an_error_names_the_key_that_the_expression_stands_in(text, message):
    with pytest.raises(LibpruneError, match=message):
        named_criteria(Score(criterion="taylor", mlp=text))


def test_each_part_has_the_criteria_of_its_own_key_or_of_both():
    architecture = Shape().architecture()
    asked = criteria_of(architecture, Score(criterion="taylor", mlp="wanda + obs"))
    assert asked == {"attention": {"taylor": 1}, "mlp": {"wanda": 0.5, "obs": 0.5}}
    assert criteria_of(architecture, Score(criterion="fisher")) == {part: {"fisher": 1} for part in architecture.parts}
    shared = criteria_of(describe(FAMILIES["deepseek_v3"](0)), Score(criterion="taylor", mlp="wanda", experts="reap"))
    assert shared == {"attention": {"taylor": 1}, "mlp": {"wanda": 1}, "experts": {"reap": 1}, "shared": {"wanda": 1}}
    assert named_criteria(Score(criterion="taylor + wanda", mlp="wanda + obs")) == ["taylor", "wanda", "obs"]
