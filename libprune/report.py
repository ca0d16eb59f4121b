"""The headline table and a short report in Markdown."""

from collections.abc import Mapping
from typing import Any

Metrics = Mapping[str, Any]
Rows = list[tuple[str, ...]]


def headline(evaluation: Metrics) -> Rows:
    """Rows of the headline table: what, dense, pruned, change."""
    dense, pruned, speed = evaluation["dense"], evaluation["pruned"], evaluation["speed"]
    ratio = evaluation["perplexity_ratio"]
    return [
        (
            "perplexity",
            f"{dense['perplexity']:.2f} ± {dense['perplexity_se']:.2f}",
            f"{pruned['perplexity']:.2f} ± {pruned['perplexity_se']:.2f}",
            f"× {ratio['value']:.3f} ± {ratio['se']:.3f}",
        ),
        _count("decoder parameters", dense["decoder_parameters"], pruned["decoder_parameters"]),
        _count("all parameters", dense["total_parameters"], pruned["total_parameters"]),
        _count("weights, MB", dense["bytes"] / 1e6, pruned["bytes"] / 1e6),
        _count("KV cache, bytes a token", dense["cache_bytes"], pruned["cache_bytes"]),
        _speed(
            "prefill, tokens/s", dense["prefill"], pruned["prefill"], speed["prefill_ratio"], speed["prefill_spread"]
        ),
        _speed("decode, tokens/s", dense["decode"], pruned["decode"], speed["decode_ratio"], speed["decode_spread"]),
        *(_accuracy(task, models["dense"], models["pruned"]) for task, models in evaluation["tasks"].items()),
    ]


def _accuracy(task: str, dense: Metrics, pruned: Metrics) -> tuple[str, ...]:
    metric = "acc_norm" if "acc_norm" in dense else "acc"
    cells = (f"{100 * one[metric]:.1f} ± {100 * one[f'{metric}_se']:.1f}" for one in (dense, pruned))
    return f"{task}, {metric}, %", *cells, f"{100 * (pruned[metric] - dense[metric]):+.1f}"


def _count(name: str, dense: int | float, pruned: int | float) -> tuple[str, ...]:
    return name, f"{dense:,.0f}", f"{pruned:,.0f}", f"{100 * (pruned / dense - 1):+.1f} %"


def _speed(name: str, dense: float, pruned: float, ratio: float, spread: list[float]) -> tuple[str, ...]:
    return name, f"{dense:,.0f}", f"{pruned:,.0f}", f"× {ratio:.2f} ({spread[0]:.2f} to {spread[1]:.2f})"


def text_table(rows: Rows, header: tuple[str, ...]) -> str:
    """A table for the terminal, the first column left and the others right aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([row[0].ljust(len(first)), *rest]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(rows: Rows, header: tuple[str, ...]) -> str:
    """The same as a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    lines.insert(1, "|---" + "|---:" * (len(header) - 1) + "|")
    return "\n".join(lines)


HEADER = ("", "dense", "pruned", "change")


def how_to_load(folder: str, shape: str) -> str:
    """The line of Python that loads the result."""
    remote = "" if shape == "uniform" else ", trust_remote_code=True"
    return f'AutoModelForCausalLM.from_pretrained("{folder}"{remote})'


def markdown(result: Metrics, folder: str) -> str:
    """The report.

    Args:
        result: the content of `artifacts/evaluation.json`.
        folder: where the pruned model lies.
    """
    sections = [
        ["# Pruning report", markdown_table(headline(result), HEADER), _what_was_measured(result["protocol"])],
        ["## What was cut", _what_was_cut(result), *_overlaps(result["plan"]), _layers(result)],
        *_repair(result["pruning"]["repair"]),
        ["## How to load it", *_loading(result, folder)],
    ]
    return "\n\n".join(text for section in sections for text in section) + "\n"


def _what_was_measured(protocol: Metrics) -> str:
    return (
        f"Perplexity on {protocol['windows']} windows of {protocol['length']} tokens of {protocol['text']}, disjoint "
        f"from the calibration text; ± is one standard error over windows, for the ratio over paired windows. Speed: "
        f"median of {protocol['rounds']} alternating rounds, prompt {protocol['prompt_tokens']} tokens, "
        f"{protocol['decode_tokens']} tokens decoded, {protocol['dtype']} on {protocol['device']}; in brackets the "
        "slowest and fastest round."
    )


def _what_was_cut(result: Metrics) -> str:
    plan, pruned = result["plan"], result["pruned"]
    return (
        f"Asked for {100 * plan['ratio']:.1f} % of the {plan['ratio_of']} {plan['objective']}; removed "
        f"{100 * pruned['decoder_share_removed']:.2f} % of the decoder's, {100 * pruned['total_share_removed']:.2f} % "
        f"of all, and {100 * pruned['macs_share_removed']:.2f} % of the multiplications a token. Criterion "
        f"`{plan['criterion']}` (scaling `{plan['scaling']}`), allocation `{plan['method']}`, repair "
        f"`{result['pruning']['slice']['repair']}`."
    )


def _overlaps(plan: Metrics) -> list[str]:
    return [
        f"The kept set overlaps with that of `{name}` alone by {value:.4f} (Jaccard)."
        for name, value in plan["kept_set_overlap"].items()
    ]


def _repair(errors: Metrics) -> list[list[str]]:
    if not errors:
        return []
    names = ("lost_before", "lost_after", "lost_held_out_before", "lost_held_out_after")
    before, after, held_before, held_after = (f"{100 * errors[name]:.1f} %" for name in names)
    return [
        [
            "## How it was repaired",
            f"On average over the repaired maps, pruning lost {before} of their squared output, and the repair left "
            f"{after}; on calibration sequences that the fit did not see, {held_before} and {held_after}. "
            "`repair.parquet` in the model's folder has them map by map.",
        ]
    ]


def _layers(result: Metrics) -> str:
    units = result["units"]
    rows: Rows = [
        (str(layer), *(f"{kept[part]} of {units[part]}" for part in units)) for layer, kept in enumerate(result["kept"])
    ]
    return markdown_table(rows, ("layer", *units))


def _loading(result: Metrics, folder: str) -> list[str]:
    shape, proof = result["plan"]["shape"], result["pruning"]["proof"]
    kind = {
        "uniform": "a stock config, no custom code",
        "per_layer": "layers of different widths, a modeling file inside",
    }[shape]
    code = f"from transformers import AutoModelForCausalLM\nmodel = {how_to_load(folder, shape)}"
    return [
        f"`{folder}` has the shape `{shape}`: {kind}.",
        f"```python\n{code}\n```",
        f"A fresh process without libprune loaded it; its logits differ from the masked dense model's by "
        f"{proof['logit_difference']:.1e} of {proof['logit_scale']:.1f}, and it generates.",
    ]
