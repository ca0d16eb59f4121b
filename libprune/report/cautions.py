"""Warnings of a report: signs in a result that it is worse, or less certain, than its headline looks."""

import re

from libprune.report.headline import Metrics, embeds, final_figures
from libprune.report.markdown import code, prose
from libprune.report.recovery import rose

MUCH_WORSE = 2.0
"""Perplexity ratio from which the text that a model writes is visibly worse."""
LEAST_ALIKE = 0.9
"""Rank correlation of similarities below which a search by embeddings finds visibly other texts; a convention."""
FEW_WINDOWS = 8
"""Evaluation windows below which a standard error is itself a guess."""
MISSED = 0.01
"""Largest difference between the removed and the asked share that needs no warning."""


def find_cautions(result: Metrics, calibration: str) -> list[str]:
    """The warnings that a result calls for, each one or two sentences of Markdown; the advice of allocate comes first.

    Args:
        result: the content of `artifacts/evaluation.json`.
        calibration: the name of the calibration text, as in `libprune.report.provenance.Provenance`.
    """
    advice = result["plan"].get("diagnosis", {}).get("advice", [])
    return [
        *(prose(f"{line[:1].upper()}{line[1:]}.") for line in advice),
        *_quality(result),
        *_domain(result["protocol"]["text"], calibration),
        *_budget(result),
        *_speed(result["speed"]),
        *_repair(result["pruning"]["repair"]),
        *_recovery(result),
    ]


def trust(result: Metrics, calibration: str) -> str:
    """Whether to trust a result, as the end of a sentence in Markdown: the gravest that is known against it.

    Args:
        result: the content of `artifacts/evaluation.json`.
        calibration: the name of the calibration text, as in `libprune.report.provenance.Provenance`.
    """
    protocol = result["protocol"]
    if embeds(result):
        if not final_figures(result)["rank_correlation"] >= LEAST_ALIKE:
            return "do not use it as it is, it finds other texts alike than the dense model does"
    elif not (result.get("recovered") or result)["perplexity_ratio"]["value"] < MUCH_WORSE:
        return "do not use it as it is, its text is visibly worse"
    if protocol["text"] == "self":
        return "do not decide by this yet, since perplexity was measured on text of the dense model's own"
    if protocol["windows"] < FEW_WINDOWS:
        return f"do not decide by this yet, since this was measured on {protocol['windows']} window(s) only"
    if _same_text(protocol["text"], calibration):
        return "trust this for text like the one it was calibrated on, and measure it on yours before you use it"
    if not result["tasks"]:
        return "trust this for text like the evaluation text, and measure your own tasks before you use it"
    return "trust this for text like the evaluation text, and for the tasks in the table"


def _similarity(result: Metrics) -> list[str]:
    """The warnings of a model that gives embeddings."""
    recovered, windows, lines = result.get("recovered"), result["protocol"]["windows"], []
    correlation = final_figures(result)["rank_correlation"]
    if not correlation >= LEAST_ALIKE:
        advice = (
            "train on more tokens (`recover.tokens`), or remove less" if recovered else "train it (`recover.method`)"
        )
        lines.append(
            f"The rank correlation of similarities is {correlation:.3f}, below {LEAST_ALIKE}: expect a search by these "
            f"embeddings to find other texts, and {advice} before use."
        )
    if windows < FEW_WINDOWS:
        lines.append(f"Embeddings are compared on {windows} texts; raise `tokenize.evaluation_windows` to trust it.")
    lines.append(
        "Embeddings are only compared with the dense model's, on one text. Measure your own task, such as retrieval, "
        "and compute all embeddings of an index anew: those of two models do not mix."
    )
    return lines


def _quality(result: Metrics) -> list[str]:
    if embeds(result):
        return _similarity(result)
    recovered, windows, lines = result.get("recovered"), result["protocol"]["windows"], []
    ratio = (recovered or result)["perplexity_ratio"]["value"]
    if not ratio < MUCH_WORSE:
        after = " after recovery" if recovered else ""
        advice = (
            "train on more tokens (`recover.tokens`), or remove less" if recovered else "train it (`recover.method`)"
        )
        lines.append(
            f"Perplexity is {ratio:.2f} times the dense model's{after}: expect visibly worse text, and {advice} "
            "before use."
        )
    if windows < FEW_WINDOWS:
        lines.append(f"Perplexity is measured on {windows} window(s); raise `tokenize.evaluation_windows` to trust it.")
    if result["protocol"]["text"] == "self":
        lines.append(
            "Perplexity is measured on text that the dense model wrote itself, where no other model can do better: it "
            "says how closely the pruned model follows the dense one, and nothing of your text. Name a "
            "`tokenize.evaluation_text` for that."
        )
    if not result["tasks"]:
        lines.append(
            "Only perplexity on one text was measured; abilities that this text does not need may have suffered more. "
            "`evaluate.tasks` measures zero-shot accuracy."
        )
    return lines


def _same_text(evaluation: str, calibration: str) -> bool:
    """Whether the evaluation text, by its name or names, is a part of the calibration text that the user has named."""
    return evaluation != "self" and _names(evaluation) <= _names(calibration)


def _names(text: str) -> set[str]:
    """What the name of a text is made of: the names of several without their shares, or data set, split and so on."""
    return {_SHARE.sub("", name) for name in text.split(", ")}


_SHARE = re.compile(r"^[\d.e+-]+ % ")


def _domain(evaluation: str, calibration: str) -> list[str]:
    if not _same_text(evaluation, calibration):
        return []
    return [
        f"Calibrated and evaluated on parts of one text, {code(calibration)}: what was kept is what such text needs, "
        "and elsewhere the loss may be larger. Calibrate on text like that which the model is to be used on, and name "
        "another under `tokenize.evaluation_text`."
    ]


def _budget(result: Metrics) -> list[str]:
    plan, pruned, lines = result["plan"], result["pruned"], []
    shares = {"decoder": pruned["decoder_share_removed"], "total": pruned["total_share_removed"]}
    asked = plan["ratio"] is not None and plan["objective"] == "parameters"
    if asked and abs(shares[plan["ratio_of"]] - plan["ratio"]) > MISSED:
        added = ", and the biases that the repair adds count" if result["pruning"]["slice"]["repair"] == "bias" else ""
        lines.append(
            f"{100 * plan['ratio']:.1f} % was asked for and {100 * shares[plan['ratio_of']]:.1f} % removed: the shape, "
            f"the floors, the width multiples or parts that only go whole allow nothing nearer{added}."
        )
    for part in result["units"]:
        gone = [str(layer) for layer, kept in enumerate(result["kept"]) if not kept.get(part, 1)]
        if gone:
            lines.append(f"Layers without any {part} left: {', '.join(gone)}.")
    return lines


def _speed(speed: Metrics) -> list[str]:
    return [
        f"The change of {name} speed is within the noise of its rounds."
        for name in ("prefill", "decode")
        if speed[f"{name}_spread"] and speed[f"{name}_spread"][0] <= 1 <= speed[f"{name}_spread"][1]
    ]


def _repair(errors: Metrics) -> list[str]:
    if errors.get("lost_held_out_after", 0.0) <= errors.get("lost_held_out_before", 0.0):
        return []
    return [
        "On calibration sequences that it did not see, the repair does harm: it is fitted to too little text. Raise "
        "`tokenize.calibration_sequences` or `slice.damping`."
    ]


def _recovery(result: Metrics) -> list[str]:
    recovered, recovery, lines = result.get("recovered"), result.get("recovery"), []
    if not recovered or not recovery:
        return []
    evaluation = result["protocol"]["text"]
    if recovery["step"] and _gained(result) and _same_text(evaluation, recovery["text"]):
        lines.append(
            f"Recovered and evaluated on parts of one text, {code(evaluation)}: a part of the gain is adaptation to "
            "this text, and elsewhere the gain may be smaller. Name another `tokenize.evaluation_text`, or train on "
            "another text (`recover.text`)."
        )
    if not recovery["step"]:
        lines.append(
            "No step of the recovery lowered the held-out loss, so that the recovered model has the weights of the "
            "pruned one. Lower `recover.learning_rate`, or train on more text (`recover.text`)."
        )
    if rose(recovery):
        lines.append(
            f"The held-out loss rose again after step {recovery['step']:,} of {recovery['steps']:,}: the text is too "
            "small or too narrow for more training. Name more text under `recover.text`."
        )
    if embeds(result):
        if recovered["cosine"] < result["pruned"]["cosine"]:
            lines.append(
                f"Recovery took the embeddings further from the dense model's on the evaluation text, cosine "
                f"{recovered['cosine']:.4f} after {result['pruned']['cosine']:.4f}: train on text like that which the "
                "model is to be used on (`recover.text`), or use the pruned model."
            )
        return lines
    before, after = (one["perplexity_ratio"]["value"] for one in (result, recovered))
    if after > before:
        lines.append(
            f"Recovery made perplexity on the evaluation text worse, × {after:.3f} after × {before:.3f}: train on text "
            "like that which the model is to be used on (`recover.text`), or use the pruned model."
        )
    return lines


def _gained(result: Metrics) -> bool:
    """Whether recovery has brought the model nearer to the dense one on the evaluation text."""
    recovered = result["recovered"]
    if embeds(result):
        return bool(recovered["cosine"] > result["pruned"]["cosine"])
    return bool(recovered["perplexity_ratio"]["value"] < result["perplexity_ratio"]["value"])
