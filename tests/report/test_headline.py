"""The headline and the sentence to decide by hold the measured numbers."""

import math

import pytest

from libprune.pipeline.terminal import text_table
from libprune.report.headline import (
    HEADER,
    PERPLEXITY,
    decision,
    describe_protocol,
    digits,
    duration,
    headline_rows,
    ratio_interval,
)
from tests.support.evaluated import EVALUATION, changed, trained


def test_the_headline_holds_the_measured_numbers():
    rows = {row[0]: row[1:] for row in headline_rows(EVALUATION)}
    assert rows["perplexity"] == ("20.74 ± 0.31", "26.37 ± 0.41", "× 1.272 ± 0.009")
    assert rows["decoder parameters"] == ("106,168,320", "84,934,656", "-20.0 %")
    assert rows["all parameters"] == ("134,515,008", "113,281,344", "-15.8 %")
    assert rows["weights, MB"] == ("269", "227", "-15.8 %")
    assert rows["KV cache, bytes a token"] == ("23,040", "15,360", "-33.3 %")
    assert rows["prefill, tokens/s"][:2] == ("1,234", "1,481")
    assert "1.20" in rows["prefill, tokens/s"][2]
    assert rows["decode, tokens/s"][:2] == ("56.7", "68.9")
    assert rows["decode, tokens/s"][2] == "× 1.22 (1.15 to 1.26)"
    assert rows["piqa, acc_norm, %"] == ("67.1 ± 1.1", "61.0 ± 1.1", "-6.1")
    assert rows["winogrande, acc, %"] == ("51.0 ± 1.4", "52.0 ± 1.4", "+1.0")


def test_one_sentence_has_share_size_speed_and_cost_each_with_its_uncertainty_and_the_verdict():
    assert decision(EVALUATION, "trust it") == (
        "Without 20.0 % of the decoder's parameters (15.8 % of all) it takes 227 MB instead of 269, and beside the "
        "dense model its speed is × 1.20 (1.11 to 1.29) in prefill and × 1.22 (1.15 to 1.26) in decode, its perplexity "
        "× 1.272 (95 % interval 1.254 to 1.289): **trust it**."
    )


def test_the_sentence_counts_what_went_with_the_vocabulary():
    said = decision(changed(vocabulary={"bytes": {"before": 300_000_000, "after": 269_000_000}}), "trust it")
    assert "(15.8 % of all, with the rows that went from the vocabulary) it takes 227 MB instead of 300, and" in said


def test_the_sentence_of_a_small_model_that_does_not_write_names_what_there_is():
    small = changed(pruned={"bytes": 1_234_567, "decode": 0}, dense={"bytes": 45_678_901}, model={"head": "masked_lm"})
    said = decision(small, "trust it")
    for words in (
        "it takes 1.23 MB instead of 45.7,",
        "(1.11 to 1.29) in prefill, its perplexity of masked tokens × 1.272",
    ):
        assert words in said
    assert "decode" not in said.replace("decoder", "")


def test_the_interval_of_a_ratio_is_that_of_student_and_holds_the_ratio():
    low, high = ratio_interval({"value": 1.25, "se": 0.05}, 16)
    assert math.log(high / 1.25) == pytest.approx(2.1314 * 0.04, rel=1e-4)  # the 97.5 % quantile at 15 degrees
    assert low * high == pytest.approx(1.25**2)
    assert ratio_interval({"value": 1.25, "se": 0.05}, 1000)[1] < high


@pytest.mark.parametrize(
    ("windows", "ratio"), [(1, (1.2, math.nan)), (9, (math.inf, math.nan)), (9, (math.nan, 0.1)), (2, (1.2, 1e9))]
)
def test_an_interval_that_nothing_is_known_of_is_said_to_be_unknown(windows, ratio):
    given = changed(perplexity_ratio=dict(zip(("value", "se"), ratio, strict=True)), protocol={"windows": windows})
    assert "(interval unknown): **" in decision(given, "no")


# With a recovered model


def test_rows_of_the_recovered_model_lie_below_those_of_the_pruned_one_and_change_nothing_else():
    rows = headline_rows(trained())
    added = [row for row in rows if row[0].endswith(", recovered")]
    assert [row for row in rows if row not in added] == headline_rows(EVALUATION)
    assert added == [
        ("perplexity, recovered", "", "23.46 ± 0.33", "× 1.131 ± 0.006"),
        ("piqa, recovered", "", "66.0 ± 1.3", "-1.1"),
        ("winogrande, recovered", "", "53.0 ± 1.4", "+2.0"),
    ]
    names = [row[0] for row in rows]
    assert [names[names.index(row[0]) - 1] for row in added] == [
        "perplexity",
        "piqa, acc_norm, %",
        "winogrande, acc, %",
    ]


@pytest.mark.parametrize("head", PERPLEXITY)
def test_the_table_fits_eighty_columns_with_a_recovered_model_and_without(head):
    for result in (EVALUATION, trained()):
        table = text_table(headline_rows(result | {"model": result["model"] | {"head": head}}), HEADER)
        assert max(map(len, table.split("\n"))) <= 80


def test_the_sentence_of_a_recovered_model_has_its_perplexity():
    said = decision(trained(), "trust it")
    assert "its perplexity after training × 1.131 (95 % interval 1.118 to 1.144)" in said
    assert said.partition("perplexity")[0] == decision(EVALUATION, "trust it").partition("perplexity")[0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 seconds"), (60.0, "1.0 minutes"), (72_000.0, "1,200.0 minutes")]
)
def test_a_time_is_said_in_seconds_or_minutes(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(14.26, "14.3"), (1.04, "1.04"), (0.2081, "0.208"), (1234.5, "1,234"), (7, "7"), (99.97, "100.0"), (0.0, "0")],
)
def test_a_measured_number_has_at_least_three_digits(number, text):
    assert digits(number) == text


SIMILAR = {"cosine": 0.9712, "cosine_se": 0.0011, "rank_correlation": 0.9765, "rank_correlation_se": 0.0029}


def test_embeddings_have_cosine_and_correlation_in_place_of_perplexity():
    found = changed(model={"head": "embedding"}, pruned=SIMILAR)
    rows = {row[0]: row[1:] for row in headline_rows(found)}
    assert rows["cosine to the dense embedding"] == ("1", "0.9712 ± 0.0011", "-0.0288")
    assert rows["rank correlation of similarities"] == ("1", "0.9765 ± 0.0029", "-0.0235")
    assert not any("perplexity" in name for name in rows)
    said = decision(found, "trust it")
    assert "its cosine to the dense embedding 0.9712 (95 % interval 0.9689 to 0.9735), the rank correlation of" in said
    assert "perplexity" not in said
    assert describe_protocol(found).startswith("Cosines and similarities of pairs on 24 windows")
