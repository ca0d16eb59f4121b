"""Sections of the report; each a list of Markdown paragraphs."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from libprune.pipeline.terminal import Rows
from libprune.report.gradient_text import ratio_text
from libprune.report.markdown import Picture, code, markdown_table, picture
from libprune.report.provenance import Origin
from libprune.statistics.gradient_health import verdict

Metrics = Mapping[str, Any]
Section = list[str]

PICTURES = "gradient_analysis"
"""The folder of the pictures, beside the report."""

_GRADIENTS = ("grad_dist", "grad_heatmap", "grad_comparison", "layer_variance")
_NOT_SETTINGS = {"model", "tokens", "comparable"}


def _shown(pictures: Sequence[Picture], *names: str) -> Section:
    chosen = [one for name in names for one in pictures if one.name == name]
    return [paragraph for one in chosen for paragraph in picture(PICTURES, one)]


def asked(result: Metrics, origin: Origin) -> Section:
    """What was asked for."""
    plan = result["plan"]
    decided = "" if plan["ratio_asked"] is not None else ", as `retention` decided,"
    fusion = "" if plan["fusion"] == "none" else f"fusion {code(plan['fusion'])}, "
    worth = "" if plan["worth"] == "none" else f" with the worth of layers by {code(plan['worth'])}"
    return [
        "## What was asked",
        f"Remove {100 * plan['ratio']:.1f} %{decided} of the {plan['ratio_of']} {plan['objective']} of "
        f"{code(origin.model)}. "
        f"Criterion {code(plan['criterion'])} ({fusion}scaling {code(plan['scaling'])}), allocation "
        f"{code(plan['method'])}{worth}, "
        f"repair {code(result['pruning']['slice']['repair'])}, no fine-tuning.",
    ]


def what_was_cut(result: Metrics, pictures: Sequence[Picture]) -> Section:
    """How much went, layer by layer."""
    pruned = result["pruned"]
    return [
        "## What was cut",
        f"Removed {100 * pruned['decoder_share_removed']:.2f} % of the decoder's parameters, "
        f"{100 * pruned['total_share_removed']:.2f} % of all, and {100 * pruned['macs_share_removed']:.2f} % of the "
        "multiplications a token. Attention is cut in groups (a key-value head with its query heads), the MLP in "
        "channels.",
        *_shown(pictures, "kept_share"),
        _layers(result),
        *(
            f"The kept set overlaps with that of {code(name)} alone by {value:.4f} (Jaccard)."
            for name, value in result["plan"]["kept_set_overlap"].items()
        ),
    ]


def _layers(result: Metrics) -> str:
    """Units kept, a row for each run of layers that keep the same."""
    units, rows = result["units"], Rows()
    for _, run in groupby(enumerate(result["kept"]), key=lambda pair: pair[1]):
        layers = list(run)
        (first, kept), (last, _) = layers[0], layers[-1]
        name = str(first) if first == last else f"{first} to {last}"
        rows.append((name, *(f"{kept[part]:,} of {units[part]:,}" for part in units)))
    return markdown_table(rows, ("layer", *units))


def scores(pictures: Sequence[Picture]) -> Section:
    """Where the cut lies in the scores."""
    shown = _shown(pictures, "scores")
    return ["## Scores and the cut", *shown] if shown else []


def gradients(result: Metrics, ratio: float | None, pictures: Sequence[Picture]) -> Section:
    """How gradients differ between layers, and what was done about it."""
    shown = _shown(pictures, *_GRADIENTS)
    if ratio is None or not shown:
        return []
    said = result["plan"].get("diagnosis", {})
    text = (
        f"Mean |g| of the layer with the largest over that with the smallest: {ratio_text(ratio)} ({verdict(ratio)})."
    )
    if said.get("fix", "none") != "none":
        after = ratio_text(said.get("gradient_ratio_after_fix"))
        text += f" The allocation applied the fix {code(said['fix'])}; the ratio after it is {after}."
    return ["## Gradients", f"{text} `{PICTURES}/gradient_report.txt` has the figures by layer.", *shown]


def sensitivity(pictures: Sequence[Picture]) -> Section:
    """What the loss says of removing whole layers, if it was measured."""
    shown = _shown(pictures, "sensitivity")
    return ["## Sensitivity of the loss to each layer", *shown] if shown else []


def repair(errors: Metrics) -> Section:
    """What the repair left of the damage."""
    if not errors:
        return []
    names = ("lost_before", "lost_after", "lost_held_out_before", "lost_held_out_after")
    before, after, held_before, held_after = (f"{100 * errors[name]:.1f} %" for name in names)
    return [
        "## How it was repaired",
        f"On average over the repaired maps, pruning lost {before} of their squared output, and the repair left "
        f"{after}; on calibration sequences that the fit did not see, {held_before} and {held_after}. "
        "`repair.parquet` in the model's folder has them map by map.",
    ]


def continuations(result: Metrics) -> Section:
    """What both models make of the same beginnings, beside what the text says."""
    shown = result["continuations"]
    if not shown:
        return []
    length = result["protocol"]["continuation_tokens"]
    return [
        "## The same beginnings, continued",
        f"Beginnings of evaluation windows of {length} tokens, continued by {length} tokens, always the most likely "
        "one; ↵ is a new line. A few examples show what a loss looks like, not how large it is.",
        *(paragraph for one in shown for paragraph in _continuation(one, length)),
    ]


def _continuation(one: Metrics, length: int) -> Section:
    names = {"prompt": "beginning", "text": "the text itself", "dense": "dense", "pruned": "pruned"}
    rows: Rows = [(label, code(_NEW_LINES.sub(" ↵ ", one[name].strip()))) for name, label in names.items()]
    return [
        _left_table(rows, ("", f"window {one['window']}")),
        f"Dense and pruned agree in the first {one['agree']} of {length} tokens.",
    ]


_NEW_LINES = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


def provenance(result: Metrics, origin: Origin) -> Section:
    """Model, texts, versions and params."""
    plan, protocol, versions = result["plan"], result["protocol"], result["pruning"]["versions"]
    changed = ", with changes that are not committed" if origin.changed else ""
    facts: Rows = [
        ("model", f"{code(origin.model)}, family {code(origin.family)}, {len(result['kept'])} layers"),
        ("digest of config and weights", code(plan["model"])),
        ("calibration text", f"{code(origin.text)}, {origin.sequences} sequences of {origin.length} tokens"),
        ("seed of the calibration text", str(origin.seed)),
        ("evaluation text", f"{code(protocol['text'])}, {protocol['windows']} windows of {protocol['length']} tokens"),
        ("versions", ", ".join(f"{name} {code(version)}" for name, version in versions.items())),
        *([("git commit of the project", code(origin.commit) + changed)] if origin.commit else []),
    ]
    settings = {key: value for key, value in plan.items() if key not in _NOT_SETTINGS and not isinstance(value, dict)}
    criterion = plan["criterion"]
    settings |= {f"{criterion}.{part}": weight for part, weight in plan.get(criterion, {}).items()}
    params: Rows = [(code(key), code(_value(value))) for key, value in settings.items()]
    params += [(code(f"slice.{key}"), code(_value(value))) for key, value in result["pruning"]["slice"].items()]
    return [
        "## Provenance",
        _left_table(facts, ("what", "which")),
        "Params of scoring, allocation and slicing, after presets:",
        _left_table(params, ("param", "value")),
    ]


def _value(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _left_table(rows: Rows, header: tuple[str, str]) -> str:
    """A table of words, which read from the left."""
    return markdown_table(rows, header).replace("|---:", "|---", 1)
