"""A guide to the settings of a comparison, whose every word follows from its figures and the criteria's records."""

from collections.abc import Sequence

from libprune.comparison_results import Gathered
from libprune.comparison_summary import Summary, difference
from libprune.comparison_table import correlation_text, interval_text, times
from libprune.criteria import find_criterion
from libprune.fusion import named_criteria
from libprune.markdown import code, prose
from libprune.params import Params
from libprune.stage_costs import collecting, pruning

SAME_TIME = 0.1
"""Share of the longer time up to which two settings cost the same: a loaded machine times no better."""


def guide(gathered: Gathered, found: Sequence[Summary]) -> str:
    """The page in Markdown."""
    comparison = gathered.comparison
    parts = [
        f"# {prose(comparison.title)}",
        f"Written by `libprune compare` from the results of {code(comparison.name)}, the lowest perplexity first. "
        "What it says of when to choose a setting follows from these figures alone: one model, one text, these shares "
        "removed. Two settings are told apart if their difference is larger than the noise of calibration seeds and "
        "evaluation windows, and cost the same if their times differ by a tenth or less.",
    ]
    for one in found:
        setting = gathered.setting(one.name)
        changes = ", ".join(code(f"{key}: {value}") for key, value in setting.changes.items())
        rows = [
            ("criterion", _criterion(setting.params)),
            ("set", changes or "nothing: params.yaml as it is"),
            ("needs", ", ".join(collecting(setting.params)) or "no collecting stage"),
            ("then runs", ", ".join(pruning(setting.params))),
            ("costs", _costs(one)),
            ("loses", _quality(one)),
            ("ranks units like measured losses", _ranks(one)),
        ]
        facts = "\n".join(f"- {what}: {text}" for what, text in rows)
        parts += [f"## {prose(one.name)}", facts, _when(one, found)]
    return "\n\n".join(parts) + "\n"


def _criterion(params: Params) -> str:
    said = []
    for name in named_criteria(params.score):
        record = find_criterion(name)
        source = f" ({record.source})" if record.source else ""
        reach = "everywhere" if record.comparable else "within a layer and type"
        said.append(f"`{name}`, in units of {record.unit}, compares {reach}{source}")
    fused = f"`score.fusion: {params.score.fusion}` of " if len(said) > 1 else ""
    return prose(fused + "; ".join(said))


def _costs(one: Summary) -> str:
    said = [
        f"{what} {cost.seconds:,.1f} s, {cost.peak_memory_bytes / 1e6:,.0f} MB" if cost else f"{what} not on record"
        for what, cost in (("collecting", one.collecting), ("pruning", one.pruning))
    ]
    return "; ".join(said)


def _quality(one: Summary) -> str:
    seeds = len(one.ratios)
    over = f"{seeds} seeds" if seeds > 1 else "one seed"
    return f"{interval_text(one.ratio)} the dense model's perplexity, {over}; ± {one.error:.3g} over the windows"


def _ranks(one: Summary) -> str:
    return ", ".join(f"{part} {correlation_text(value)}" for part, value in one.correlations.items()) or "not measured"


def _when(one: Summary, found: Sequence[Summary]) -> str:
    """When to choose a setting, as far as the figures say."""
    said = [sentence for other in found if other is not one and (sentence := _beside(one, other))]
    if one.seconds is None:
        said.append("What it costs is not on record, so that nothing here weighs its cost.")
    if not [other for other in found if other is not one and _loses(one, other) == "more"]:
        said.insert(0, "No setting here loses less by more than the noise.")
    return prose(" ".join(said))


def _loses(one: Summary, other: Summary) -> str:
    to = difference(one, other)
    if to is None:
        return "unknown"
    if to.kind != "clear":
        return "as much"
    return "more" if to.factor.mean > 1 else "less"


def _costs_more(one: Summary, other: Summary) -> bool | None:
    """Whether one costs more time than the other; None if they cost the same or it is not known."""
    if one.seconds is None or other.seconds is None:
        return None
    if abs(one.seconds - other.seconds) <= SAME_TIME * max(one.seconds, other.seconds):
        return None
    return one.seconds > other.seconds


def _beside(one: Summary, other: Summary) -> str | None:
    """What one setting's figures say beside another's, if that bears on the choice."""
    loses, dearer = _loses(one, other), _costs_more(one, other)
    to = difference(one, other)
    if to is None or one.seconds is None or other.seconds is None:
        return f"Loses more than {other.name} ({times(to.factor.mean)})." if to and loses == "more" else None
    spent = f"{one.seconds:,.0f} s against {other.seconds:,.0f} s"
    if loses == "as much" and dearer is not None:
        what = "which is cheaper" if dearer else "which is dearer"
        return f"Not distinguishable from {other.name}, {what} ({spent})."
    if loses == "as much":
        return f"Not distinguishable from {other.name}, which costs the same."
    if loses == "more" and dearer is False:
        return f"Cheaper than {other.name} ({spent}) and loses more ({times(to.factor.mean)})."
    if loses == "more":
        return (
            f"No reason to choose it before {other.name}, which loses less ({times(to.factor.mean)}) for no more time."
        )
    return None
