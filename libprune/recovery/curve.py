"""What a training came to: its figures, its learning curve, and what they say in words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from libprune.pipeline.sections import Recover
from libprune.recovery.idle import COLUMNS, Curve
from libprune.recovery.training import Outcome, Schedule


@dataclass(frozen=True)
class Recovery:
    """What a training came to.

    Attributes:
        params: the section `recover` of the params.
        learning_rate: the largest learning rate.
        text: names of the texts that were trained on.
        sequences: number of different sequences that could be trained on.
        length: tokens of a sequence.
        held_out: number of held-out sequences.
        read_before: the share of their tokens that the statistics or the repair have read too.
        trained_parameters: number of trained parameters.
        steps: steps that were run.
        step: the step whose weights were kept; 0 if they stayed as they were.
        tokens: tokens that were trained on up to the end.
        seconds: time of the training, the held-out checks included.
        planned: steps that were asked for.
        curve: the learning curve.
    """

    params: dict[str, Any]
    learning_rate: float
    text: str
    sequences: int
    length: int
    held_out: int
    read_before: float
    trained_parameters: int
    steps: int
    step: int
    tokens: int
    seconds: float
    planned: int
    curve: Curve

    @staticmethod
    def of(
        outcome: Outcome,
        params: Recover,
        schedule: Schedule,
        sequences: int,
        length: int,
        text: Mapping[str, Any],
        trained: int,
    ) -> "Recovery":
        """The record of an outcome; see the attributes."""
        each = schedule.sequences * length
        return Recovery(
            params=params.model_dump(mode="json"),
            learning_rate=params.rate,
            text=text["text"],
            sequences=sequences,
            length=length,
            held_out=text["held_out"],
            read_before=text["read_before"],
            trained_parameters=trained,
            steps=outcome.steps,
            step=outcome.kept,
            tokens=outcome.steps * each,
            seconds=max(entry["seconds"] for entry in outcome.history),
            planned=schedule.steps,
            curve=_curve(outcome.history, each),
        )

    @property
    def before(self) -> float:
        """The held-out loss before training, nats."""
        return self._checked[0]

    @property
    def after(self) -> float:
        """The held-out loss of the step that was kept, nats."""
        return self._checked[self.step]

    @property
    def last(self) -> float:
        """The held-out loss at the end, nats."""
        return self._checked[max(self._checked)]

    @property
    def _checked(self) -> dict[int, float]:
        rows = {row["step"]: row["held_out"] for row in self.curve}
        return {int(step or 0): loss for step, loss in rows.items() if loss is not None}

    @property
    def passes(self) -> float:
        """How often each sequence was trained on, on average."""
        return self.tokens / (self.sequences * self.length)

    def as_json(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return asdict(self) | {"held_out_before": self.before, "held_out_after": self.after}

    def metrics(self) -> dict[str, Any]:
        """The figures of `metrics/recovery.json`."""
        names = ("tokens", "steps", "step", "seconds", "trained_parameters")
        own = {name: getattr(self, name) for name in names}
        return own | {"held_out_before": self.before, "held_out_after": self.after}

    def sentences(self) -> list[str]:
        """Lines for the terminal that say how the held-out loss went, and what to do where it rose."""
        lines = [
            f"held-out loss {self.before:.4f} before training, {self.after:.4f} at step {self.step:,} of {self.steps:,}"
        ]
        if not self.step:
            lines.append(
                "no step lowered the held-out loss: the weights stay as slice wrote them; lower recover.learning_rate, "
                "or train on more text (recover.text)"
            )
        elif self.step < self.steps:
            lines.append(
                f"after step {self.step:,} it rose again, to {self.last:.4f}: the text ({self.sequences:,} sequences "
                f"of {self.length:,} tokens, each read {self.passes:.1f} times) is too small or too narrow for more; "
                "name more text under recover.text"
            )
        if self.steps < self.planned:
            lines.append(f"training ended after {self.steps:,} of {self.planned:,} steps")
        return lines


def _curve(history: Sequence[Mapping[str, Any]], tokens: int) -> Curve:
    rows: dict[int, dict[str, float | int | None]] = {}
    for entry in history:
        step = int(entry["step"])
        row = rows.setdefault(step, dict.fromkeys(COLUMNS) | {"step": step, "tokens": step * tokens})
        row["seconds"] = round(entry["seconds"], 1)
        for name, key in (("loss", "loss"), ("held_out", "eval_loss")):
            if key in entry:
                row[name] = entry[key]
    return [rows[step] for step in sorted(rows)]
