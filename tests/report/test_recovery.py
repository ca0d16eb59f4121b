"""A training in words and as a picture: its facts, which weights were kept, and why it ended."""

import pytest

from libprune.report.canvas import png
from libprune.report.recovery import draw_learning_curve, recovery_facts, rose, training_end
from tests.support.evaluated import RECOVERY, report_of, trained
from tests.support.figures import legend, titles


def test_the_facts_are_those_of_the_record():
    facts = dict(recovery_facts(RECOVERY, 200_000_000))
    assert facts == {
        "method": "`full`: all weights",
        "trained parameters": "113,281,344; the model has 200,000,000",
        "loss": "100 % divergence from what the dense model predicts",
        "text": "`another text`",
        "sequences": "100 of 256 tokens, each read 1.6 times on average",
        "held-out sequences": "16, never trained on; the statistics or the repair have read 25 % of their tokens",
        "tokens": "40,960 in 40 steps",
        "time": "3.2 minutes",
        "held-out loss before training": "0.5000",
        "held-out loss after it": "0.4000, at step 40",
    }
    unread = dict(recovery_facts({**RECOVERY, "read_before": 0.0}, 200_000_000))
    assert unread["held-out sequences"] == "16, never trained on"


LOSSES = {
    "75 % divergence from what the dense model predicts, 25 % cross-entropy to the text": (0.25, 0.0),
    "100 % cross-entropy to the text, and 0.5 times the distance of the hidden states": (1.0, 0.5),
}


@pytest.mark.parametrize("words", LOSSES)
def test_the_parts_of_the_loss_are_named_with_their_weights(words):
    share, hidden = LOSSES[words]
    params = RECOVERY["params"] | {"cross_entropy": share, "hidden_states": hidden}
    assert dict(recovery_facts(RECOVERY | {"params": params}, 1))["loss"] == words


ENDS = {
    "at which the held-out loss was lowest.": {},
    "after which the held-out loss rose again, to 0.4000.": {"step": 20},
    "the weights stayed as slice wrote them.": {"step": 0},
}


@pytest.mark.parametrize("words", ENDS)
def test_the_kept_weights_are_said_and_the_end_only_where_it_came_early(words):
    recovery = RECOVERY | ENDS[words]
    assert training_end(recovery).endswith(words)
    early = training_end(recovery | {"planned": 1_000})
    assert early.startswith(training_end(recovery))
    assert "after 40 of 1,000 steps, since the held-out loss had not fallen in 2 checks" in early


@pytest.mark.parametrize(("step", "expected"), [(0, False), (20, True), (40, False)])
def test_the_loss_rose_where_a_step_between_the_ends_was_the_best(step, expected):
    assert rose(RECOVERY | {"step": step}) is expected


def test_the_report_has_a_section_of_the_training_where_there_was_one():
    section = report_of(trained()).partition("## How it was recovered")[2].partition("\n## ")[0]
    for name, fact in recovery_facts(RECOVERY, trained()["pruned"]["total_parameters"]):
        assert f"| {name} | {fact} |" in section
    assert training_end(RECOVERY) in section


# The picture


@pytest.mark.parametrize(("step", "tokens"), [(0, 0), (20, 20_480), (40, 40_960)])
def test_both_losses_lie_over_their_tokens_and_the_kept_step_is_marked(step, tokens):
    figure = draw_learning_curve(RECOVERY | {"step": step})
    trained, held_out, kept = figure.axes[0].lines
    assert list(trained.get_xdata()) == [10_240, 20_480, 40_960]
    assert list(trained.get_ydata()) == [0.45, 0.4, 0.3]
    assert list(held_out.get_xdata()) == [0, 20_480, 40_960]
    assert list(held_out.get_ydata()) == [0.5, 0.4321, 0.4]
    assert list(kept.get_xdata()) == [tokens, tokens]
    assert legend(figure) == ["training sequences", "held-out sequences", f"kept: step {step}"]
    assert titles(figure) == [f"Held-out loss 0.5000 before training, 0.4000 at step {step} of 40"]


@pytest.mark.parametrize(("weight", "unit"), [(0.0, "loss, nats"), (0.5, "loss")])
def test_a_loss_with_the_distance_of_hidden_states_has_no_unit(weight, unit):
    params = RECOVERY["params"] | {"hidden_states": weight}
    assert draw_learning_curve(RECOVERY | {"params": params}).axes[0].get_ylabel() == unit


def test_a_single_step_is_drawn():
    rows = [RECOVERY["curve"][0], {"step": 1, "tokens": 64, "seconds": 2.0, "loss": 0.5, "held_out": 0.6}]
    figure = draw_learning_curve(RECOVERY | {"curve": rows, "step": 0, "steps": 1})
    assert png(figure).startswith(b"\x89PNG")
