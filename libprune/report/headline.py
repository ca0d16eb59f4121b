"""What a result costs and gains in numbers: the headline table, and its summary in sentences."""

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
    dense, pruned, speed, ratio = result["dense"], result["pruned"], result["speed"], result["perplexity_ratio"]
    return [
        (
            PERPLEXITY[result["model"]["head"]],
            f"{dense['perplexity']:.2f} ± {dense['perplexity_se']:.2f}",
            f"{pruned['perplexity']:.2f} ± {pruned['perplexity_se']:.2f}",
            f"× {ratio['value']:.3f} ± {ratio['se']:.3f}",
        ),
        _count("decoder parameters", dense["decoder_parameters"], pruned["decoder_parameters"]),
        _count("all parameters", dense["total_parameters"], pruned["total_parameters"]),
        _count("weights, MB", dense["bytes"] / 1e6, pruned["bytes"] / 1e6),
        *(_count(name, dense[key], pruned[key]) for name, key in _CACHE.items() if dense[key]),
        *(_speed(name, dense, pruned, speed) for name in ("prefill", "decode") if dense[name]),
        *(_accuracy(task, models["dense"], models["pruned"]) for task, models in result["tasks"].items()),
    ]


def _accuracy(task: str, dense: Metrics, pruned: Metrics) -> tuple[str, ...]:
    metric = "acc_norm" if "acc_norm" in dense else "acc"
    cells = (f"{100 * one[metric]:.1f} ± {100 * one[f'{metric}_se']:.1f}" for one in (dense, pruned))
    return f"{task}, {metric}, %", *cells, f"{100 * (pruned[metric] - dense[metric]):+.1f}"


def _count(name: str, dense: int | float, pruned: int | float) -> tuple[str, ...]:
    return name, f"{dense:,.0f}", f"{pruned:,.0f}", f"{100 * (pruned / dense - 1):+.1f} %"


def _speed(name: str, dense: Metrics, pruned: Metrics, speed: Metrics) -> tuple[str, ...]:
    return f"{name}, tokens/s", f"{dense[name]:,.0f}", f"{pruned[name]:,.0f}", _speed_ratio(name, speed)


def _speed_ratio(name: str, speed: Metrics) -> str:
    """The speed of the pruned model over the dense model's, and the range of this ratio over the rounds."""
    least, most = speed[f"{name}_spread"]
    return f"× {speed[f'{name}_ratio']:.2f} ({least:.2f} to {most:.2f})"


def summarize(result: Metrics) -> str:
    """Three lines of Markdown: how much smaller, faster and worse the model is, each with its uncertainty.

    Args:
        result: the content of `artifacts/evaluation.json`.
    """
    pruned, speed, ratio = result["pruned"], result["speed"], result["perplexity_ratio"]
    faster = ", ".join(f"{name} {_speed_ratio(name, speed)}" for name in ("prefill", "decode") if pruned[name])
    return (
        f"- **Size:** {100 * pruned['decoder_share_removed']:.1f} % of the decoder's parameters are gone, "
        f"{100 * pruned['total_share_removed']:.1f} % of all (counted, exact).\n"
        f"- **Speed:** {faster}.\n"
        f"- **Loss:** {PERPLEXITY[result['model']['head']]} × {ratio['value']:.3f} ± {ratio['se']:.3f}."
    )


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
