"""What a result costs and gains in numbers: the headline table, and one sentence to decide by."""

import math
from collections.abc import Mapping
from typing import Any

from scipy.special import stdtrit

from libprune.pipeline.terminal import Rows
from libprune.report.markdown import code

Metrics = Mapping[str, Any]
"""The content of `artifacts/evaluation.json`, or an object in it."""

HEADER = ("", "dense", "pruned", "change")
"""Names of the columns of the headline table."""
PERPLEXITY = {
    "causal_lm": "perplexity",
    "image_text_to_text": "perplexity",
    "masked_lm": "perplexity of masked tokens",
    "sequence_classification": "perplexity of labels",
}
"""Name of the measured perplexity by the head of the model."""
SIMILARITY = {"cosine": "cosine to the dense embedding", "rank_correlation": "rank correlation of similarities"}
"""Names of the figures of a model that gives embeddings, by their keys; those of the dense model itself are 1."""
_WIDEST = 300.0
"""Half of the width of an interval, in nats, beyond which it says nothing."""
_CACHE = {"KV cache, bytes a token": "cache_bytes", "recurrent states, bytes a sequence": "state_bytes"}


def headline_rows(result: Metrics) -> Rows:
    """Rows of the headline table, under `HEADER`.

    Args:
        result: the content of `artifacts/evaluation.json`.
    """
    dense, pruned, speed = result["dense"], result["pruned"], result["speed"]
    return [
        *(_similarities(result) if embeds(result) else _perplexities(result)),
        *_rerouted(result.get("routing")),
        _count("decoder parameters", dense["decoder_parameters"], pruned["decoder_parameters"]),
        _count("all parameters", dense["total_parameters"], pruned["total_parameters"]),
        _count("weights, MB", dense["bytes"] / 1e6, pruned["bytes"] / 1e6),
        *(_count(name, dense[key], pruned[key]) for name, key in _CACHE.items() if dense[key]),
        *(_speed(name, dense, pruned, speed) for name in ("prefill", "decode") if dense[name]),
        *(row for task, models in result["tasks"].items() for row in _accuracy(task, models)),
    ]


def embeds(result: Metrics) -> bool:
    """Whether the model gives embeddings, so that it has no perplexity."""
    return bool(result["model"]["head"] == "embedding")


def final_figures(result: Metrics) -> Metrics:
    """The figures of the final model: of the recovered one, or of the pruned one if nothing was recovered."""
    found: Metrics = result.get("recovered") or result["pruned"]
    return found


def _perplexities(result: Metrics) -> Rows:
    dense, recovered = result["dense"], result.get("recovered")
    rows: Rows = [
        (
            PERPLEXITY[result["model"]["head"]],
            f"{dense['perplexity']:.2f} ± {dense['perplexity_se']:.2f}",
            *_perplexity(result["pruned"], result["perplexity_ratio"]),
        )
    ]
    if recovered:
        rows.append(("perplexity, recovered", "", *_perplexity(recovered, recovered["perplexity_ratio"])))
    return rows


def _similarities(result: Metrics) -> Rows:
    """The rows of embeddings: the pruned model, and below it the recovered one if there is one."""
    models = {"": result["pruned"]} | ({", recovered": result["recovered"]} if result.get("recovered") else {})
    return [
        (f"{name}{after}", "1", similarity_text(model, key), f"{model[key] - 1:+.4f}")
        for key, name in SIMILARITY.items()
        for after, model in models.items()
    ]


def similarity_text(model: Metrics, key: str) -> str:
    """A figure of `SIMILARITY` with its standard error."""
    return f"{model[key]:.4f} ± {model[f'{key}_se']:.4f}"


def _perplexity(model: Metrics, ratio: Metrics) -> tuple[str, str]:
    """The perplexity of a model, and its ratio to the dense model's."""
    return f"{model['perplexity']:.2f} ± {model['perplexity_se']:.2f}", _ratio(ratio)


def _ratio(ratio: Metrics) -> str:
    return f"× {ratio['value']:.3f} ± {ratio['se']:.3f}"


def _rerouted(routing: Metrics | None) -> Rows:
    """The shares of tokens that go through other experts than in the dense model; no rows without mixtures."""
    changed = routing["changed"] if routing else {}
    ends = {"pruned": "", "recovered": ", recovered"}
    return [
        (f"tokens sent to other experts{ends[name]}", "", f"{100 * share:.1f} %", "") for name, share in changed.items()
    ]


def _accuracy(task: str, models: Metrics) -> Rows:
    """The rows of a task: the dense and the pruned model, and below them the recovered one if there is one."""
    dense = models["dense"]
    metric = "acc_norm" if "acc_norm" in dense else "acc"
    error = f"{metric}_se"
    share = {
        name: f"{100 * one[metric]:.1f}" + (f" ± {100 * one[error]:.1f}" if error in one else "")
        for name, one in models.items()
    }
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


def decision(result: Metrics, verdict: str) -> str:
    """One sentence of Markdown: how much smaller and faster the model is, what it costs, and whether to trust it.

    The cost is that of the recovered model where there is one.

    Args:
        result: the content of `artifacts/evaluation.json`.
        verdict: the end of the sentence, in Markdown.
    """
    dense, pruned, speed, recovered = result["dense"], result["pruned"], result["speed"], result.get("recovered")
    faster = " and ".join(
        f"× {speed[f'{name}_ratio']:.2f} ({least:.2f} to {most:.2f}) in {name}"
        for name in ("prefill", "decode")
        if pruned[name]
        for least, most in [speed[f"{name}_spread"]]
    )
    after = " after training" if recovered else ""
    given, of = dense["bytes"], "of all"
    if trimmed := result.get("vocabulary"):
        given, of = trimmed["bytes"]["before"], "of all, with the rows that went from the vocabulary"
    return (
        f"Without {100 * pruned['decoder_share_removed']:.1f} % of the decoder's parameters "
        f"({100 * pruned['total_share_removed']:.1f} % {of}) it takes {_megabytes(pruned['bytes'])} MB instead of "
        f"{_megabytes(given)}, and beside the dense model its speed is {faster}, its "
        f"{_quality(result, after)}: **{verdict}**."
    )


def _quality(result: Metrics, after: str) -> str:
    """The quality of the final model beside the dense one, with its interval, as a part of a sentence."""
    windows = result["protocol"]["windows"]
    if embeds(result):
        final = final_figures(result)
        half = float(stdtrit(windows - 1, 0.975)) * final["cosine_se"]
        return (
            f"{SIMILARITY['cosine']}{after} {final['cosine']:.4f} (95 % interval {final['cosine'] - half:.4f} to "
            f"{final['cosine'] + half:.4f}), the {SIMILARITY['rank_correlation']} "
            f"{similarity_text(final, 'rank_correlation')}"
        )
    ratio = (result.get("recovered") or result)["perplexity_ratio"]
    low, high = ratio_interval(ratio, windows)
    sure = f"95 % interval {low:.3f} to {high:.3f}" if math.isfinite(low) else "interval unknown"
    return f"{PERPLEXITY[result['model']['head']]}{after} × {ratio['value']:.3f} ({sure})"


def _megabytes(size: int) -> str:
    """Bytes in MB, with at least three digits."""
    return f"{size / 1e6:,.0f}" if size >= 1e8 else f"{size / 1e6:.3g}"


def ratio_interval(ratio: Metrics, windows: int) -> tuple[float, float]:
    """The 95 % interval of a ratio of perplexities: Student's t on the mean difference of the log-losses.

    Args:
        ratio: `value`, and by the delta method `se`, one standard error over the paired windows.
        windows: their number.

    Returns:
        Its ends; not numbers where one window, an infinite ratio or an interval beyond all numbers says nothing.
    """
    half = float(stdtrit(windows - 1, 0.975)) * ratio["se"] / ratio["value"]  # not a number for one window
    if not (half < _WIDEST and math.isfinite(ratio["value"])):
        return math.nan, math.nan
    return ratio["value"] / math.exp(half), ratio["value"] * math.exp(half)


def duration(seconds: float) -> str:
    """A time in words: seconds, or minutes from one minute on."""
    return f"{seconds / 60:,.1f} minutes" if seconds >= 60 else f"{seconds:.1f} seconds"


def describe_protocol(result: Metrics) -> str:
    """A paragraph of Markdown on how the numbers of the headline were measured.

    Args:
        result: the content of `artifacts/evaluation.json`.
    """
    protocol = result["protocol"]
    measured, ratio = "Perplexity", "for the ratio over paired windows"
    if embeds(result):
        measured, ratio = "Cosines and similarities of pairs", "for the correlation by the jackknife"
    decoded = f", {protocol['decode_tokens']} tokens decoded" if protocol["decode_tokens"] else ""
    return (
        f"{measured} on {protocol['windows']} windows of {protocol['length']} tokens of {code(protocol['text'])}, "
        f"disjoint from the calibration text; ± is one standard error over windows, {ratio}. "
        f"Speed: median of {protocol['rounds']} alternating rounds, prompt {protocol['prompt_tokens']} tokens"
        f"{decoded}, {protocol['dtype']} on {protocol['device']}; in brackets the "
        "slowest and fastest round."
    )
