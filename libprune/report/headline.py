"""What a result costs and gains in numbers: the headline table, and its summary in sentences."""

import math
from collections.abc import Mapping
from typing import Any

from libprune.pipeline.terminal import Rows
from libprune.report.markdown import code

Metrics = Mapping[str, Any]
"""The content of `artifacts/evaluation.json`, or an object in it."""

HEADER = ("", "dense", "pruned", "change")
"""Names of the columns of the headline table."""
PERPLEXITY = {
    "causal_lm": "perplexity",
    "masked_lm": "perplexity of masked tokens",
    "sequence_classification": "perplexity of labels",
}
"""Name of the measured perplexity by the head of the model."""
_CACHE = {"KV cache, bytes a token": "cache_bytes"}


def headline_rows(result: Metrics) -> Rows:
    """Rows of the headline table, under `HEADER`.

    Args:
        result: the content of `artifacts/evaluation.json`.
    """
    dense, pruned, speed, recovered = result["dense"], result["pruned"], result["speed"], result.get("recovered")
    after = [("perplexity, recovered", "", *_perplexity(recovered, recovered["perplexity_ratio"]))] if recovered else []
    return [
        (
            PERPLEXITY[result["model"]["head"]],
            f"{dense['perplexity']:.2f} ± {dense['perplexity_se']:.2f}",
            *_perplexity(pruned, result["perplexity_ratio"]),
        ),
        *after,
        _count("decoder parameters", dense["decoder_parameters"], pruned["decoder_parameters"]),
        _count("all parameters", dense["total_parameters"], pruned["total_parameters"]),
        _count("weights, MB", dense["bytes"] / 1e6, pruned["bytes"] / 1e6),
        *(_count(name, dense[key], pruned[key]) for name, key in _CACHE.items() if dense[key]),
        *(_speed(name, dense, pruned, speed) for name in ("prefill", "decode") if dense[name]),
        *(row for task, models in result["tasks"].items() for row in _accuracy(task, models)),
    ]


def _perplexity(model: Metrics, ratio: Metrics) -> tuple[str, str]:
    """The perplexity of a model, and its ratio to the dense model's."""
    return f"{model['perplexity']:.2f} ± {model['perplexity_se']:.2f}", _ratio(ratio)


def _ratio(ratio: Metrics) -> str:
    return f"× {ratio['value']:.3f} ± {ratio['se']:.3f}"


def _accuracy(task: str, models: Metrics) -> Rows:
    """The rows of a task: the dense and the pruned model, and below them the recovered one if there is one."""
    dense = models["dense"]
    metric = "acc_norm" if "acc_norm" in dense else "acc"
    share = {name: f"{100 * one[metric]:.1f} ± {100 * one[f'{metric}_se']:.1f}" for name, one in models.items()}
    change = {name: f"{100 * (one[metric] - dense[metric]):+.1f}" for name, one in models.items()}
    rows: Rows = [(f"{task}, {metric}, %", share["dense"], share["pruned"], change["pruned"])]
    return rows + [(f"{task}, recovered", "", share[name], change[name]) for name in models if name == "recovered"]


def _count(name: str, dense: int | float, pruned: int | float) -> tuple[str, ...]:
    return name, digits(dense), digits(pruned), f"{100 * (pruned / dense - 1):+.1f} %"


def digits(number: int | float) -> str:
    """A positive number as text, with all digits of a whole number and at least three of another."""
    if isinstance(number, int) or number >= 100:
        return f"{number:,.0f}"
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}" if number > 0 else "0"


def _speed(name: str, dense: Metrics, pruned: Metrics, speed: Metrics) -> tuple[str, ...]:
    return f"{name}, tokens/s", digits(dense[name]), digits(pruned[name]), _speed_ratio(name, speed)


def _speed_ratio(name: str, speed: Metrics) -> str:
    """The speed of the pruned model over the dense model's, and the range of this ratio over the rounds."""
    least, most = speed[f"{name}_spread"]
    return f"× {speed[f'{name}_ratio']:.2f} ({least:.2f} to {most:.2f})"


def summarize(result: Metrics) -> str:
    """Three lines of Markdown: how much smaller, faster and worse the model is, each with its uncertainty.

    The loss is that of the pruned model and, behind it, that of the recovered one with what the recovery took.

    Args:
        result: the content of `artifacts/evaluation.json`.
    """
    pruned, speed, loss = result["pruned"], result["speed"], _ratio(result["perplexity_ratio"])
    if recovered := result.get("recovered"):
        made = result["recovery"]
        took = f"training on {made['tokens']:,} tokens ({duration(made['seconds'])})"
        loss = f"{loss} as pruned, {_ratio(recovered['perplexity_ratio'])} after {took}"
    faster = ", ".join(f"{name} {_speed_ratio(name, speed)}" for name in ("prefill", "decode") if pruned[name])
    return (
        f"- **Size:** {100 * pruned['decoder_share_removed']:.1f} % of the decoder's parameters are gone, "
        f"{100 * pruned['total_share_removed']:.1f} % of all (counted, exact).\n"
        f"- **Speed:** {faster}.\n"
        f"- **Loss:** {PERPLEXITY[result['model']['head']]} {loss}."
    )


def duration(seconds: float) -> str:
    """A time in words: seconds, or minutes from one minute on."""
    return f"{seconds / 60:,.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"


def describe_protocol(protocol: Metrics) -> str:
    """A paragraph of Markdown on how the numbers of the headline were measured.

    Args:
        protocol: the object `protocol` of `artifacts/evaluation.json`.
    """
    decoded = f", {protocol['decode_tokens']} tokens decoded" if protocol["decode_tokens"] else ""
    return (
        f"Perplexity on {protocol['windows']} windows of {protocol['length']} tokens of {code(protocol['text'])}, "
        "disjoint from the calibration text; ± is one standard error over windows, for the ratio over paired windows. "
        f"Speed: median of {protocol['rounds']} alternating rounds, prompt {protocol['prompt_tokens']} tokens"
        f"{decoded}, {protocol['dtype']} on {protocol['device']}; in brackets the "
        "slowest and fastest round."
    )
