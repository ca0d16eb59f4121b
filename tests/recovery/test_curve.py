from dataclasses import replace
from pathlib import Path

from libprune.recovery.curve import Recovery
from libprune.recovery.training import Outcome, Schedule
from tests.support.recovering import short

HISTORY = [
    {"step": 0, "seconds": 0.0, "eval_loss": 0.5},
    {"step": 1, "seconds": 1.0, "loss": 0.6},
    {"step": 2, "seconds": 2.0, "loss": 0.4},
    {"step": 2, "seconds": 2.5, "eval_loss": 0.3},
    {"step": 4, "seconds": 5.0, "eval_loss": 0.35},
]
SCHEDULE = Schedule(steps=6, sequences=4, at_once=2, passes=2, checks=(2, 4, 6))
TEXT = {"text": "news", "held_out": 3, "read_before": 0.0}


def recovery() -> Recovery:
    return Recovery.of(Outcome(4, 2, Path("checkpoint-2"), HISTORY), short(), SCHEDULE, 10, 8, TEXT, 99)


def test_the_curve_has_one_row_a_step_with_what_was_measured_there():
    assert recovery().curve == [
        {"step": 0, "tokens": 0, "seconds": 0.0, "loss": None, "held_out": 0.5},
        {"step": 1, "tokens": 32, "seconds": 1.0, "loss": 0.6, "held_out": None},
        {"step": 2, "tokens": 64, "seconds": 2.5, "loss": 0.4, "held_out": 0.3},
        {"step": 4, "tokens": 128, "seconds": 5.0, "loss": None, "held_out": 0.35},
    ]


def test_the_figures_are_those_of_the_whole_training_and_of_the_kept_step():
    one = recovery()
    assert (one.tokens, one.passes, one.seconds) == (128, 1.6, 5.0)
    assert (one.before, one.after, one.last) == (0.5, 0.3, 0.35)
    assert one.metrics() == {
        "tokens": 128,
        "steps": 4,
        "step": 2,
        "seconds": 5.0,
        "trained_parameters": 99,
        "held_out_before": 0.5,
        "held_out_after": 0.3,
    }
    assert one.as_json()["params"]["method"] == "full"


def test_a_rise_of_the_held_out_loss_is_said_with_what_helps():
    text = " ".join(recovery().sentences())
    assert "held-out loss 0.5000 before training, 0.3000 at step 2 of 4" in text
    assert "after step 2 it rose again, to 0.3500: the text (10 sequences of 8 tokens, each read 1.6 times)" in text
    assert "training ended after 4 of 6 steps" in text


def test_a_training_without_any_gain_says_that_the_weights_stay():
    text = " ".join(replace(recovery(), step=0).sentences())
    assert "the weights stay as slice wrote them" in text
    assert "rose again" not in text


def test_a_training_that_went_well_says_only_the_loss():
    whole = Outcome(2, 2, Path("checkpoint-2"), HISTORY[:4])
    schedule = replace(SCHEDULE, steps=2)
    assert len(Recovery.of(whole, short(), schedule, 10, 8, TEXT, 99).sentences()) == 1
