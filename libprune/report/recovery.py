"""How a pruned model was trained: in words for the report and its warnings, and as a picture."""

from collections.abc import Mapping
from typing import Any

from libprune.pipeline.terminal import Rows
from libprune.report.canvas import BLUE, INK, ORANGE, Figure, StrMethodFormatter, new_figure, set_title, styled
from libprune.report.headline import Metrics, duration
from libprune.report.markdown import code

_METHODS = {"full": "all weights", "lora": "small matrices beside the linear maps, then added to the weights"}
"""The trained parameters in words, by `recover.method`."""


def recovery_facts(recovery: Metrics, total: int) -> Rows:
    """Rows of a table with the facts of a training; each is a name and a cell of Markdown.

    Args:
        recovery: the object `recovery` of `artifacts/evaluation.json`.
        total: number of parameters of the pruned model.
    """
    params, sequences, length = recovery["params"], recovery["sequences"], recovery["length"]
    method, trained = params["method"], recovery["trained_parameters"]
    read = recovery["tokens"] / (sequences * length)
    return [
        ("method", f"{code(method)}: {_METHODS[method]}"),
        ("trained parameters", f"{trained:,}; the model has {total:,}"),
        ("loss", _loss(params)),
        ("text", code(recovery["text"])),
        ("sequences", f"{sequences:,} of {length:,} tokens, each read {read:.1f} times on average"),
        ("held-out sequences", f"{recovery['held_out']:,}, never trained on{_read_before(recovery)}"),
        ("tokens", f"{recovery['tokens']:,} in {recovery['steps']:,} steps"),
        ("time", duration(recovery["seconds"])),
        ("held-out loss before training", f"{recovery['held_out_before']:.4f}"),
        ("held-out loss after it", f"{recovery['held_out_after']:.4f}, at step {recovery['step']:,}"),
    ]


def _read_before(recovery: Metrics) -> str:
    share = recovery["read_before"]
    if not share:
        return ""
    return f"; the statistics or the repair have read {100 * share:.0f} % of their tokens"


def _loss(params: Metrics) -> str:
    share = params["cross_entropy"]
    parts = [
        *([f"{100 * (1 - share):.0f} % divergence from what the dense model predicts"] if share < 1 else []),
        *([f"{100 * share:.0f} % cross-entropy to the text"] if share else []),
    ]
    hidden = params["hidden_states"]
    return ", ".join(parts) + (f", and {hidden:g} times the distance of the hidden states" if hidden else "")


def training_end(recovery: Metrics) -> str:
    """Sentences of Markdown on which weights were kept, and on why training ended early if it did."""
    steps, kept = recovery["steps"], recovery["step"]
    if not kept:
        text = "No step lowered the held-out loss: the weights stayed as slice wrote them."
    elif rose(recovery):
        text = (
            f"The weights are those of step {kept:,}, after which the held-out loss rose again, to {_last(recovery)}."
        )
    else:
        text = "The weights are those of the last step, at which the held-out loss was lowest."
    if steps < recovery["planned"]:
        text += (
            f" Training ended after {steps:,} of {recovery['planned']:,} steps, since the held-out loss had not fallen "
            f"in {recovery['params']['patience']} checks in a row (`recover.patience`)."
        )
    return text


def _last(recovery: Metrics) -> str:
    """The held-out loss at the end."""
    last = [row["held_out"] for row in recovery["curve"] if row["held_out"] is not None][-1]
    return f"{last:.4f}"


def rose(recovery: Metrics) -> bool:
    """Whether the held-out loss fell and then rose again before the end."""
    return bool(0 < recovery["step"] < recovery["steps"])


@styled()
def draw_learning_curve(recovery: Mapping[str, Any]) -> Figure:
    """Draw the training loss as a line, the held-out loss as points, and the step whose weights were kept.

    Args:
        recovery: the object `recovery` of `artifacts/evaluation.json`.
    """
    figure, (axes,) = new_figure(1, 3.0)
    curve, kept = recovery["curve"], recovery["step"]
    train, held_out = ([row for row in curve if row[name] is not None] for name in ("loss", "held_out"))
    tokens = [row["tokens"] for row in train]
    axes.plot(tokens, [row["loss"] for row in train], ".-", color=BLUE, markersize=3, label="training sequences")
    tokens, losses = [row["tokens"] for row in held_out], [row["held_out"] for row in held_out]
    look: dict[str, Any] = {"color": ORANGE, "markeredgecolor": INK, "markersize": 7, "linestyle": "", "zorder": 3}
    axes.plot(tokens, losses, "D", label="held-out sequences", **look)
    where = next(row["tokens"] for row in held_out if row["step"] == kept)
    axes.axvline(where, color=INK, linestyle="--", linewidth=1.0, label=f"kept: step {kept:,}")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("loss" if recovery["params"]["hidden_states"] else "loss, nats")
    before, after = recovery["held_out_before"], recovery["held_out_after"]
    set_title(
        axes, f"Held-out loss {before:.4f} before training, {after:.4f} at step {kept:,} of {recovery['steps']:,}"
    )
    figure.legend(loc="outside lower center", ncols=3)
    return figure
