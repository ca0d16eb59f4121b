"""How a pruned model was trained, in words: for the report, and for its warnings."""

from typing import Any

from libprune.pipeline.terminal import Rows
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
        ("held-out sequences", f"{recovery['held_out']:,}, never trained on"),
        ("tokens", f"{recovery['tokens']:,} in {recovery['steps']:,} steps"),
        ("time", duration(recovery["seconds"])),
        ("held-out loss before training", f"{recovery['held_out_before']:.4f}"),
        ("held-out loss after it", f"{recovery['held_out_after']:.4f}, at step {recovery['step']:,}"),
    ]


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


def trained_texts(recovery: Metrics) -> list[str]:
    """The names of the texts that were trained on."""
    given: Any = recovery["params"]["text"]
    return [one["text"] for one in given] if isinstance(given, list | tuple) else [recovery["text"]]
