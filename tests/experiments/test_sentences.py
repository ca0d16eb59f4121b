"""Sentences about a comparison: each says what the figures say, and what is not known."""

from libprune.experiments.results import gather_results
from libprune.experiments.sentences import explain_results
from libprune.experiments.summary import compare_settings, summarize
from tests.support.compared import AFTER, RATIOS, comparison, experiment, gathered, kept_sets


def test_settings_without_a_common_seed_are_not_compared(tmp_path):
    data = gathered(tmp_path, RATIOS)
    del data.results["good"][0], data.results["good"][1], data.results["bad"][2]
    good, bad = ({one.name: one for one in summarize(data)}[name] for name in ("good", "bad"))
    assert compare_settings(good, bad) is None
    assert any("Without a seed in common: bad." in text for text in explain_results(data, [good, bad]))


def test_the_words_name_every_setting_once_by_what_it_exceeds(tmp_path):
    data = gathered(tmp_path, RATIOS, kept_sets())
    verdict, *others = explain_results(data, summarize(data))
    best = summarize(data)[0].name
    rest = "same" if best == "good" else "good"
    assert f"is that of {best}: × 1.210 (" in verdict
    assert f"Beside {best}, with the factor between the two perplexities. Larger than the noise: bad × 1.76" in verdict
    assert f"Not larger than the noise: {rest} × 1.000 (" in verdict
    assert "with 3 seeds it reaches 4.3 standard errors" in others[0]
    assert "in part the luckiest" in others[0]
    assert any("independent choices would by 0." in text for text in others)


def test_one_seed_is_said_to_tell_nothing_of_others(tmp_path):
    data = gathered(tmp_path, {"a": [1.2], "b": [1.9]}, reference="a")
    text = " ".join(explain_results(data, summarize(data)))
    assert "With one seed nothing is known of what another calibration text would do." in text
    assert "All are on the same evaluation windows" in text
    assert "luckiest" not in text
    assert "Student" not in text


def test_other_windows_and_other_sizes_are_pointed_out(tmp_path):
    made = comparison(tmp_path)
    rows = [experiment(run, 1.2, removed=0.2 + 0.1 * i, dense=20.0 + i) for i, run in enumerate(made.runs())]
    data = gather_results(made, rows, {}, lambda _: None, None, {})
    text = " ".join(explain_results(data, summarize(data)))
    assert "compare only roughly" in text
    assert "on the same evaluation windows" not in text
    assert "% of the decoder: a larger model" in text


def test_the_words_say_on_which_figure_a_setting_is_the_best(tmp_path):
    data = gathered(tmp_path, RATIOS, after=AFTER)
    verdict, ordered, *_ = explain_results(data, summarize(data))
    assert "The lowest perplexity after recovery over the calibration seeds 0, 1, 2 is that of bad: × 1.100" in verdict
    assert ordered == "The settings are ordered and compared by the perplexity after recovery."
    data = gathered(tmp_path, RATIOS, after={"bad": AFTER["bad"]})
    verdict, ordered, *_ = explain_results(data, summarize(data))
    assert (
        f"The lowest perplexity before recovery over the calibration seeds 0, 1, 2 is that of {summarize(data)[0].name}"
        in verdict
    )
    assert "bad × 1.76" in verdict
    assert "before recovery, since not all of them were trained" in ordered
    data = gathered(tmp_path, RATIOS)
    assert "recover" not in " ".join(explain_results(data, summarize(data)))
