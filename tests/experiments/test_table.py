"""Tables of a comparison: every setting, run and pair is in them."""

import csv
import io

from libprune.experiments.summary import summarize
from libprune.experiments.table import (
    NOTHING,
    explain_columns,
    interval_text,
    overlaps_csv,
    runs_csv,
    settings_csv,
    tabulate_settings,
)
from tests.support.compared import AFTER, RATIOS, gathered, kept_sets


def test_every_table_has_every_setting_and_run(tmp_path):
    data = gathered(tmp_path, RATIOS, kept_sets(), seconds={"good": 8.0, "bad": 4.0}, reference="same")
    found = summarize(data)
    cells, header = tabulate_settings(data, found)
    assert [line[0] for line in cells] == [one.name for one in found]
    assert all(len(line) == len(header) for line in cells)
    by_name = {line[0]: dict(zip(header, line, strict=True)) for line in cells}
    assert by_name["same"]["to same"] == by_name["same"]["pruning, s"] == NOTHING
    assert (by_name["good"]["collecting, s"], by_name["good"]["pruning, s"]) == ("2.0", "6.0")
    settings = list(csv.DictReader(io.StringIO(settings_csv(data, found))))
    assert [float(row["perplexity_ratio"]) for row in settings] == [one.before.ratio.mean for one in found]
    assert [row["pruning_seconds"] for row in settings if row["setting"] == "same"] == [""]
    runs = list(csv.DictReader(io.StringIO(runs_csv(data))))
    assert {(row["setting"], float(row["perplexity_ratio"])) for row in runs} == {
        (name, ratio) for name, ratios in RATIOS.items() for ratio in ratios
    }
    pairs = list(csv.DictReader(io.StringIO(overlaps_csv(data, found))))
    assert len(pairs) == 6
    assert all(0 <= float(row["overlap"]) <= 1 for row in pairs)


def test_recovery_has_columns_of_its_own_where_a_setting_was_trained(tmp_path):
    data = gathered(tmp_path, RATIOS, seconds=dict.fromkeys(RATIOS, 8.0), after={"bad": AFTER["bad"]})
    found = summarize(data)
    cells, header = tabulate_settings(data, found)
    by_name = {line[0]: dict(zip(header, line, strict=True)) for line in cells}
    bad = next(one for one in found if one.name == "bad")
    assert by_name["bad"]["perplexity"] == interval_text(bad.before.ratio)
    assert by_name["bad"]["recovered"] == interval_text(bad.after.ratio)
    assert (by_name["bad"]["trained on, tokens"], by_name["bad"]["trained parameters"]) == ("40,960", "113,274")
    assert (by_name["bad"]["recovering, s"], by_name["good"]["recovering, s"]) == ("4.0", NOTHING)
    assert by_name["good"]["recovered"] == by_name["good"]["recovered, ± windows"] == NOTHING
    assert "compared by the perplexity before recovery" in explain_columns(found)
    settings = {row["setting"]: row for row in csv.DictReader(io.StringIO(settings_csv(data, found)))}
    assert float(settings["bad"]["recovered_ratio_low"]) == bad.after.ratio.low
    assert float(settings["bad"]["perplexity_ratio"]) == bad.before.ratio.mean
    assert settings["good"]["recovered_ratio"] == settings["good"]["recovering_seconds"] == ""
    runs = list(csv.DictReader(io.StringIO(runs_csv(data))))
    assert [float(row["recovered_ratio"]) for row in runs if row["setting"] == "bad"] == AFTER["bad"]
    assert {row["recovered_tokens"] for row in runs if row["setting"] == "good"} == {""}


def test_without_recovery_no_table_has_a_word_of_it(tmp_path):
    data = gathered(tmp_path, RATIOS, kept_sets())
    found = summarize(data)
    texts = [settings_csv(data, found).partition("\n")[0], runs_csv(data), explain_columns(found)]
    assert "recover" not in " ".join([*tabulate_settings(data, found)[1], *texts])
