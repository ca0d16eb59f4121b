"""The picture of the recovery shows what the record of the training says."""

import pytest

from libprune.report.canvas import png
from libprune.report.recovery_pictures import draw_learning_curve
from tests.support.evaluated import RECOVERY
from tests.support.figures import legend, titles


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
