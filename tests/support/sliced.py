"""The tiny model with its text and a plan, as slice finds them, for tests of what slice writes."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe
from libprune.engine.plan import Plan
from libprune.engine.tables import unit_index
from libprune.models.folder import fingerprint, load_model
from libprune.models.sequences import Sequences
from libprune.models.tokens import write_tokens
from libprune.pipeline.artifacts import read_architecture, write_architecture, write_table, write_units
from libprune.pipeline.atomic import write_json
from libprune.pipeline.layout import Layout
from libprune.pipeline.shards import write_shard
from libprune.recovery.curve import Recovery
from libprune.recovery.recover import write_recovery, write_weights
from libprune.results.record import read_record
from tests.support import tiny
from tests.support.collected import activations
from tests.support.evaluated import RECOVERY
from tests.support.models import MODELS, random_plan, tokens

DECIDED = {"criterion": "taylor", "method": "uniform"}
"""What a plan's metadata say of how it was made."""


def write_project(folder: Path) -> Layout:
    """The dense model, its description, and calibration text, in a folder's `artifacts`."""
    params = tiny.write_params(folder / "params.yaml", str(tiny.write_model(folder / "source")), "text")
    import_module("stages.prepare").main(params, folder / "artifacts")
    layout = Layout(folder / "artifacts")
    architecture = read_architecture(layout)
    write_tokens(layout.calibration_tokens, random_windows(architecture, 2, 16), {"model": architecture.fingerprint})
    return layout


def random_windows(architecture: Architecture, number: int, length: int) -> Sequences:
    """Windows of random tokens, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return Sequences(torch.randint(architecture.sizes["vocab"], (number, length), generator=generator))


def write_plan(path: Path, architecture: Architecture, plan: Plan, shape: str) -> None:
    """A plan as `plan.parquet`, with the metadata that slice reads."""
    keep = np.concatenate(list(plan.keep.values()))
    meta = {"model": architecture.fingerprint, "shape": shape, **DECIDED}
    meta |= {} if plan.width is None else {"width": plan.width}
    write_table(path, unit_index(architecture) | {"keep": keep}, meta)


def write_collected(
    root: Path, name: str, kind: str, finish: Callable[[Path], None] = lambda folder: None
) -> tuple[Layout, Plan]:
    """The artifacts that the slice stage reads, of a tiny model and a random plan.

    `finish` adds to the dense model's folder before its digest is taken.
    """
    layout, model, ids = Layout(root), MODELS[name](0), tokens(17, 32)
    model.save_pretrained(layout.model, save_original_format=False)
    finish(layout.model)
    origin = fingerprint(layout.model)
    architecture = describe(model, fingerprint=origin)
    plan = random_plan(architecture, kind)
    write_architecture(layout, architecture)
    text = write_tokens(layout.calibration_tokens, Sequences(ids), {"model": origin})
    write_tokens(layout.repair_tokens, Sequences(ids), {"model": origin, "calibration": text})
    layout.activations.mkdir()
    sums = activations(model, 4, ids)
    for layer in range(architecture.layers):
        write_shard(layout.activations, layer, sums.finish(layer), {"model": origin, "tokens": text})
    write_json(layout.origin, {"name": "tiny", "license": None, "base_model": None, "model": origin})
    meta = {
        "model": origin,
        "tokens": text,
        "shape": "per_layer" if kind in {"holes", "per_layer"} else "uniform",
        **DECIDED,
    }
    write_units(layout.plan, architecture, lambda *block: {"keep": plan.keep[block]}, meta)
    return layout, plan


def write_trained(pruned: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A folder as recover writes it, of a training that multiplied all weights by 1.1, and its weights."""
    record = read_record(pruned)
    model = load_model(pruned, torch.float32, trust_remote_code=record.remote)
    weights = {name: 1.1 * parameter.detach() for name, parameter in model.named_parameters()}
    made = {name: value for name, value in RECOVERY.items() if name not in {"held_out_before", "held_out_after"}}
    folder.mkdir()
    write_weights(folder, record, weights)
    write_recovery(folder, record, Recovery(**made), {"logit_difference": 0.0, "logit_scale": 1.0})
    return weights
