"""Parts of a tiny Llama's layer, ways to mask its units, and what is compared after."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

from libprune import masks
from libprune.cli.main import app
from libprune.engine.architecture import Architecture
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.engine.tables import unit_index
from libprune.masks.export import plan_masks
from libprune.masks.extraction import LanguageExtraction
from libprune.models.folder import fingerprint
from libprune.pipeline.artifacts import write_table
from tests.support.models import FAMILIES, Dense, outputs, tokens
from tests.support.predictions import assert_same

Q, K, V, O = (f"self_attn.{name}_proj" for name in "qkvo")  # noqa: E741


GATE, UP, DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"


def removed(plan: Plan) -> dict[tuple[int, str], list[int]]:
    return {block: np.flatnonzero(~keep).tolist() for block, keep in plan.keep.items() if not keep.all()}


Zeros = dict[str, slice | int | list[int]]
"""Rows of a map, or columns of a consumer, that are zeroed; with `.bias` behind the name those of the bias."""


def zero(model: PreTrainedModel, zeros: Zeros, layer: int = 2) -> None:
    for name, where in zeros.items():
        tensor = model.model.layers[layer].get_parameter(name if name.endswith(".bias") else f"{name}.weight").data
        if name in (O, DOWN):
            tensor[:, where] = 0
        else:
            tensor[where] = 0


def unstructured(model: PreTrainedModel) -> None:
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            prune.random_unstructured(module, "weight", amount=0.25)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return outputs(model, tokens())


def assert_outputs_stay(found: LanguageExtraction, model: PreTrainedModel) -> None:
    assert_same(logits(found.smaller()), logits(model))


WAYS = ("columns", "rows", "rows and biases", "some columns", "some rows", "not")


WHOLLY = ("columns", "rows", "rows and biases")


def cut(model: nn.Module, architecture: Architecture, plan: Plan, way: str) -> None:
    """Zero something of the units that a plan removes: of the consumers' columns, or of the producers' rows."""
    consumers = [consumer for block in architecture.blocks() for consumer in architecture.consumers(*block)]
    weights, biases = ({getattr(consumer, kind) for consumer in consumers} for kind in ("weight", "bias"))
    for name, mask in plan_masks(architecture, plan):
        column = name in weights
        if name in biases or column != way.endswith("columns") or (mask.ndim == 1 and way != "rows and biases"):
            continue
        if way.startswith("some"):
            mask |= torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        model.get_parameter(name).data *= mask


def under_plan(found: LanguageExtraction, family: str) -> Tensor:
    """Logits of the dense shape with the folded weights under the plan, which slicing equals."""
    model = FAMILIES[family](0)
    model.load_state_dict(found.weights, strict=False)
    with masked(model, found.architecture, found.plan):
        return logits(model)


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["masks", *map(str, words)])


def plan_file(dense: Dense, plan: Plan, folder: Path) -> Path:
    path = folder / "plan.parquet"
    keep = torch.cat([torch.from_numpy(keep) for keep in plan.keep.values()]).numpy()
    write_table(path, unit_index(dense.architecture) | {"keep": keep}, {"model": fingerprint(dense.folder)})
    return path


def remasked(dense: Dense, plan: Plan) -> PreTrainedModel:
    model = FAMILIES["mistral"](0)
    masks.apply(model, plan)
    return model
