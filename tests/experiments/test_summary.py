"""Summaries of a comparison: means over seeds, overlaps, and differences beside the noise."""

import math
from itertools import combinations
from statistics import geometric_mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libprune.engine.plan import jaccard
from libprune.experiments.summary import (
    Perplexity,
    Summary,
    compare_settings,
    overlap_by_chance,
    overlap_matrix,
    reference_of,
    summarize,
)
from tests.support.compared import AFTER, RATIOS, gathered, kept_sets


def test_settings_are_listed_by_the_geometric_mean_of_their_ratios(tmp_path):
    found = summarize(gathered(tmp_path, RATIOS))
    assert [one.name for one in found] == sorted(RATIOS, key=lambda name: geometric_mean(RATIOS[name]))
    for one in found:
        assert one.before.ratio.mean == pytest.approx(geometric_mean(RATIOS[one.name]))
        assert one.before.ratio.low < one.before.ratio.mean < one.before.ratio.high


def test_overlaps_are_paired_by_seed_and_the_diagonal_is_between_seeds(tmp_path):
    kept = kept_sets()
    data = gathered(tmp_path, RATIOS, kept)
    found = summarize(data)
    matrix = overlap_matrix(data, found)
    for i, one in enumerate(found):
        for j, other in enumerate(found):
            sets, others = kept[one.name], kept[other.name]
            pairs = combinations(sets, 2) if i == j else zip(sets, others, strict=True)
            assert matrix[i, j] == pytest.approx(np.mean([jaccard(*pair) for pair in pairs]))
    share = np.mean([one.mean() for sets in kept.values() for one in sets])
    assert overlap_by_chance(data) == pytest.approx(share / (2 - share))


def test_differences_are_sorted_by_what_noise_they_exceed(tmp_path):
    good, same, bad = ({one.name: one for one in summarize(gathered(tmp_path, RATIOS))}[name] for name in RATIOS)
    assert compare_settings(bad, good).kind == "clear"
    assert compare_settings(same, good).kind == "none"
    steady = {"a": [1.200, 1.220, 1.210], "b": [1.205, 1.225, 1.215]}
    found = summarize(gathered(tmp_path, steady))
    assert (
        compare_settings(found[1], found[0]).kind == "seeds"
    )  # the same with every seed, but small beside the windows
    assert compare_settings(good, bad).factor.mean == pytest.approx(1 / compare_settings(bad, good).factor.mean)


@given(st.floats(1.01, 3), st.floats(0.001, 0.2))
def test_with_one_seed_the_windows_alone_decide(ratio, error):
    one, other = (
        Summary("a", Perplexity({0: value}, {0: error}), 0.2, {0: 20.0}, {}, math.nan, None, None)
        for value in (1.0, ratio)
    )
    clear = math.log(ratio) > 2 * math.hypot(error, error / ratio)
    assert compare_settings(other, one).kind == ("clear" if clear else "none")


def test_the_reference_is_the_named_one_or_the_best(tmp_path):
    named = gathered(tmp_path, RATIOS, reference="bad")
    assert reference_of(named, summarize(named)).name == "bad"
    data = gathered(tmp_path, RATIOS)
    found = summarize(data)
    assert reference_of(data, found).before.ratio.mean == min(one.before.ratio.mean for one in found)


def test_settings_are_compared_after_recovery_only_if_every_run_has_that_figure(tmp_path):
    every = summarize(gathered(tmp_path, RATIOS, after=AFTER))
    assert every[0].name == "bad"
    for one in every:
        assert dict(one.after.ratios) == dict(enumerate(AFTER[one.name]))
        assert dict(one.before.ratios) == dict(enumerate(RATIOS[one.name]))
        assert one.compared is one.after
    factor = compare_settings(every[-1], every[0]).factor
    assert factor.mean == pytest.approx(every[-1].after.ratio.mean / every[0].after.ratio.mean)
    some = summarize(gathered(tmp_path, RATIOS, after={"bad": AFTER["bad"]}))
    assert some[-1].name == "bad"
    assert [one.name for one in some if one.after] == ["bad"]
    assert all(one.compared is one.before for one in some)


def test_the_seconds_are_those_that_lead_to_the_compared_figure(tmp_path):
    seconds = dict.fromkeys(RATIOS, 8.0)
    for after, expected in ((None, 8.0), ({"bad": AFTER["bad"]}, 8.0), (AFTER, 12.0)):
        found = summarize(gathered(tmp_path, RATIOS, seconds=seconds, after=after))
        assert {one.seconds for one in found} == {expected}
        assert {one.name for one in found if one.recovering} == set(after or ())
    found = summarize(gathered(tmp_path, RATIOS, after=AFTER))
    assert {one.seconds for one in found} == {None}
