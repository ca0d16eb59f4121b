"""A guide to the settings of a comparison, whose every word follows from its figures and the criteria's records."""

import math
from collections.abc import Sequence

from libprune.experiments.costs import collecting_stages, pruning_stages, recovering_stages
from libprune.experiments.dvc_experiments import Measure
from libprune.experiments.results import Gathered
from libprune.experiments.summary import Perplexity, Summary, compare_settings
from libprune.experiments.table import correlation_text, explain_columns, measured_text, tabulate_settings, times
from libprune.pipeline.params import Params
from libprune.report.markdown import code, escaped_table, prose
from libprune.scoring.criteria import find_criterion
from libprune.scoring.expression import named_criteria

SAME_TIME = 0.1
"""Difference of two times, as a share of the longer one, up to which they count as equal: timing is no more exact."""


def compose_guide(gathered: Gathered, summaries: Sequence[Summary]) -> str:
    """Compose the guide to the settings of a comparison, as a page in Markdown."""
    comparison = gathered.comparison
    parts = [
        f"# {prose(comparison.title)}",
        f"Written from the results of the comparison {code(comparison.name)}, the lowest {summaries[0].measure.name} "
        "first. What it says of when to choose a setting follows from these figures alone: one model, one text, these "
        "shares removed. Two settings count as different if their difference is larger than the noise of calibration "
        "seeds and evaluation windows, and cost the same if their times differ by a tenth or less.",
        escaped_table(*tabulate_settings(gathered, summaries)),
        explain_columns(summaries),
    ]
    for one in summaries:
        setting = gathered.setting(one.name)
        changes = ", ".join(code(f"{key}: {value}") for key, value in setting.changes.items())
        rows = [
            ("criterion", _criterion(setting.params)),
            ("set", changes or "nothing: params.yaml as it is"),
            ("needs", ", ".join(collecting_stages(setting.params)) or "no collecting stage"),
            ("then runs", ", ".join(pruning_stages(setting.params) + recovering_stages(setting.params))),
            ("costs", _costs(one)),
            *_quality(one),
            ("ranks units like measured losses", _ranks(one)),
        ]
        facts = "\n".join(f"- {what}: {text}" for what, text in rows)
        parts += [f"## {prose(one.name)}", facts, _when(one, summaries)]
    return "\n\n".join(parts) + "\n"


def _criterion(params: Params) -> str:
    said = []
    for name in named_criteria(params.score):
        record = find_criterion(name)
        source = f" ({record.source})" if record.source else ""
        reach = "everywhere" if record.comparable else "within a layer and part"
        said.append(f"`{name}`, in units of {record.unit}, compares {reach}{source}")
    fused = f"`score.fusion: {params.score.fusion}` of " if len(said) > 1 else ""
    return prose(fused + "; ".join(said))


def _costs(one: Summary) -> str:
    said = [
        f"{what} {cost.seconds:,.1f} s, {cost.peak_memory_bytes / 1e6:,.0f} MB" if cost else f"{what} not on record"
        for what, cost in (
            ("collecting", one.collecting),
            ("pruning", one.pruning),
            *([("recovering", one.recovering)] if one.after else []),
        )
    ]
    return "; ".join(said)


def _quality(one: Summary) -> list[tuple[str, str]]:
    """What a setting loses; if it was trained, before recovery and after it."""
    if one.after is None:
        return [("loses", _loss(one.before, one.measure))]
    return [
        ("loses before recovery", _loss(one.before, one.measure)),
        ("loses after recovery", _loss(one.after, one.measure)),
    ]


def _loss(perplexity: Perplexity, measure: Measure) -> str:
    seeds = len(perplexity.ratios)
    over = f"{seeds} seeds" if seeds > 1 else "one seed"
    what = "the dense model's perplexity" if measure.dense else f"of {measure.name}"
    return f"{measured_text(perplexity, measure)} {what}, {over}; ± {perplexity.error:.3g} over the windows"


def _ranks(one: Summary) -> str:
    return ", ".join(f"{part} {correlation_text(value)}" for part, value in one.correlations.items()) or "not measured"


def _when(one: Summary, summaries: Sequence[Summary]) -> str:
    """When to choose a setting, as far as the figures say."""
    beside: dict[str, list[Summary]] = {}
    for other in summaries:
        sentence = _SAID.get((_loses(one, other), _costs_beside(other, one)))
        if other is not one and sentence:
            beside.setdefault(sentence, []).append(other)
    said = [
        sentence.format(_named(one, beside[sentence]), s="s" if len(beside[sentence]) == 1 else "")
        for sentence in dict.fromkeys(_SAID.values())
        if sentence in beside
    ]
    if not any(_loses(one, other) == "more" for other in summaries):
        said.insert(0, "No setting here loses less by more than the noise.")
    if one.seconds is None:
        said.append("What it costs is not on record, so that nothing here weighs its cost.")
    return prose(" ".join(said))


_BEFORE = "No reason to choose it before {}, which lose{s} less for no more time."
_SAID = {
    ("more", "less"): _BEFORE,
    ("more", "same"): _BEFORE,
    ("more", "more"): "Cheaper than {}, which lose{s} less.",
    ("more", "unknown"): "Loses more than {}.",
    ("as much", "less"): "Not distinguishable from {}, which cost{s} less.",
    ("as much", "same"): "Not distinguishable from {}, which cost{s} the same.",
    ("as much", "more"): "Not distinguishable from {}, which cost{s} more.",
}
"""What to say of a setting beside others, by what it loses compared with them and what they cost compared with it."""

_NAMED = 3


def _named(one: Summary, others: Sequence[Summary]) -> str:
    """Up to three of the others, each with the factor of one's perplexity to its own, and its cost.

    The best come first; among settings that lose as much as this one, the nearest.
    """
    factors = {other.name: to.factor.mean for other in others if (to := compare_settings(one, other))}
    if _loses(one, others[0]) == "as much":
        others = sorted(others, key=lambda other: abs(math.log(factors[other.name])))
    said = []
    for other in others[:_NAMED]:
        seconds = [f"{other.seconds:,.0f} s"] if other.seconds is not None and one.seconds is not None else []
        said.append(f"{other.name} ({', '.join([times(factors[other.name]), *seconds])})")
    if len(others) > _NAMED:
        said.append(f"{len(others) - _NAMED} more")
    return " and ".join(filter(None, (", ".join(said[:-1]), said[-1])))


def _loses(one: Summary, other: Summary) -> str:
    to = compare_settings(one, other)
    if to is None:
        return "unknown"
    if to.kind != "clear":
        return "as much"
    return "more" if to.factor.mean > 1 else "less"


def _costs_beside(one: Summary, other: Summary) -> str:
    """What one costs beside the other: `less`, `same`, `more` or `unknown`."""
    if one.seconds is None or other.seconds is None:
        return "unknown"
    if abs(one.seconds - other.seconds) <= SAME_TIME * max(one.seconds, other.seconds):
        return "same"
    return "more" if one.seconds > other.seconds else "less"
