"""What the params alone say of a run that would stop later: criteria, numbers of sequences, packages."""

from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from libprune.allocation.block_worth import require_comparable, require_meaningful
from libprune.allocation.gradient_fix import require_defined
from libprune.engine.errors import LibpruneError
from libprune.engine.yaml_file import Place
from libprune.export.packages import PACKAGES, require_packages
from libprune.pipeline.faults import Fault
from libprune.pipeline.methods import METHODS, REPAIRS, allocation_reads
from libprune.pipeline.params import Params
from libprune.scoring.criteria import CRITERIA, NOTHING_COLLECTED
from libprune.scoring.expression import asked_of, expression_faults, parse_criteria
from libprune.scoring.fusion import READS_LOSSES
from libprune.scoring.score import foretold, require_scaling

PARTS = {"attention": "attention", "mlp": "mlp"}
"""Parts that layers of nearly every family have, by the key of their criteria."""
HELD_OUT = 8
"""Calibration sequences that `slice.damping: auto` needs at least, since it holds out every eighth."""


def setting_faults(params: Params) -> Iterator[Fault]:
    """Everything that is known from the params alone, whatever the model and the texts are."""
    yield from _criteria(params)
    yield from _sequences(params)
    yield from _shape(params)
    yield from _packages(params)


def refused(place: Place, check: Callable[..., object], *args: object) -> Iterator[Fault]:
    """The fault that a check raises, which stops at the user's error; none if it passes.

    Args:
        place: where the fault is.
        check: a function that raises a `LibpruneError`.
        args: of the check.
    """
    try:
        check(*args)
    except LibpruneError as error:
        yield Fault(str(error), place)


def whole_layers(params: Params, family: str, why: str) -> Iterator[Fault]:
    """The fault of layers that are to go as a whole from a model that can lose none.

    Args:
        family: of the model.
        why: it can lose none; empty if it can.
    """
    depth = params.allocate.depth
    if why and (depth == "units" or (depth != "none" and params.depth.of == "layers")):
        yield Fault(
            f"allocate.depth is {depth}, but no layer of family {family!r} can be deleted: {why}; set it to none",
            ("allocate", "depth"),
        )


def _criteria(params: Params) -> Iterator[Fault]:
    """Expressions, what they read, and what the fusion and the allocation ask of them."""
    score = params.score
    asked = dict(asked_of(PARTS | ({} if score.experts is None else {"experts": "experts"}), score))
    unreadable = {key: list(expression_faults(text, score.fusion, key)) for key, text in asked.values()}
    for key, texts in unreadable.items():
        yield from (Fault(text, ("score", key)) for text in dict.fromkeys(texts))
    if any(unreadable.values()):
        return
    weights = {part: parse_criteria(text, score.fusion, key) for part, (key, text) in asked.items()}
    for key, own in {asked[part][0]: own for part, own in weights.items()}.items():
        yield from _switched_off(params, key, list(own))
        yield from refused(("score", key), require_scaling, {key: own}, score)
    yield from _allocation(params, foretold(weights, score))


def _switched_off(params: Params, key: str, names: list[str]) -> Iterator[Fault]:
    """Statistics that criteria read and that nothing collects."""
    for name in names:
        if params.hessian.estimator == "none" and "hessian" in CRITERIA[name].stages:
            yield Fault(f"score.{key}: {name} {NOTHING_COLLECTED.format('hessian')}", ("score", key))
    if params.score.fusion in READS_LOSSES and len(names) > 1 and params.ablation.units == 0:
        yield Fault(
            f"score.fusion: {params.score.fusion} compares criteria with measured losses, and ablation.units: 0 "
            "measures none; set ablation.units (400 is a start), or score.fusion to weighted",
            ("score", "fusion"),
        )


def _allocation(params: Params, meta: Mapping[str, Any] | None) -> Iterator[Fault]:
    """What the method, the worth of blocks and the gradient fix ask of the scores."""
    allocate, scaling = params.allocate, params.score.scaling
    yield from refused(("allocate", "worth"), require_meaningful, allocate, scaling)
    if allocate.method == "retention" and scaling == "zscore":
        yield Fault(
            "allocate.method: retention reads shares of the importance, and score.scaling: zscore makes some of it "
            "negative; set score.scaling to none or minmax, or choose another allocate.method",
            ("allocate", "method"),
        )
    if meta is None:
        return
    key = "split" if METHODS[allocate.method].splits else "method"
    yield from refused(("allocate", key), require_comparable, meta, allocate)
    fix = (allocate.gradient_fix, meta["criterion"], meta["gradient_orders"], scaling, allocate.method)
    yield from refused(("allocate", "gradient_fix"), require_defined, *fix)


def _sequences(params: Params) -> Iterator[Fault]:
    """Sequences that are asked for beyond those that are tokenized, and too few of them to choose a damping by."""
    stored, allocate = params.tokenize.calibration_sequences, params.allocate
    reads = allocation_reads(allocate.method, allocate.worth, allocate.times, allocate.evaluations)
    used = {
        "gradients": True,
        "hessian": params.hessian.estimator != "none",
        "activations": True,
        "ablation": params.ablation.units > 0,
        "sensitivity": "sensitivity" in reads,
        "depth": allocate.ordered,
        "levels": "levels" in reads,
        "width": allocate.width is not None,
        "slice": REPAIRS[params.slice.repair].layer_by_layer,
    }
    fitted, own = params.tokenize.repaired_on[0], params.tokenize.repair_sequences is not None
    drawn = dict.fromkeys(used, (stored, "calibration")) | {"slice": (fitted, "repair" if own else "calibration")}
    asked = {section: getattr(params, section).sequences or number for section, (number, _) in drawn.items()}
    for section, number in asked.items():
        most, text = drawn[section]
        if used[section] and number > most:
            yield Fault(
                f"{section}.sequences: {number} is more than tokenize.{text}_sequences: {most}; write null for "
                f"all of them, at most {most}, or raise tokenize.{text}_sequences",
                (section, "sequences"),
            )
    by_layer = REPAIRS[params.slice.repair].layer_by_layer
    chosen_by = "slice" if by_layer else {"local": "activations"}.get(params.slice.repair)
    held = min(asked[chosen_by], drawn[chosen_by][0]) if chosen_by else 0
    if chosen_by and params.slice.damping == "auto" and held < HELD_OUT:
        yield Fault(
            f"slice.damping: auto holds out every eighth sequence, and slice.repair: {params.slice.repair} "
            f"has {held}; use at least {HELD_OUT}, or write a number such as 0.001",
            ("slice", "damping"),
        )


def _shape(params: Params) -> Iterator[Fault]:
    """Plans whose layers must differ in width, where one width is asked for."""
    allocate = params.allocate
    if allocate.shape != "uniform":
        return
    method = METHODS[allocate.method]
    if not method.alike and not method.improves:  # a search plans in one width if it is asked to
        yield Fault(
            f"allocate.shape: uniform asks for one width in all layers, and allocate.method: {allocate.method} decides "
            "each layer's own; choose allocate.method: uniform, or allocate.shape: auto",
            ("allocate", "shape"),
        )
    if allocate.ordered and params.depth.of == "parts":
        yield Fault(
            "allocate.shape: uniform asks for one width in all layers, and depth.of: parts takes attentions and MLPs "
            "out of single layers; set depth.of to layers, or allocate.shape to auto",
            ("depth", "of"),
        )
    frozen = [key for key in ("freeze_first", "freeze_last") if getattr(allocate, key)]
    if frozen:
        yield Fault(
            f"allocate.{frozen[0]} keeps layers wider than the others, and allocate.shape: uniform asks for one width; "
            f"set allocate.{frozen[0]} to 0, or allocate.shape to auto",
            ("allocate", frozen[0]),
        )


def _packages(params: Params) -> Iterator[Fault]:
    """Packages that a setting needs and that are not installed."""
    recover = params.recover
    needs = {
        ("recover", "method"): (recover.method == "lora", "lora", "peft", "'libprune[lora]'"),
        ("recover", "optimizer"): (
            recover.method != "none" and recover.optimizer == "adamw_bnb_8bit",
            recover.optimizer,
            "bitsandbytes",
            "bitsandbytes",
        ),
        ("evaluate", "tasks"): (bool(params.evaluate.tasks), "tasks", "lm_eval", "'libprune[tasks]'"),
    }
    for (section, key), (asked, value, package, install) in needs.items():
        if asked and find_spec(package) is None:
            said = f"{section}.{key}" if value == key else f"{section}.{key}: {value}"
            yield Fault(f"{said} needs the package {package}: pip install {install}", (section, key))
    for kind in dict.fromkeys(params.export.formats):
        if kind in PACKAGES:
            yield from refused(("export", "formats"), require_packages, kind)
