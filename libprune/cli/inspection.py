"""Inspecting a model before any stage has run: its parts, the files that stages will write, its uniform shapes.

No weight is read: the model is built on the meta device from its config.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from libprune.allocation.allocate import descend, settle
from libprune.allocation.decide import result_shape
from libprune.allocation.ladders import Ladders, build_ladders
from libprune.allocation.widths import tensor_parallel_sizes
from libprune.cli.footprint import Footprint, dtype_name, footprints
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe, without_weights
from libprune.engine.errors import BudgetError
from libprune.engine.family import family_of
from libprune.engine.plan import Plan
from libprune.models.source import dense_dtype, load_dense_config
from libprune.pipeline.params import Params, load_params
from libprune.pipeline.sections import Allocate

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
        tensor_parallel: numbers of devices that it can be divided over.
        refused: why there is no such shape; the figures are then those of the dense model.
    """

    ratio: float
    kept: dict[str, int]
    loads: str
    decoder: int
    total: int
    removed: float
    weights: int
    cache: int
    tensor_parallel: Sequence[int]
    refused: str = ""


@dataclass(frozen=True)
class Inspection:
    """Facts on a model that need no weight.

    Attributes:
        model: the source of the model, as given.
        model_class: its class in transformers.
        dtype: storage type of the dense model.
        architecture: the description of the dense model.
        shapes: the dense model, then a uniform shape for each of the `RATIOS`.
        stages: the files that each stage will write.
    """

    model: str
    model_class: str
    dtype: str
    architecture: Architecture
    shapes: Sequence[Shape]
    stages: Sequence[Footprint]


def inspect_model(params: Params) -> Inspection:
    """Inspect the model of the prepare section; what the stages write follows from the other sections.

    Raises:
        SourceError: if the model cannot be found, or is quantized.
        FamilyError: if it is not wholly described by a family file.
    """
    config = load_dense_config(params.prepare)
    family_of(config.model_type)
    model = without_weights(config, params.prepare.trust_remote_code)
    architecture, stored = describe(model, accept=params.prepare.accept_config), dense_dtype(params.prepare, config)
    smaller = stored if params.slice.dtype == "auto" else getattr(torch, params.slice.dtype)
    dense = _shape(architecture, Plan.dense(architecture), 0.0, "uniform", stored)
    shapes = [dense, *uniform_shapes(architecture, params.allocate, smaller)]
    return Inspection(
        model=params.prepare.model,
        model_class=type(model).__name__,
        dtype=dtype_name(stored),
        architecture=architecture,
        shapes=shapes,
        stages=footprints(architecture, params, stored),
    )


def params_for(model: str, revision: str | None, trust_remote_code: bool, file: Path | None) -> Params:
    """The params of a file, or the defaults, with another model.

    Args:
        model: as in `prepare.model`.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: run Python code that comes with the model.
        file: the params file; None for params.yaml if it exists, else the defaults.

    Raises:
        ParamsError: if the file is missing or not valid.
    """
    source = {"model": model, "revision": revision, "trust_remote_code": trust_remote_code}
    usual = Path("params.yaml")
    if file is None and not usual.exists():
        return Params.model_validate({"prepare": source, "tokenize": {"text": "self"}})
    params = load_params(file or usual)
    return params.model_copy(update={"prepare": params.prepare.model_copy(update=source)})


def uniform_shapes(architecture: Architecture, limits: Allocate, dtype: torch.dtype) -> list[Shape]:
    """The shapes that `allocate.method: uniform` gives the model at each of the `RATIOS`.

    No shape depends on the scores, but for the division between the parts: `split: proportional` is assumed.

    Args:
        limits: floors, multiples and frozen layers.
        dtype: storage type of the pruned model.
    """
    uniform = {"method": "uniform", "ratio_of": "decoder", "objective": "parameters", "split": "proportional"}
    settings = limits.model_copy(update=uniform | {"shape": "auto", "collapse_below": 0.0})
    prices = cost.prices(architecture, "parameters")
    equal = np.zeros(sum(architecture.units(part) for _, part in architecture.blocks()))
    scores = {"score": equal, "importance": equal}
    ladders: dict[int | str, Ladders] = {}
    shapes = []
    for ratio in RATIOS:
        asked = settle(architecture, scores, settings.model_copy(update={"ratio": ratio}))
        multiple = asked.channel_multiple
        if multiple not in ladders:
            ladders[multiple] = build_ladders(architecture, scores, asked, prices)
        try:
            plan = descend(architecture, ladders[multiple], prices, asked)
            shapes.append(_shape(architecture, plan, ratio, result_shape(architecture, plan, asked), dtype))
        except BudgetError as error:
            shapes.append(_shape(architecture, Plan.dense(architecture), ratio, "uniform", dtype, str(error)))
    return shapes


def _shape(
    architecture: Architecture, plan: Plan, ratio: float, loads: str, dtype: torch.dtype, refused: str = ""
) -> Shape:
    size = cost.size(architecture, plan)
    return Shape(
        ratio=ratio,
        kept={part: min(plan.kept(layer, part) for layer in plan.layers) for part in architecture.parts},
        loads=loads,
        decoder=size.decoder,
        total=size.total,
        removed=1 - size.decoder / architecture.decoder_parameters,
        weights=size.total * dtype.itemsize,
        cache=size.cache * dtype.itemsize,
        tensor_parallel=tensor_parallel_sizes(architecture, plan),
        refused=refused,
    )
