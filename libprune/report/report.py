"""The report in Markdown, section by section; the HTML page is made from it."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby

from libprune.engine.architecture import RESIDUAL
from libprune.engine.cost import COUNTED
from libprune.pipeline.layout import Layout
from libprune.pipeline.terminal import Rows
from libprune.report.cautions import find_cautions, trust
from libprune.report.gradient_text import ratio_text
from libprune.report.headline import HEADER, Metrics, decision, describe_protocol, headline_rows
from libprune.report.markdown import Picture, code, markdown_table, picture_paragraphs, prose
from libprune.report.programs import describe_loading
from libprune.report.provenance import Provenance, Seen
from libprune.report.recovery import recovery_facts, training_end
from libprune.statistics.gradient_health import verdict

Section = list[str]
"""Paragraphs of Markdown; none if there is nothing to say."""

PICTURES = "gradient_analysis"
"""The folder of the pictures, beside the report."""

_GRADIENTS = ("grad_dist", "grad_heatmap", "grad_comparison", "layer_variance")
_NOT_SETTINGS = {"model", "tokens", "comparable"}


def compose_report(
    result: Metrics,
    layout: Layout,
    provenance: Provenance,
    pictures: Sequence[Picture],
    gradient_ratio: float | None,
    beside: Sequence[str] = (),
) -> str:
    """The whole report.

    Args:
        result: the content of `artifacts/evaluation.json`.
        layout: holds the pruned model, and the recovered one if there is one.
        provenance: of the result.
        pictures: those that lie in the folder `PICTURES` beside the report.
        gradient_ratio: largest over smallest mean |g| of the layers; None without gradients.
        beside: a section on how the result stands beside others, in paragraphs of Markdown.
    """
    sections = [
        _opening(result, provenance),
        _warnings(result, provenance.text),
        beside,
        _request(result, provenance.model),
        _vocabulary(result),
        _cut(result, pictures),
        _scores(pictures),
        _gradients(result, gradient_ratio, pictures),
        _depth(result),
        _sensitivity(pictures),
        _repair(result["pruning"]["repair"], result["pruning"].get("rescale", {})),
        _routing(result),
        _recovery(result, pictures),
        _draft(result),
        _continuations(result),
        describe_loading(result, layout),
        _provenance(result, provenance),
    ]
    return "\n\n".join(paragraph for section in sections for paragraph in section) + "\n"


def report_title(result: Metrics, made: Provenance) -> str:
    """The title of the report: the model and what was done to it."""
    return f"{made.name}, pruned" + (" and trained" if result.get("recovered") else "")


def _opening(result: Metrics, made: Provenance) -> Section:
    """The title, the sentence to decide by, and the headline table with the protocol of its measurements."""
    table = markdown_table(headline_rows(result), HEADER)
    protocol = describe_protocol(result)
    if result.get("recovered"):
        protocol += " Sizes and speed are those of the pruned model, whose shape the recovered one has."
    sentence = decision(result, trust(result, made.text))
    return [f"# {prose(report_title(result, made))}", sentence, table, protocol]


def _warnings(result: Metrics, calibration: str) -> Section:
    lines = [f"- {line}" for line in find_cautions(result, calibration)]
    return ["## Warnings worth reading", "\n".join(lines)] if lines else []


def _shown(pictures: Sequence[Picture], *names: str) -> Section:
    """The pictures of these names, in this order, each with its caption."""
    chosen = [one for name in names for one in pictures if one.name == name]
    return [paragraph for one in chosen for paragraph in picture_paragraphs(PICTURES, one)]


def asked_for(plan: Metrics, decided: str = "") -> str:
    """What was to be removed, or what may stay.

    Args:
        plan: the metadata of the plan.
        decided: by what the ratio was decided, in words; empty if it was asked for.
    """
    if reached := plan.get("reached"):
        limits = ", ".join(f"{100 * one['share_asked']:g} % of the {COUNTED[one['name']]}" for one in reached)
        return f"Keep at most {limits}"
    return f"Remove {100 * plan['ratio']:.1f} %{decided} of the {plan['ratio_of']} {plan['objective']}"


def _budgets(plan: Metrics) -> Section:
    """A table of the budgets: what may stay, what does, and which of them decide; none without budgets."""
    if not (reached := plan.get("reached")):
        return []
    rows = Rows()
    for one in reached:
        shares = f"{100 * one['share_asked']:g} %", f"{100 * one['share']:.2f} %"
        rows.append((COUNTED[one["name"]], *shares, "yes" if one["binds"] else "no"))
    programme = plan["programme"]
    return [
        markdown_table(rows, ("budget", "may stay", "stays", "decides")),
        "A budget decides if one unit more would pass it. By what was measured of single blocks, the divergence is "
        f"predicted to be {programme['divergence']:.4f} nats per token. No choice of counts is predicted to lose "
        f"{100 * programme['gap']:.2f} % less.",
    ]


def _request(result: Metrics, model: str) -> Section:
    """The share that was to be removed from the named model, and the methods that were chosen for it."""
    plan, recovery = result["plan"], result.get("recovery")
    trained = (
        f"recovery {code(recovery['params']['method'])} on {recovery['params']['tokens']:,} tokens" if recovery else ""
    )
    decided = "" if plan["ratio_asked"] is not None else ", as `retention` decided,"
    fusion = "" if plan["fusion"] == "none" else f"fusion {code(plan['fusion'])}, "
    worth = "" if plan["worth"] == "none" else f" with the worth of layers by {code(plan['worth'])}"
    return [
        "## What was asked",
        f"{asked_for(plan, decided)} of {code(model)}. "
        f"Criterion {code(plan['criterion'])} ({fusion}scaling {code(plan['scaling'])}), allocation "
        f"{code(plan['method'])}{worth}, "
        f"repair {code(result['pruning']['slice']['repair'])}, {trained or 'no training afterwards'}.",
        "After more experiments `libprune compare` writes this report with the curve of perplexity against size.",
    ]


def _cut(result: Metrics, pictures: Sequence[Picture]) -> Section:
    """The removed shares, in all and layer by layer."""
    pruned, multiple = result["pruned"], result["plan"]["channel_multiple"]
    kept = f", of which a multiple of {multiple} stays" if multiple > 1 else ""
    return [
        "## What was cut",
        f"Removed {100 * pruned['decoder_share_removed']:.2f} % of the decoder's parameters, "
        f"{100 * pruned['total_share_removed']:.2f} % of all, and {100 * pruned['macs_share_removed']:.2f} % of the "
        f"multiplications a token. {_units_cut(result['unit_kinds'], kept)}",
        *_columns(result),
        *_budgets(result["plan"]),
        *_shown(pictures, "kept_share"),
        _layers(result),
        *(
            f"The kept set overlaps with that of {code(name)} alone by {value:.4f} (Jaccard)."
            for name, value in result["plan"]["kept_set_overlap"].items()
        ),
    ]


def _columns(result: Metrics) -> Section:
    """How many columns of the residual stream stay; none where all do."""
    width = result["plan"].get("width")
    if width is None:
        return []
    return [
        f"The residual stream has {width:,} of {result['model']['sizes'][RESIDUAL]:,} columns, in every layer, the "
        "embedding and the output head. The shares above count them; the table below counts units alone."
    ]


def _vocabulary(result: Metrics) -> Section:
    """The vocabulary before and after, and the tokens of the evaluation text; none where all tokens stay."""
    found = result.get("vocabulary")
    if not found:
        return []
    names = {
        "tokens": "tokens of the tokenizer",
        "rows": "rows of the embedding",
        "parameters": "parameters of the whole model",
    }
    cut = found["per_1000_characters"]
    rows: Rows = [(name, *(f"{found[key][when]:,}" for when in ("before", "after"))) for key, name in names.items()]
    rows.append(("weights, MB", *(f"{found['bytes'][when] / 1e6:,.1f}" for when in ("before", "after"))))
    rows.append(("tokens in 1,000 characters of the evaluation text", *(f"{cut[when]:.1f}" for when in cut)))
    more = 100 * (cut["after"] / cut["before"] - 1)
    return [
        "## What went with the vocabulary",
        f"Tokens that {code(found['text'])} never needs went before anything was measured, from the embedding, the "
        "head and the tokenizer. Both models of this report have the smaller vocabulary, and their predictions are "
        "probabilities over fewer tokens.",
        markdown_table(rows, ("", "before", "after")),
        f"The evaluation text has {more:.1f} % more tokens than with all of the vocabulary: words that have no token "
        "of their own any more are put together from smaller ones. This is the price; it takes time, and room in the "
        "cache. A perplexity is per token, so that it does not compare with that of another vocabulary.",
    ]


def _units_cut(kinds: Mapping[str, str], kept: str) -> str:
    """What the units of each part are, in a sentence.

    Args:
        kinds: by part, `groups`, `heads`, `channels` or `experts`.
        kept: of which multiple channels stay, in words; empty for none.
    """
    words = {"groups": "heads", "channels": f"channels{kept}", "experts": "whole experts"}
    attention = "groups (a key-value head with its query heads)"
    if kinds.get("attention") == "heads":
        attention = "query heads (as many in each group that stays; a group without any loses its key-value head)"
    parts = [f"{part} in {attention if part == 'attention' else words[kind]}" for part, kind in kinds.items()]
    return f"The parts are cut in these units: {'; '.join(parts)}."


def _layers(result: Metrics) -> str:
    """A table of the kept units; neighbouring layers that keep the same share a row."""
    units, groups, rows = result["units"], result.get("groups", {}), Rows()
    in_groups = result.get("kept_groups", [{}] * len(result["kept"]))

    def cell(part: str, kept: Mapping[str, int], of: Mapping[str, int]) -> str:
        counts = f"{kept[part]:,} of {units[part]:,}" if part in kept else "–"
        return f"{counts} in {of[part]} of {groups[part]} groups" if part in of else counts

    for _, run in groupby(enumerate(zip(result["kept"], in_groups, strict=True)), key=lambda pair: pair[1]):
        layers = list(run)
        (first, (kept, of)), (last, _) = layers[0], layers[-1]
        name = str(first) if first == last else f"{first} to {last}"
        rows.append((name, *(cell(part, kept, of) for part in units)))
    return markdown_table(rows, ("layer", *units))


def _scores(pictures: Sequence[Picture]) -> Section:
    """The distribution of the scores of kept and removed units."""
    shown = _shown(pictures, "scores")
    return ["## Scores and the cut", *shown] if shown else []


def _gradients(result: Metrics, ratio: float | None, pictures: Sequence[Picture]) -> Section:
    """The differences of the gradients between layers, and the fix that allocate applied to them."""
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


def _sensitivity(pictures: Sequence[Picture]) -> Section:
    """The loss increase of removing each layer, if it was measured."""
    shown = _shown(pictures, "sensitivity")
    return ["## Sensitivity of the loss to each layer", *shown] if shown else []


def _depth(result: Metrics) -> Section:
    """The order in which whole layers or parts go, if it was measured, and how far it was followed."""
    steps = result.get("depth")
    if not steps:
        return []
    how = {
        "joint": "Each step takes out what adds least to the divergence of the dense model, with all that is gone by "
        "then, and all that is left is measured again.",
        "cosine": "Layers that change the direction of their input least go first.",
    }[result["plan"]["depth"]]
    rows = [
        (
            str(step["step"]),
            f"layer {step['layer']}" if step["removed"] == "layer" else f"{step['removed']} of layer {step['layer']}",
            _with_error(step["divergence"], step["standard_error"]),
            _plain(step["single_divergence"]),
            f"{step['change']:.3f}",
            "yes" if step["gone"] else "no",
        )
        for step in steps
    ]
    header = ("step", "removed", "divergence by then", "alone", "1 − cosine", "gone")
    return [
        "## Which layers go whole",
        f"{how} Divergences are in nats per token, on calibration sequences and without repair.",
        markdown_table(rows, header),
    ]


def _with_error(value: float, error: float) -> str:
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _repair(errors: Metrics, rescale: Metrics) -> Section:
    """The error of the pruned maps before and after the repair, and what was done behind whole layers that are gone."""
    sentences = [*_fitted(errors), *_rescaled(rescale)]
    return ["## How it was repaired", *sentences] if sentences else []


def _rescaled(rescale: Metrics) -> Section:
    if why_not := rescale.get("why_not"):
        return [f"Layers behind whole layers or parts that are gone were not rescaled: {why_not}."]
    if not (factors := rescale.get("factors")):
        return []
    runs = [next(run) for _, run in groupby(factors.items(), key=lambda item: item[1])]
    named = ", ".join(f"from layer {layer} on {factor:.3f}" for layer, factor in runs)
    return [
        "Behind whole layers or parts that are gone the residual stream is shorter than in the dense model, so what "
        f"later layers add to it was multiplied by as much: {named}, with the layers counted as in the dense model."
    ]


def _fitted(errors: Metrics) -> Section:
    if not errors:
        return []
    share = {name: f"{100 * value:.1f} %" for name, value in errors.items()}
    unseen = "no calibration sequence was held out, so that nothing says what is left on another text"
    if "lost_held_out_after" in errors:
        unseen = (
            f"on calibration sequences that the fit did not see, {share['lost_held_out_before']} and "
            f"{share['lost_held_out_after']}"
        )
    sentence = (
        f"On average over the repaired maps, pruning lost {share['lost_before']} of their squared output, and the "
        f"repair left {share['lost_after']}; {unseen}. "
    )
    if "layer_before" in errors:
        sentence += (
            f"Then all weights of each layer were trained. On held-out sequences the layers missed "
            f"{share['layer_before']} of what the dense ones gave before it, and {share['layer_after']} after it. "
        )
    return [f"{sentence}`repair.parquet` in the model's folder has them map by map."]


def _routing(result: Metrics) -> Section:
    """How many tokens go through other experts than in the dense model, mixture by mixture."""
    routing = result.get("routing")
    if not routing:
        return []
    rows = [
        (
            str(one["layer"]),
            f"{one['kept']} of {one['experts']}",
            f"{100 * one['removed_weight']:.1f} %",
            *(f"{100 * share:.1f} %" for share in one["changed"].values()),
        )
        for one in routing["mixtures"]
    ]
    changed = " and ".join(f"{100 * share:.1f} % in the {name}" for name, share in routing["changed"].items())
    header = (
        "layer",
        "experts kept",
        "weight on removed experts",
        *(f"changed, {name}" for name in routing["changed"]),
    )
    return [
        "## What routing does after the cut",
        f"In the dense model, {100 * routing['removed_weight']:.1f} % of the weight that routers give to experts went "
        f"to experts that are removed. Of the tokens of the evaluation windows, {changed} model go through other "
        "experts than in the dense model: where one of their experts is gone, or where their hidden states have "
        "changed. Both are means over the mixtures; the table has each.",
        markdown_table(rows, header),
    ]


def _recovery(result: Metrics, pictures: Sequence[Picture]) -> Section:
    """The training of the pruned model: its facts, its end, and its learning curve."""
    recovery = result.get("recovery")
    if not recovery:
        return []
    return [
        "## How it was recovered",
        _left_table(recovery_facts(recovery, result["pruned"]["total_parameters"]), ("what", "which")),
        training_end(recovery),
        *_shown(pictures, "learning_curve"),
    ]


def _draft(result: Metrics) -> Section:
    """What the pruned and the recovered model are worth as drafts for the dense one, if they write."""
    models = [(name, result[name]["draft"]) for name in ("pruned", "recovered") if result.get(name)]
    drafts = [(name, draft) for name, draft in models if draft]
    if not drafts:
        return []
    protocol = result["protocol"]
    rows = [
        (name, *(_percent(draft, key) for key in ("acceptance", "agreement")), f"{draft['step_ratio']:.2f}")
        for name, draft in drafts
    ]
    header = ("draft", "tokens accepted", "same most likely token", "time of a step over the dense model's")
    return [
        "## As a draft for speculative decoding",
        "A draft model writes some tokens one by one. The dense model then looks at them in one pass, and accepts "
        "so many that the text follows its own distribution. Below, tokens are sampled at temperature 1. Shares are "
        f"means over the positions of {protocol['windows']} windows of {protocol['length']} tokens of "
        f"{code(protocol['text'])}; ± is one standard error over windows.",
        markdown_table(rows, header),
        " ".join(_draft_verdict(name, draft) for name, draft in drafts)
        + " This takes the dense model's look at a draft to last as long as one of its steps.",
    ]


def _percent(draft: Metrics, key: str) -> str:
    return f"{100 * draft[key]:.1f} ± {100 * draft[f'{key}_se']:.1f} %"


def _draft_verdict(name: str, draft: Metrics) -> str:
    """A sentence on whether speculative decoding with this draft is faster than the dense model alone."""
    pays = "it pays" if draft["speedup"] > 1 else "it does not pay"
    length = f"{draft['tokens']} tokens" if draft["tokens"] > 1 else "one token"
    return (
        f"With the {name} model as draft, decoding is expected to be × {draft['speedup']:.2f} as fast as by the dense "
        f"model alone, in drafts of {length}, the best length: {pays}."
    )


def _continuations(result: Metrics) -> Section:
    """Continuations of the same beginnings by all models, beside the text itself."""
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
    agree = f"Dense and pruned agree in the first {one['agree']} of {length} tokens"
    if "recovered" in one:
        names["recovered"] = "recovered"
        agree += f", dense and recovered in the first {one['agree_recovered']}"
    rows: Rows = [(label, code(_NEW_LINES.sub(" ↵ ", one[name].strip()))) for name, label in names.items()]
    return [_left_table(rows, ("", f"window {one['window']}")), f"{agree}."]


_NEW_LINES = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


def _provenance(result: Metrics, made: Provenance) -> Section:
    """The model, the texts, the versions and the params that the result was made from."""
    plan, protocol, versions = result["plan"], result["protocol"], result["pruning"]["versions"]
    changed = ", with changes that are not committed" if made.changed else ""
    facts: Rows = [
        ("model", f"{code(made.model)}, family {code(made.family)}, {len(result['kept'])} layers"),
        ("digest of config and weights", code(plan["model"])),
        ("calibration text", f"{code(made.text)}, {made.sequences} sequences of {made.length} tokens"),
        ("seed of the calibration text", str(made.seed)),
        ("evaluation text", f"{code(protocol['text'])}, {protocol['windows']} windows of {protocol['length']} tokens"),
        ("versions", ", ".join(f"{name} {code(version)}" for name, version in versions.items())),
        *([("git commit of the project", code(made.commit) + changed)] if made.commit else []),
    ]
    settings = {key: value for key, value in plan.items() if key not in _NOT_SETTINGS and not isinstance(value, dict)}
    criterion = plan["criterion"]
    settings |= {f"{criterion}.{part}": weight for part, weight in plan.get(criterion, {}).items()}
    params: Rows = [(code(key), code(_value(value))) for key, value in settings.items()]
    recovery = result.get("recovery")
    sections = {"slice": result["pruning"]["slice"], "recover": recovery["params"] if recovery else {}}
    for section, given in sections.items():
        params += [(code(f"{section}.{key}"), code(_value(value))) for key, value in given.items()]
    named = "scoring, allocation, slicing and recovery" if recovery else "scoring, allocation and slicing"
    return [
        "## Provenance",
        _left_table(facts, ("what", "which")),
        *_seen(result.get("seen", [])),
        f"Params of {named}, after presets:",
        _left_table(params, ("param", "value")),
    ]


def _seen(steps: Sequence[Seen]) -> Section:
    """A table of how much text each step saw; none where that is not known."""
    rows: Rows = []
    for one in steps:
        most = "" if one.exact else "up to "
        rows.append((one.step, one.text, f"{one.sequences:,}", f"{most}{one.length:,}", f"{most}{one.tokens:,}"))
    if not rows:
        return []
    header = ("step", "text", "sequences", "tokens of each", "tokens in all")
    return [
        "How much text each step saw; tokens that were trained on several times are counted each time:",
        markdown_table(rows, header).replace("|---:", "|---", 1),
    ]


def _value(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _left_table(rows: Rows, header: tuple[str, str]) -> str:
    """A table of two columns of words, both left aligned."""
    return markdown_table(rows, header).replace("|---:", "|---", 1)
