"""Tables of a comparison: every setting, run and pair is in them."""

import csv
import io

from libprune.experiments.summary import summarize
from libprune.experiments.table import NOTHING, overlaps_csv, runs_csv, settings_csv, tabulate_settings
from tests.support.compared import RATIOS, gathered, kept_sets


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
