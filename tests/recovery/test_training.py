import json
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from libprune.engine.errors import LibpruneError, ParamsError
from libprune.models.parallel import World
from libprune.recovery import training as recovery_training
from libprune.recovery.losses import Taught
from libprune.recovery.predictions import LiveTeacher
from libprune.recovery.student import prepare, read_weights, trained_parameters
from libprune.recovery.training import (
    STATE,
    Outcome,
    Rows,
    Training,
    best_step,
    gave_up,
    held_out_losses,
    make_schedule,
    training_order,
)
from tests.support.models import FAMILIES
from tests.support.recovering import HELD_OUT, LENGTH, short, training_sequences

counts = st.integers(1, 40)


@given(counts, counts, counts, counts, st.integers(1, 4), st.integers(1, 9))
def test_steps_hold_what_was_asked_for_in_passes_that_fit(tokens, step, at_once, length, processes, checks):
    params = short(tokens=tokens * length, batch_tokens=step * length, checks=checks)
    if step % processes:
        with pytest.raises(ParamsError, match=f"{processes} processes cannot share evenly"):
            make_schedule(params, at_once * length, length, processes)
        return
    schedule = make_schedule(params, at_once * length, length, processes)
    assert schedule.sequences == step == schedule.at_once * schedule.passes * processes
    assert schedule.at_once <= at_once
    assert abs(schedule.steps * step - tokens) <= max(step, step / 2)
    assert list(schedule.checks) == sorted(set(schedule.checks))
    assert len(schedule.checks) == min(checks, schedule.steps)
    assert schedule.checks[-1] == schedule.steps


@given(st.integers(1, 30), st.integers(1, 100), st.integers(0, 5))
def test_every_sequence_comes_once_before_any_comes_again(available, wanted, seed):
    assume(wanted)
    order = training_order(available, wanted, seed)
    assert len(order) == wanted
    for first in range(0, wanted, available):
        once = order[first : first + available]
        assert len(set(once)) == len(once)
    assert order == training_order(available, wanted, seed)


def test_rows_are_the_sequences_in_their_order():
    sequences = training_sequences("bert_classifier")
    assert sequences.targets is not None
    row = Rows(sequences, [3, 1, 3])[2]
    assert int(row["index"]) == 3
    assert int(row["targets"]) == int(sequences.targets[3])
    assert int(row["attention_mask"].sum()) == int(sequences.lengths[3])


def run(
    home: Path, changes: dict | None = None, model=None, batch_tokens: int = 32, teacher=None, device: str = "cpu"
) -> tuple[Outcome, dict]:
    """Train a model towards another one; what came of it, and the trained parameters in the end."""
    params, sequences = short(**(changes or {})), training_sequences("llama")
    trained = prepare(model or FAMILIES["llama"](1), params)
    told = Training(
        teacher=teacher or LiveTeacher(FAMILIES["llama"](0), hidden=params.hidden_states > 0),
        sequences=sequences,
        held_out=HELD_OUT,
        layers=range(4),
        params=params,
        schedule=make_schedule(params, batch_tokens, LENGTH, 1),
        device=torch.device(device),
        dtype=torch.float32,
        world=World(),
    )
    outcome = told.run(trained, home)
    return outcome, {name: p.detach().clone() for name, p in trained_parameters(trained).items()}


def test_training_lowers_the_held_out_loss_and_the_checkpoint_of_the_best_step_stays(tmp_path):
    outcome, trained = run(tmp_path)
    checked = held_out_losses(outcome.history)
    assert list(checked) == [0, 4, 8, 12, 16]
    assert checked[16] < 0.9 * checked[0]
    assert outcome.kept == best_step(checked) == 16 == outcome.steps
    assert outcome.checkpoint == tmp_path / "checkpoint-16"
    model = prepare(FAMILIES["llama"](1), short())
    read_weights(model, outcome.checkpoint)
    assert all(torch.equal(parameter, trained[name]) for name, parameter in trained_parameters(model).items())


@pytest.mark.parametrize(
    "changes",
    [
        {"cross_entropy": 1.0},
        {"cross_entropy": 0.3, "temperature": 2.0},
        {"hidden_states": 1.0},
        {"method": "lora", "learning_rate": 1e-2},
        {"dtype": "bfloat16", "learning_rate": 1e-2},
        {"optimizer": "adafactor", "schedule": "linear", "weight_decay": 0.01},
    ],
    ids=str,
)
def test_every_way_of_training_lowers_its_loss(tmp_path, changes):
    checked = held_out_losses(run(tmp_path, changes)[0].history)
    if changes.get("cross_entropy") == 1.0:  # nothing is to be learnt of random text but its frequencies
        assert checked[16] < checked[0]
    else:
        assert checked[16] < 0.97 * checked[0]


class StoppedError(Exception):
    pass


class Stopping:
    """A teacher that is stopped at a number of calls."""

    def __init__(self, calls: int) -> None:
        self._teacher, self._left = LiveTeacher(FAMILIES["llama"](0), hidden=False), calls

    def held(self) -> int:
        return self._teacher.held()

    def predict(self, index, inputs) -> Taught:
        self._left -= 1
        if self._left < 0:
            raise StoppedError
        return self._teacher.predict(index, inputs)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("calls", [3, 9, 14])  # before the first checkpoint, and behind one and two
def test_a_training_that_was_stopped_comes_to_the_same_weights(tmp_path, method, calls):
    whole, weights = run(tmp_path / "whole", {"method": method})
    with pytest.raises(StoppedError):
        run(tmp_path / "stopped", {"method": method}, teacher=Stopping(calls))
    outcome, others = run(tmp_path / "stopped", {"method": method})
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert held_out_losses(outcome.history) == held_out_losses(whole.history)
    assert outcome.history[-1]["seconds"] > 0
    assert [entry["step"] for entry in outcome.history] == [entry["step"] for entry in whole.history]


EARLY = {
    "learning_rate": 0.02,
    "patience": 1,
    "clip": 0.0,
    "schedule": "constant_with_warmup",
    "warmup": 0.0,
    "checks": 8,
}
"""A training whose held-out loss falls and rises again before the last check."""


@pytest.mark.parametrize(
    ("changes", "end"), [({}, (16, 16)), (EARLY, (4, 6)), ({"learning_rate": 1.0, "patience": 2, "clip": 0.0}, (0, 8))]
)
def test_a_training_that_had_ended_is_not_trained_on(tmp_path, changes, end):
    """Its process was killed behind the last checkpoint, before the weights were written."""
    first, _ = run(tmp_path, changes)
    assert (first.kept, first.steps) == end
    again, _ = run(tmp_path, changes, teacher=Stopping(0))
    assert again == first
    assert again.checkpoint is None or (again.checkpoint / STATE).exists()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(1, 4))
def test_a_training_gives_up_after_so_many_checks_without_a_lower_loss(losses, patience):
    history = [{"step": 3 * number, "eval_loss": float(loss)} for number, loss in enumerate(losses)]
    lower = [number for number, loss in enumerate(losses) if loss < min(losses[:number], default=6)]
    assert gave_up([{"step": 1, "loss": 0.0}, *history], patience) is (len(losses) - 1 - lower[-1] >= patience)


def test_a_checkpoint_that_is_half_written_is_left_behind(tmp_path):
    _, weights = run(tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(tmp_path / "stopped", teacher=Stopping(14))
    newest = max((tmp_path / "stopped").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (newest / STATE).write_text((newest / STATE).read_text()[:50])
    _, others = run(tmp_path / "stopped")
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_step_in_several_passes_is_the_step_in_one(tmp_path):
    one, several = run(tmp_path / "one"), run(tmp_path / "several", batch_tokens=LENGTH)
    assert held_out_losses(several[0].history) == pytest.approx(held_out_losses(one[0].history), rel=1e-4)


def test_training_ends_where_the_held_out_loss_does_not_fall(tmp_path):
    outcome, _ = run(tmp_path, {"learning_rate": 1.0, "patience": 2, "clip": 0.0})
    assert (outcome.kept, outcome.checkpoint) == (0, None)
    assert outcome.steps == 8
    assert list(held_out_losses(outcome.history)) == [0, 4, 8]


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    broken = FAMILIES["llama"](1)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(LibpruneError, match=r"the loss is not finite after 0 steps; lower recover\.learning_rate"):
        run(tmp_path, model=broken)


class GivenError(Exception):
    pass


def test_a_process_trains_on_its_own_gpu_alone(tmp_path, monkeypatch):
    """One that is alone on a machine with three: transformers would put it on the first and use all of them."""
    chosen, own = [], "cuda:1"
    for name, answer in {"is_available": True, "device_count": 3}.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def trainer(*args, **given):
        raise GivenError(given["args"])

    monkeypatch.setattr(recovery_training, "_Distiller", trainer)
    with pytest.raises(GivenError) as caught:
        run(tmp_path, device=own)
    (arguments,) = caught.value.args
    assert (arguments.n_gpu, str(arguments.device), str(chosen[-1])) == (1, own, own)
    assert arguments.train_batch_size * arguments.gradient_accumulation_steps * LENGTH == short().batch_tokens


def test_an_optimizer_without_its_package_says_what_to_install(tmp_path):
    with pytest.raises(LibpruneError, match="pip install bitsandbytes"):
        run(tmp_path, {"optimizer": "adamw_bnb_8bit"})


def test_the_state_of_a_checkpoint_is_the_last_file_that_is_written(tmp_path):
    """So that a checkpoint with a readable state is whole."""
    outcome, _ = run(tmp_path)
    assert outcome.checkpoint is not None
    times = {path.name: path.stat().st_mtime_ns for path in outcome.checkpoint.iterdir()}
    assert max(times, key=lambda name: times[name]) == STATE
    assert json.loads((outcome.checkpoint / STATE).read_text())["global_step"] == outcome.kept
