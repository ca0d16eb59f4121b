"""The headline table, and the report in Markdown, from which the HTML page is made."""

from collections.abc import Mapping, Sequence
from typing import Any

from libprune.engine.heads import HEADS, HeadName
from libprune.pipeline.terminal import Rows
from libprune.report import sections
from libprune.report.cautions import cautions
from libprune.report.markdown import Picture, code, markdown_table
from libprune.report.programs import loading
from libprune.report.provenance import Origin

Metrics = Mapping[str, Any]


def headline(evaluation: Metrics) -> Rows:
    """Rows of the headline table: what, dense, pruned, change."""
    dense, pruned, speed = evaluation["dense"], evaluation["pruned"], evaluation["speed"]
    ratio = evaluation["perplexity_ratio"]
    return [
        (
            PERPLEXITY[evaluation["model"]["head"]],
            f"{dense['perplexity']:.2f} ± {dense['perplexity_se']:.2f}",
            f"{pruned['perplexity']:.2f} ± {pruned['perplexity_se']:.2f}",
            f"× {ratio['value']:.3f} ± {ratio['se']:.3f}",
        ),
        _count("decoder parameters", dense["decoder_parameters"], pruned["decoder_parameters"]),
        _count("all parameters", dense["total_parameters"], pruned["total_parameters"]),
        _count("weights, MB", dense["bytes"] / 1e6, pruned["bytes"] / 1e6),
        *(_count(name, dense[key], pruned[key]) for name, key in _CACHE.items() if dense[key]),
        *(_speed(name, dense, pruned, speed) for name in ("prefill", "decode") if dense[name]),
        *(_accuracy(task, models["dense"], models["pruned"]) for task, models in evaluation["tasks"].items()),
    ]


_CACHE = {"KV cache, bytes a token": "cache_bytes"}
PERPLEXITY = {
    "causal_lm": "perplexity",
    "masked_lm": "perplexity of masked tokens",
    "sequence_classification": "perplexity of labels",
}


def _accuracy(task: str, dense: Metrics, pruned: Metrics) -> tuple[str, ...]:
    metric = "acc_norm" if "acc_norm" in dense else "acc"
    cells = (f"{100 * one[metric]:.1f} ± {100 * one[f'{metric}_se']:.1f}" for one in (dense, pruned))
    return f"{task}, {metric}, %", *cells, f"{100 * (pruned[metric] - dense[metric]):+.1f}"


def _count(name: str, dense: int | float, pruned: int | float) -> tuple[str, ...]:
    return name, f"{dense:,.0f}", f"{pruned:,.0f}", f"{100 * (pruned / dense - 1):+.1f} %"


def _speed(name: str, dense: Metrics, pruned: Metrics, speed: Metrics) -> tuple[str, ...]:
    return f"{name}, tokens/s", f"{dense[name]:,.0f}", f"{pruned[name]:,.0f}", _faster(name, speed)


def _faster(name: str, speed: Metrics) -> str:
    """How many times as fast, and the slowest and fastest round."""
    least, most = speed[f"{name}_spread"]
    return f"× {speed[f'{name}_ratio']:.2f} ({least:.2f} to {most:.2f})"


HEADER = ("", "dense", "pruned", "change")


def how_to_load(folder: str, shape: str, head: HeadName) -> str:
    """The line of Python that loads the result."""
    remote = "" if shape == "uniform" else ", trust_remote_code=True"
    return f'{HEADS[head].auto_class}.from_pretrained("{folder}"{remote})'


def markdown(
    result: Metrics, folder: str, origin: Origin, pictures: Sequence[Picture], gradient_ratio: float | None
) -> str:
    """The report.

    Args:
        result: the content of `artifacts/evaluation.json`.
        folder: where the pruned model lies.
        origin: of the artifacts.
        pictures: that lie in the folder `report_sections.PICTURES` beside the report.
        gradient_ratio: largest over smallest mean |g| of the layers; None without gradients.
    """
    parts = [
        ["# Pruning report", summary(result), markdown_table(headline(result), HEADER), _measured(result["protocol"])],
        _warnings(result, origin.text),
        sections.asked(result, origin),
        sections.what_was_cut(result, pictures),
        sections.scores(pictures),
        sections.gradients(result, gradient_ratio, pictures),
        sections.sensitivity(pictures),
        sections.repair(result["pruning"]["repair"]),
        sections.continuations(result),
        loading(result, folder, how_to_load(folder, result["plan"]["shape"], result["model"]["head"])),
        sections.provenance(result, origin),
    ]
    return "\n\n".join(text for part in parts for text in part) + "\n"


def summary(result: Metrics) -> str:
    """How much smaller, how much faster and how much worse, each with its uncertainty."""
    pruned, speed, ratio = result["pruned"], result["speed"], result["perplexity_ratio"]
    faster = ", ".join(f"{name} {_faster(name, speed)}" for name in ("prefill", "decode") if pruned[name])
    return (
        f"- **Size:** {100 * pruned['decoder_share_removed']:.1f} % of the decoder's parameters are gone, "
        f"{100 * pruned['total_share_removed']:.1f} % of all (counted, exact).\n"
        f"- **Speed:** {faster}.\n"
        f"- **Loss:** {PERPLEXITY[result['model']['head']]} × {ratio['value']:.3f} ± {ratio['se']:.3f}."
    )


def _measured(protocol: Metrics) -> str:
    decoded = f", {protocol['decode_tokens']} tokens decoded" if protocol["decode_tokens"] else ""
    return (
        f"Perplexity on {protocol['windows']} windows of {protocol['length']} tokens of {code(protocol['text'])}, "
        "disjoint from the calibration text; ± is one standard error over windows, for the ratio over paired windows. "
        f"Speed: median of {protocol['rounds']} alternating rounds, prompt {protocol['prompt_tokens']} tokens"
        f"{decoded}, {protocol['dtype']} on {protocol['device']}; in brackets the "
        "slowest and fastest round."
    )


def _warnings(result: Metrics, calibration: str) -> list[str]:
    lines = [f"- {line}" for line in cautions(result, calibration)]
    return ["## Warnings worth reading", "\n".join(lines)] if lines else []
