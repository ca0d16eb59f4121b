"""Inspecting a model before any stage has run: its parts, the files that stages will write, its uniform shapes.

No weight is read: the model is built on the meta device from its config.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from libprune.allocation.allocate import descend, settle
from libprune.allocation.decide import result_shape
from libprune.allocation.ladders import build_ladders
from libprune.allocation.widths import tensor_parallel_sizes
from libprune.cli.footprint import Footprint, dtype_name, footprints
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe, require_shared, without_weights
from libprune.engine.errors import BudgetError, LibpruneError
from libprune.engine.family import family_of
from libprune.engine.plan import Plan
from libprune.engine.tables import Columns
from libprune.models.families import use_families
from libprune.models.source import dense_dtype, load_dense_config, stored_format
from libprune.pipeline.artifacts import read_architecture, read_json, read_scores, require
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import Params, load_params
from libprune.pipeline.sections import Allocate, Prepare
from libprune.scoring.criteria import find_criterion
from libprune.scoring.expression import named_criteria

RATIOS = (0.1, 0.2, 0.3, 0.5)
"""Shares of the decoder's parameters that the shown uniform shapes remove."""


@dataclass(frozen=True)
class Shape:
    """A model of one width in every layer.

    Attributes:
        ratio: the share of the decoder's parameters that was asked for; 0 for the dense model.
        kept: units that each layer keeps, by part; frozen layers keep all.
        loads: `uniform` if a stock config can express it, else `per_layer`, which needs a modeling file.
        decoder: parameters in the layers.
        total: all parameters.
        removed: the removed share of the decoder's parameters.
        weights: bytes of the weights.
        cache: bytes of the KV cache a token.
        state: bytes of the states a sequence, in float32, in which recurrent ones are kept; 0 where there are none.
        tensor_parallel: numbers of devices that it can be divided over.
        refused: why there is no such shape; the figures are then those of the dense model.
        spared: the part that loses as little as it can, where the scores will decide; empty where nothing is open.
        groups: groups that each layer keeps, by part, where the units are query heads.
    """

    ratio: float
    kept: dict[str, int]
    loads: str
    decoder: int
    total: int
    removed: float
    weights: int
    cache: int
    state: int
    tensor_parallel: Sequence[int]
    refused: str = ""
    spared: str = ""
    groups: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """Facts on a model that need no weight.

    Attributes:
        model: the source of the model, as given.
        model_class: its class in transformers.
        dtype: storage type of the dense model.
        stored: the format of its files that it is dequantised from; empty where it is stored in that type.
        architecture: the description of the dense model.
        shapes: the dense model, then the uniform shapes at the asked ratio and at each of the `RATIOS`.
        division: how the budget of these shapes is divided between the parts, in words.
        stages: the files that each stage will write.
        vocabulary: the text whose tokens stay, which is not read here: all figures are with all tokens. Empty where all
            tokens stay.
    """

    model: str
    model_class: str
    dtype: str
    stored: str
    architecture: Architecture
    shapes: Sequence[Shape]
    division: str
    stages: Sequence[Footprint]
    vocabulary: str = ""


def inspect_model(params: Params, layout: Layout | None = None) -> Inspection:
    """Inspect the model of the prepare section; what the stages write follows from the other sections.

    Args:
        params: the params of the run.
        layout: artifacts of an earlier run, whose scores are used where they fit; None for the usual folder.

    Raises:
        SourceError: if the model cannot be found, or is quantized.
        FamilyError: if it is not wholly described by a family file.
    """
    model, architecture, stored = _described(params.prepare)
    smaller = stored if params.slice.dtype == "auto" else getattr(torch, params.slice.dtype)
    dense = _shape(architecture, Plan.dense(architecture), 0.0, "uniform", stored)
    divisions = divisions_of(architecture, params, layout or Layout())
    shapes = [dense, *uniform_shapes(architecture, params.allocate, smaller, divisions)]
    return Inspection(
        model=params.prepare.model,
        model_class=type(model).__name__,
        dtype=dtype_name(stored),
        stored=stored_format(params.prepare),
        architecture=architecture,
        shapes=shapes,
        division=_division(divisions, params.allocate),
        stages=footprints(architecture, params, stored),
        vocabulary="" if params.prepare.vocabulary is None else params.prepare.vocabulary.text,
    )


def _division(divisions: Mapping[str, Columns] | None, allocate: Allocate) -> str:
    if divisions is None:
        how = "if the parts lose alike (allocate.split: proportional)"
    elif "" in divisions:
        how = "divided between the parts by the scores of the last run"
    else:
        how = "at the ends between which the scores will choose"
    if allocate.method == "uniform":
        return how
    return f"{how}; allocate.method: {allocate.method} gives each layer widths of its own"


def _described(section: Prepare) -> tuple[PreTrainedModel, Architecture, torch.dtype]:
    """The dense model on the meta device, its description, and its storage type."""
    use_families(section.families)
    config = load_dense_config(section)
    family_of(config.model_type, config.to_dict())
    model = without_weights(config, section.trust_remote_code)
    architecture = describe(model, accept=section.accept_config, experts=section.experts, heads=section.heads)
    require_shared(architecture)
    return model, architecture, dense_dtype(section, config)


def dense_architecture(params: Params, layout: Layout, described: bool) -> tuple[Architecture, torch.dtype]:
    """The description of the dense model, and its storage type.

    Args:
        layout: the artifacts.
        described: read the description that the prepare stage has written, which takes no model.

    Raises:
        LibpruneError: if it cannot be had.
    """
    if described:
        config = read_json(require(layout.model, "prepare") / "config.json", "prepare")
        return read_architecture(layout), getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
    _, architecture, stored = _described(params.prepare)
    return architecture, stored


def params_for(
    model: str,
    revision: str | None,
    trust_remote_code: bool,
    file: Path | None,
    experts: str | None = None,
    heads: str | None = None,
) -> Params:
    """The params of a file, or the defaults, with another model.

    Args:
        model: as in `prepare.model`.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python code that comes with the model.
        file: the params file; None for params.yaml if it exists, else the defaults.
        experts: as in `prepare.experts`; None for what the params say.
        heads: as in `prepare.heads`; None for what the params say.

    Raises:
        ParamsError: if the file is missing or not valid.
    """
    source = {"model": model, "revision": revision, "trust_remote_code": trust_remote_code}
    source |= {} if experts is None else {"experts": experts}
    source |= {} if heads is None else {"heads": heads}
    usual = Path("params.yaml")
    if file is None and not usual.exists():
        return Params.model_validate({"prepare": source, "tokenize": {"text": "self"}})
    params = load_params(file or usual)
    return params.model_copy(update={"prepare": params.prepare.model_copy(update=source)})


def uniform_shapes(
    architecture: Architecture, limits: Allocate, dtype: torch.dtype, divisions: Mapping[str, Columns] | None = None
) -> list[Shape]:
    """The shapes that `allocate.method: uniform` gives the model at the asked ratio and at each of the `RATIOS`.

    Args:
        limits: floors, multiples, frozen layers, and what the ratio is a share of; `latency`, which has to be measured,
            is taken for parameters.
        dtype: storage type of the pruned model.
        divisions: importance tables that the budget is divided between the parts by, as `divisions_of` gives them;
            None: equal shares of each part.
    """
    widths_alone = {"collapse_below": 0.0, "depth": "none", "layers": None}
    settings = limits.model_copy(update={"method": "uniform", "shape": "auto"} | widths_alone)
    if divisions is None:
        divisions, settings = {"": _table(architecture, {})}, settings.model_copy(update={"split": "proportional"})
    elif settings.split == "auto":
        settings = settings.model_copy(update={"split": "importance"})
    if settings.objective == "latency":
        settings = settings.model_copy(update={"objective": "parameters"})
    prices = cost.prices(architecture, settings.objective)
    shapes = []
    for ratio in sorted({*RATIOS, *([] if limits.ratio is None else [limits.ratio])}):
        found: dict[tuple[tuple[int, ...], ...], Shape] = {}
        for spared, table in divisions.items():
            try:
                asked = settle(architecture, table, settings.model_copy(update={"ratio": ratio}))
                plan = descend(architecture, build_ladders(architecture, table, asked, prices), prices, asked).plan
                shape = _shape(architecture, plan, ratio, result_shape(architecture, plan, asked), dtype, spared=spared)
            except BudgetError as error:
                shape = _shape(architecture, Plan.dense(architecture), ratio, "uniform", dtype, str(error))
            found.setdefault((tuple(shape.kept.values()), tuple(shape.groups.values())), shape)
        alike = len(found) == 1  # whatever the scores say
        shapes += [replace(shape, spared="") if alike else shape for shape in found.values()]
    return shapes


def divisions_of(architecture: Architecture, params: Params, layout: Layout) -> Mapping[str, Columns] | None:
    """The importance tables that decide how a uniform shape divides its budget between the parts.

    That is the table of the score stage, if the artifacts are of this model and of these params. Without it, for each
    part one in which it alone is important: the shape that will come lies between those that they give.

    Returns:
        Tables by the part that is spared, or by an empty text; None where the division does not follow from the scores.
    """
    allocate, score = params.allocate, params.score
    criteria = [find_criterion(name) for name in named_criteria(score)]
    compares = score.scaling == "none" and all(one.comparable for one in criteria)
    compares &= len({one.unit for one in criteria}) == 1
    if allocate.split == "proportional" or not (compares or allocate.worth != "none" or allocate.split == "importance"):
        return None
    if (known := _scores_of(architecture, params, layout)) is not None:
        return {"": known}
    return {part: _table(architecture, {part: 1.0}) for part in architecture.parts}


def _scores_of(architecture: Architecture, params: Params, layout: Layout) -> Columns | None:
    """The importance table of the last run; None if it is of another model, or its criterion is another."""
    try:
        scores = read_scores(layout)
    except LibpruneError:
        return None
    same = replace(scores.architecture, fingerprint="") == replace(architecture, fingerprint="")
    named = scores.meta["criterion"] == " + ".join(params.score.expressions.values())
    return scores.table if same and named and params.allocate.objective == "parameters" else None


def _table(architecture: Architecture, importance: Mapping[str, float]) -> Columns:
    """An importance table that is the same within a part, and 0 in parts without a value."""
    blocks = [np.full(architecture.units(part), importance.get(part, 0.0)) for _, part in architecture.blocks()]
    column = np.concatenate(blocks)
    return {"score": column, "importance": column}


def _shape(
    architecture: Architecture,
    plan: Plan,
    ratio: float,
    loads: str,
    dtype: torch.dtype,
    refused: str = "",
    spared: str = "",
) -> Shape:
    size = cost.size(architecture, plan)
    return Shape(
        ratio=ratio,
        kept={part: min(plan.counts(part)) for part in architecture.parts},
        loads=loads,
        decoder=size.decoder,
        total=size.total,
        removed=1 - size.decoder / architecture.decoder_parameters,
        weights=size.total * dtype.itemsize,
        cache=size.cache * dtype.itemsize,
        state=size.state * torch.float32.itemsize,
        tensor_parallel=tensor_parallel_sizes(architecture, plan),
        refused=refused,
        spared=spared,
        groups={
            part: min(int(shape.groups_left(keep).sum()) for (_, of), keep in plan.keep.items() if of == part)
            for part, shape in architecture.parts.items()
            if shape.outer
        },
    )
