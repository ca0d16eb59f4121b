"""params.yaml, typed: one section a stage, validated as a whole before any stage runs.

Every stage validates the whole file, so that a typing error in a late section does not surface
after minutes of collecting.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ValidationError, model_validator
from pydantic.fields import FieldInfo

from libprune.engine.errors import ParamsError, nearest
from libprune.engine.yaml_file import read_yaml
from libprune.pipeline.methods import METHODS, REPAIRS
from libprune.pipeline.sections import (
    Ablation,
    Activations,
    Allocate,
    Compute,
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
    levels: Levels = Levels()
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
        chosen = PRESETS.get(str(data.get("preset", "balanced")), {})
        filled = dict(data)
        for section, values in chosen.items():
            if isinstance(given := filled.get(section, {}), dict):
                word = {key: _LEFT_OPEN.get(key, "auto") for key in values}
                filled[section] = given | {k: value for k, value in values.items() if given.get(k, word[k]) == word[k]}
                if given.get("producer_steps", "auto") == "auto" and filled[section].get("repair") != "sequential":
                    filled[section].pop("producer_steps", None)  # the preset's go with the preset's repair
                if given.get("evaluations", "auto") == "auto" and filled[section].get("shape") == "uniform":
                    filled[section].pop("evaluations", None)  # they change single layers
        return filled

    @model_validator(mode="after")
    def _repair_has_what_it_needs(self) -> "Params":
        allocate, repair = self.allocate, self.slice.repair
        method = METHODS[allocate.method]
        if self.slice.fisher_share and "fisher_share" not in REPAIRS[repair].params:
            raise ValueError(f"slice.fisher_share weights the Gram matrices of slice.repair: local, not {repair}")
        for key in ("drift", "drift_cap", "producer_steps"):
            owners = [name for name, record in REPAIRS.items() if key in record.params]
            if getattr(self.slice, key) != getattr(Slice(), key) and repair not in owners:
                raise ValueError(f"slice.{key} belongs to slice.repair: {' or '.join(owners)}, not {repair}")
        if allocate.evaluations and method.improves and allocate.shape == "uniform":
            raise ValueError("allocate.evaluations changes single layers; set it to 0 with allocate.shape: uniform")
        if allocate.collapse_below and not method.collapses:
            raise ValueError(f"allocate.collapse_below belongs to allocate.method: hgsp, not {allocate.method}")
        if allocate.collapse_below and not allocate.allow_layer_removal:
            raise ValueError("allocate.collapse_below removes whole layers; set allocate.allow_layer_removal: true too")
        if allocate.ratio is None and not method.finds_ratio:
            raise ValueError(
                f"allocate.ratio: null leaves the ratio to allocate.method: retention, not to {allocate.method}"
            )
        uses = {
            "slice.repair: local": repair == "local",
            f"allocate.method: {allocate.method}": "levels" in method.reads,
            **{f"score.{key}: {text}": "obs" in text for key, text in self.score.expressions.items()},
        }
        using = [what for what, used in uses.items() if used]
        if using and self.activations.storage_dtype == "bfloat16":
            raise ValueError(
                f"{using[0]} needs activations.storage_dtype: float32; "
                "Gram matrices rounded to bfloat16 are not positive definite in some layers"
            )
        return self


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate a params file.

    Raises:
        ParamsError: if the file is missing or not valid; the message names the key, its fault and the nearest key.
    """
    return validate_params(read_yaml(path), str(path))


def validate_params(data: Any, where: str) -> Params:
    """Validate the content of a params file.

    Args:
        data: a mapping of sections, as read from YAML.
        where: the place that an error names.

    Raises:
        ParamsError: if it is not valid; the message names the key, its fault and the nearest key.
    """
    try:
        return Params.model_validate(data)
    except ValidationError as error:
        raise ParamsError(f"{where}: {problems(error, _explain)}") from error


_SHOWN = 10
"""Problems of a file that are told."""


def problems(error: ValidationError, explain: Callable[[tuple[int | str, ...], str, str], str]) -> str:
    """What is wrong with a file, in one line; of many faults only the first.

    Args:
        error: of pydantic.
        explain: makes a text of the place, the type and the message of a fault.
    """
    found = error.errors(include_url=False, include_context=False, include_input=False)
    told = "; ".join(explain(e["loc"], e["type"], e["msg"]) for e in found[:_SHOWN])
    return told + (f"; and {len(found) - _SHOWN:,} more" if len(found) > _SHOWN else "")


_PLAIN = {"tuple_type": "Input should be a list"}
"""Messages in the words of YAML, by the type of the error."""


def _explain(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    place, known = _place(loc[:-1] if kind == "extra_forbidden" else loc)
    if kind == "extra_forbidden":
        place = ".".join(filter(None, (place, str(loc[-1]))))
        return f"unknown key {place!r}{nearest(str(loc[-1]), known)} (known: {', '.join(known)})"
    if kind == "model_type":
        message = f"Input should be keys with values; the keys are {', '.join(known)}"
    message = _PLAIN.get(kind, message).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def _place(loc: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """A key as users write it, and the keys that may stand below it; what says which type was tried is left out."""
    place, section = "", Params.model_fields
    for part in loc:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part in section:
            place += f".{part}"
            section = _inner(section[part].annotation)
    return place.removeprefix("."), list(section)


def _inner(annotation: Any) -> dict[str, FieldInfo]:
    """The keys of the section that a type is, or is made with."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_fields
    return next((fields for part in get_args(annotation) if (fields := _inner(part))), {})
