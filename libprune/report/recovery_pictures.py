"""The picture of the recovery: the loss while the pruned model is trained."""

from collections.abc import Mapping
from typing import Any

from libprune.report.canvas import BLUE, INK, ORANGE, Figure, StrMethodFormatter, new_figure, styled


@styled()
def draw_learning_curve(recovery: Mapping[str, Any]) -> Figure:
    """Draw the training loss as a line, the held-out loss as points, and the step whose weights were kept.

    Args:
        recovery: the object `recovery` of `artifacts/evaluation.json`.
    """
    figure, (axes,) = new_figure(1, 3.4)
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
    axes.set_title(f"Held-out loss {before:.4f} before training, {after:.4f} at step {kept:,} of {recovery['steps']:,}")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
