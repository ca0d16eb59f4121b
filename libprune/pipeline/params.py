"""params.yaml, typed: one section a stage, validated as a whole before any stage runs.

Every stage validates the whole file, so that a typing error in a late section does not surface
after minutes of collecting.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from libprune.engine.yaml_file import NO_LINES, Lines, read_lines
from libprune.pipeline.faults import conflicts, faults_of, params_error
from libprune.pipeline.methods import METHODS, REPAIRS
from libprune.pipeline.sections import (
    Ablation,
    Activations,
    Allocate,
    Compute,
    Depth,
    Evaluate,
    Export,
    Gradients,
    Hessian,
    Latency,
    Levels,
    Prepare,
    Recover,
    Score,
    Section,
    Sensitivity,
    Slice,
    Tokenize,
    Width,
)


def _preset(
    method: str, repair: str, fix: str = "none", steps: int = 0, evaluations: int = 0
) -> dict[str, dict[str, Any]]:
    threshold = 0.0 if method == "hgsp" else Allocate().threshold
    weights = {"temperature": 1.0, "threshold": threshold, "gradient_fix": fix}
    return {
        "score": {"criterion": "unit_fisher"},
        "allocate": {"method": method, "evaluations": evaluations} | weights,
        "slice": {"repair": repair, "producer_steps": steps},
    }


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "fast": _preset("uniform", "local"),
    "balanced": _preset("uniform", "sequential"),
    "best": _preset("search", "sequential", steps=12, evaluations=8),
    "hgsp": _preset("hgsp", "sequential"),
    "hgsp+adaptive": _preset("hgsp", "sequential", "adaptive"),
    "hgsp+all": _preset("hgsp", "sequential", "adaptive+depth"),
}
"""Values of `auto` by preset, section and key. Only stages after the collecting ones are named, so that a change of the
preset never makes those run again."""


_LEFT_OPEN = {"gradient_fix": "preset"}
"""The word that leaves a key to the preset, where that is not `auto`."""


def _limited(given: Mapping[str, Any]) -> bool:
    """Whether a section allocate, as it was read, has budgets."""
    budgets = given.get("budgets")
    return isinstance(budgets, Mapping) and any(share is not None for share in budgets.values())


class Params(Section):
    """All sections of params.yaml, validated together."""

    preset: Literal["fast", "balanced", "best", "hgsp", "hgsp+adaptive", "hgsp+all"] = "balanced"
    """Preset that fills the keys that say `auto` or are absent; a key with a value of its own keeps it."""
    prepare: Prepare
    tokenize: Tokenize
    compute: Compute = Compute()
    gradients: Gradients = Gradients()
    hessian: Hessian = Hessian()
    activations: Activations = Activations()
    ablation: Ablation = Ablation()
    score: Score = Score()
    sensitivity: Sensitivity = Sensitivity()
    depth: Depth = Depth()
    levels: Levels = Levels()
    width: Width = Width()
    latency: Latency = Latency()
    allocate: Allocate = Allocate()
    slice: Slice = Slice()
    recover: Recover = Recover()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        chosen = PRESETS.get(str(data.get("preset")), PRESETS["balanced"])  # one that is misspelled is one fault
        filled = dict(data)
        for section, values in chosen.items():
            if isinstance(given := filled.get(section, {}), dict):
                word = {key: _LEFT_OPEN.get(key, "auto") for key in values}
                filled[section] = given | {k: value for k, value in values.items() if given.get(k, word[k]) == word[k]}
                if given.get("producer_steps", "auto") == "auto" and filled[section].get("repair") != "sequential":
                    filled[section].pop("producer_steps", None)  # the preset's go with the preset's repair
                fixed = filled[section].get("shape") == "uniform" or given.get("nested") or _limited(given)
                if given.get("evaluations", "auto") == "auto" and (fixed or given.get("width") is not None):
                    filled[section].pop("evaluations", None)  # they change single layers, under one budget
        return filled

    @model_validator(mode="after")
    def _parts_go_together(self) -> "Params":
        conflicts(self._conflicts())
        return self

    def _conflicts(self) -> Iterator[str]:
        allocate, repair = self.allocate, self.slice.repair
        method = METHODS[allocate.method]
        if self.slice.fisher_share and "fisher_share" not in REPAIRS[repair].params:
            yield f"slice.fisher_share weights the Gram matrices of slice.repair: local, not {repair}"
        for key in ("drift", "drift_cap", "producer_steps", "block_epochs", "block_rate", "block_ahead"):
            owners = [name for name, record in REPAIRS.items() if key in record.params]
            if getattr(self.slice, key) != getattr(Slice(), key) and repair not in owners:
                yield f"slice.{key} belongs to slice.repair: {' or '.join(owners)}, not {repair}"
        if allocate.evaluations and method.improves and allocate.shape == "uniform":
            yield "allocate.evaluations changes single layers; set it to 0 with allocate.shape: uniform"
        if allocate.width is not None and repair == "bias":
            yield "allocate.width leaves no input without which a bias could stand; choose slice.repair: local"
        if allocate.width is not None and allocate.evaluations and method.improves:
            yield "allocate.evaluations measures plans that keep the whole width; set it to 0 with allocate.width"
        if allocate.width == "auto" and "levels" not in method.reads:
            yield f"allocate.width: auto is chosen by allocate.method: search, not by {allocate.method}; name a number"
        if allocate.width is not None and allocate.budgets.latency is not None:
            yield "allocate.budgets.latency times layers of the whole width; leave it out with allocate.width"
        if allocate.width is not None and allocate.objective == "latency":
            yield "allocate.objective: latency times layers of the whole width; choose another one with allocate.width"
        if allocate.width is not None and self.recover.method != "none" and self.recover.hidden_states:
            yield "recover.hidden_states compares states of the whole width; set it to 0 with allocate.width"
        if allocate.collapse_below and not method.collapses:
            yield f"allocate.collapse_below belongs to allocate.method: hgsp, not {allocate.method}"
        if allocate.collapse_below and not allocate.may_empty:
            yield f"allocate.collapse_below needs allocate.depth: units, not {allocate.depth}"
        if allocate.layers is not None and not allocate.ordered:
            yield f"allocate.layers counts removals of allocate.depth: joint or cosine, not {allocate.depth}"
        if allocate.depth == "cosine" and self.depth.of == "parts":
            yield "allocate.depth: cosine puts whole layers into order; set depth.of: layers"
        if allocate.layers is not None and self.depth.removals is not None and allocate.layers > self.depth.removals:
            yield (
                f"allocate.layers: {allocate.layers} is more than depth.removals: {self.depth.removals}; raise the "
                "latter, or write null"
            )
        if allocate.ratio is None and not method.finds_ratio and not allocate.budgets.asked:
            yield (
                f"allocate.ratio: null leaves the ratio to allocate.method: retention, not to {allocate.method}; or to "
                "allocate.budgets, for allocate.method: search"
            )
        ways = {
            f"compute.offload: {self.compute.offload}": self.compute.offload in {"cpu", "disk"},
            "compute.gradient_checkpointing: true": self.compute.gradient_checkpointing,
        }
        for way in [way for way, used in ways.items() if used and self.hessian.estimator == "hutchinson"]:
            yield f"hessian.estimator: hutchinson cannot be used with {way}; choose fisher, or switch it off"
        yield from self._of_budgets()
        yield from self._of_nesting()
        uses = {
            f"slice.repair: {repair}": repair in {"local", "block"},  # which begins with the local one
            f"allocate.method: {allocate.method}": "levels" in method.reads,
            **{f"score.{key}: {text}": "obs" in text for key, text in self.score.expressions.items()},
        }
        using = [what for what, used in uses.items() if used]
        if using and self.activations.storage_dtype == "bfloat16":
            yield (
                f"{using[0]} needs activations.storage_dtype: float32; "
                "Gram matrices rounded to bfloat16 are not positive definite in some layers"
            )

    def _of_budgets(self) -> Iterator[str]:
        allocate = self.allocate
        if not allocate.budgets.asked:
            if any(bits is not None for bits in allocate.bits.model_dump().values()):
                yield "allocate.bits counts for allocate.budgets.bytes, which is not set"
            return
        if allocate.ratio is not None:
            yield f"allocate.budgets says how much stays, and allocate.ratio: {allocate.ratio} too; set ratio to null"
        if not METHODS[allocate.method].programme:
            methods = " or ".join(name for name, record in METHODS.items() if record.programme)
            yield f"allocate.budgets belongs to allocate.method: {methods}, not {allocate.method}"
        for key in ("objective", "ratio_of"):
            if (value := getattr(allocate, key)) != getattr(Allocate(), key):
                yield f"allocate.{key}: {value} says what a ratio is a share of; leave it out with allocate.budgets"
        if allocate.evaluations:
            yield "allocate.evaluations moves a single budget between layers; set it to 0 with allocate.budgets"
        if allocate.budgets.bytes is not None and None in allocate.bits.model_dump().values():
            yield (
                "allocate.budgets.bytes needs the bits of a weight where the model is served; set allocate.bits, such "
                "as {layers: 4.5, outside: 16}"
            )
        if allocate.budgets.bytes is None and any(bits is not None for bits in allocate.bits.model_dump().values()):
            yield "allocate.bits counts for allocate.budgets.bytes, which is not set"

    def _of_nesting(self) -> Iterator[str]:
        allocate = self.allocate
        if not allocate.nested:
            return
        if allocate.budgets.asked:
            yield "allocate.nested names smaller ratios, and allocate.budgets has none; leave out one of them"
        if allocate.ratio is not None and any(ratio >= allocate.ratio for ratio in allocate.nested):
            yield f"allocate.nested: {list(allocate.nested)} are not all smaller than allocate.ratio: {allocate.ratio}"
        if allocate.ordered and allocate.layers is None and not METHODS[allocate.method].programme:
            yield (
                "allocate.nested needs the same whole removals at each ratio; set allocate.layers with allocate.depth: "
                f"{allocate.depth}"
            )
        if allocate.collapse_below:
            yield "allocate.collapse_below takes other layers at each ratio; set it to 0 with allocate.nested"
        if allocate.evaluations and METHODS[allocate.method].improves:
            yield "allocate.evaluations changes plans that are to contain each other; set it to 0 with allocate.nested"


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate a params file.

    Raises:
        ParamsError: if the file is missing or not valid; it names every fault with its line and the nearest key.
    """
    return read_params(path)[0]


def read_params(path: Path) -> tuple[Params, Lines]:
    """Read and validate a params file; with the params come the lines of the file, for what is to be told of it.

    Raises:
        ParamsError: as `load_params`.
    """
    data, lines = read_lines(path)
    return validate_params(data, str(path), lines), lines


def validate_params(data: Any, where: str, lines: Lines = NO_LINES) -> Params:
    """Validate the content of a params file.

    Args:
        data: a mapping of sections, as read from YAML.
        where: the place that an error names.
        lines: of the file, if there is one.

    Raises:
        ParamsError: if it is not valid; it names every fault, and the nearest key.
    """
    try:
        return Params.model_validate(data)
    except ValidationError as error:
        raise params_error(where, faults_of(error, Params), lines) from error
