"""The headline and its summary hold the measured numbers."""

import pytest

from libprune.pipeline.terminal import text_table
from libprune.report.headline import HEADER, PERPLEXITY, digits, duration, headline_rows, summarize
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


def test_the_summary_has_size_speed_and_loss_each_with_its_uncertainty():
    size, speed, loss = summarize(EVALUATION).split("\n")
    assert "20.0 %" in size
    assert "exact" in size
    assert "× 1.20 (1.11 to 1.29)" in speed
    assert "× 1.22 (1.15 to 1.26)" in speed
    assert "× 1.272 ± 0.009" in loss


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


def test_the_loss_is_said_before_and_after_training_with_its_tokens_and_its_time():
    before, after = (summarize(result).split("\n") for result in (EVALUATION, trained()))
    assert after[:2] == before[:2]
    for words in ("× 1.272 ± 0.009 as pruned", "× 1.131 ± 0.006 after training", "40,960 tokens (3.2 minutes)"):
        assert words in after[2]
    assert "train" not in before[2]
    assert summarize(changed(recovered=None)) == "\n".join(before)


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
