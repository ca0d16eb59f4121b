"""Several texts with shares: every part of their order holds the shares, whatever is taken from it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.pipeline.sections import MOST_TEXTS, Share, Tokenize
from libprune.texts.shares import (
    divided,
    judging,
    judging_shares,
    keys_of,
    mixed,
    named,
    numbered,
    parts_of,
    rows_of,
    shares_of,
)

COUNTS = st.lists(st.integers(1, 60), min_size=1, max_size=MOST_TEXTS)


def several(**shares: float) -> tuple[Share, ...]:
    return tuple(Share(text=name, share=share) for name, share in shares.items())


@given(COUNTS, st.integers(0, 2**32))
def test_every_beginning_and_every_end_holds_the_shares(counts, seed):
    order = mixed(counts, seed)
    number = len(order)
    assert sorted(order.tolist()) == list(range(sum(counts)))
    for rows, count in zip(rows_of(order, counts), counts, strict=True):
        within = 1 + len(counts) * count / number
        taken = np.cumsum(np.isin(np.arange(number), rows))
        even = np.arange(1, number + 1) * count / number
        assert (abs(taken - even) < within).all()
        assert (np.diff(order[rows]) > 0).all(), "sequences of a text stay in their order"


@given(COUNTS, st.integers(0, 2**32))
def test_the_order_depends_on_counts_and_seed_alone(counts, seed):
    np.testing.assert_array_equal(mixed(counts, seed), mixed(counts, seed))
    if max(counts) == 1 and len(counts) == MOST_TEXTS:
        orders = {tuple(mixed(counts, other)) for other in range(seed, seed + 8)}
        assert len(orders) > 1


def test_every_eighth_sequence_is_not_of_one_text():
    """Those are held out when a damping is chosen; two texts in turns would give one alone."""
    order = mixed([64, 64], 0)
    of_first = (order[::8] < 64).mean()
    assert 0.2 < of_first < 0.8


@given(st.integers(1, 500), st.lists(st.integers(1, 100), min_size=1, max_size=MOST_TEXTS))
def test_a_number_is_divided_up_to_rounding_and_each_text_gives_something(number, weights):
    shares = [weight / sum(weights) for weight in weights]
    parts = divided(number, shares)
    assert min(parts) >= 1
    assert all(part == 1 or abs(part - share * number) <= 1 for part, share in zip(parts, shares, strict=True))
    assert sum(parts) == number or 1 in parts


def test_a_text_without_shares_has_all_and_keeps_its_settings():
    settings = Tokenize(text="a", column="body")
    assert shares_of("a") == (Share(text="a", share=1.0),)
    assert parts_of(settings) == [settings]
    assert judging(settings) is settings


def test_each_text_is_read_by_its_own_keys_and_gives_its_share():
    texts = (Share(text="a", share=0.75, column="body"), Share(text="b", share=0.25, split="dev"))
    settings = Tokenize(text=texts, calibration_sequences=8, evaluation_windows=4, seed=3)
    first, second = parts_of(settings)
    assert (first.text, first.column, first.split, first.seed) == ("a", "body", None, 3)
    assert (second.text, second.column, second.split) == ("b", None, "dev")
    assert [part.calibration_sequences for part in (first, second)] == [6, 2]
    assert [part.evaluation_windows for part in (first, second)] == [3, 1]
    assert keys_of(texts[0]) == {"text": "a", "config": None, "revision": None, "split": None, "column": "body",
                                 "streaming": None}  # fmt: skip


def test_written_text_judges_only_where_it_stands_alone():
    texts = several(a=0.3, self=0.4, b=0.3)
    assert judging_shares(texts) == [0.5, 0.0, 0.5]
    windows = [part.evaluation_windows for part in parts_of(Tokenize(text=texts, evaluation_windows=6))]
    assert windows == [3, 0, 3]
    assert judging_shares(several(self=1.0)) == [1.0]
    assert parts_of(Tokenize(text=several(self=1.0), evaluation_windows=6))[0].evaluation_windows == 6


def test_a_text_that_judges_alone_gives_all_windows_and_is_read_by_the_keys_of_its_entry():
    texts = (Share(text="a", share=0.5, column="body"), Share(text="b", share=0.5))
    listed, other = (
        Tokenize(text=texts, evaluation_text=name, evaluation_split="test", evaluation_windows=6) for name in ("a", "c")
    )
    assert [part.evaluation_windows for part in parts_of(listed)] == [6, 6]
    assert (judging(listed).text, judging(listed).column) == ("a", "body")
    assert (judging(other).column, judging(other).evaluation_text) == (None, "c")


def test_texts_are_named_with_their_shares_if_there_are_several():
    assert named([("a", 1.0)]) == "a"
    assert named([("a", 0.125), ("b", 0.875)]) == "12.5 % a, 87.5 % b"


@pytest.mark.parametrize(("text", "names"), [(None, []), ("a", ["a"]), (several(a=0.5, b=0.5), ["a", "b"])])
def test_there_is_a_link_for_every_text_that_may_be_listed(text, names):
    found = numbered("text", "tokenize.text", text)
    assert list(found) == [f"text-{number}" for number in range(1, MOST_TEXTS + 1)]
    assert list(found.values()) == [("tokenize.text", name) for name in [*names, *[None] * (MOST_TEXTS - len(names))]]
