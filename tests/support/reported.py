"""The artifacts that a report is made from, of a tiny model with made-up figures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from libprune.engine.describe import describe
from libprune.engine.tables import unit_index
from libprune.models.sequences import Sequences
from libprune.models.tokens import write_tokens
from libprune.pipeline.artifacts import write_nothing, write_table
from libprune.pipeline.atomic import write_json
from libprune.pipeline.layout import Layout
from libprune.statistics.depth import empty_table
from tests.support.evaluated import EVALUATION, trained
from tests.support.models import FAMILIES
from tests.support.tables import gradient_rows, sensitivity_rows


def write_artifacts(root: Path, measured: int, recovered: bool = False) -> Layout:
    """What the report reads, of a tiny model whose sensitivity is measured for some layers.

    Args:
        root: the folder of the artifacts, which is made.
        measured: number of layers whose sensitivity is known.
        recovered: whether the model was trained.
    """
    layout = Layout(root)
    architecture = replace(describe(FAMILIES["llama"](0)), fingerprint="cafe")
    root.mkdir()
    layout.architecture.write_text(architecture.to_json())
    write_json(layout.origin, {"model": "cafe", "name": "a <i>name</i>", "license": None, "base_model": None})
    write_table(layout.weights, unit_index(architecture), {"model": "cafe", "source": "a <b>model</b>"})
    origin = {"model": "cafe", "source": "a text", "documents": 3, "seed": 0}
    text = write_tokens(layout.calibration_tokens, Sequences(torch.zeros((2, 4), dtype=torch.long)), origin)
    made = {"model": "cafe", "tokens": text}
    read = made | {"sequences": 2, "length": 4}
    write_table(layout.gradients / "layers.parquet", gradient_rows(architecture.layers), read)
    write_table(layout.activations / "units.parquet", unit_index(architecture), read)
    write_nothing(layout.hessian, {"hessian.estimator": "none"})
    for path in (layout.ablation, layout.levels, layout.widths):
        write_table(path, empty_table(), {"model": "cafe"})
    rows = unit_index(architecture)
    scores = np.random.default_rng(0).normal(size=len(rows["layer_idx"]))
    plan = EVALUATION["plan"] | {"model": "cafe"}
    write_table(layout.plan, rows | {"score": scores, "keep": scores > -1}, plan)
    write_json(layout.export, {"files": []})
    result = trained() if recovered else EVALUATION
    write_json(layout.evaluation, result | {"plan": plan, "pruning": result["pruning"] | {"tokens": text}})
    write_table(
        layout.sensitivity, sensitivity_rows(measured), made | ({"sequences": 1, "length": 4} if measured else {})
    )
    write_table(layout.depth, empty_table(), {"model": "cafe"})
    return layout
