"""Residual width against channels of the MLP: the same number of parameters, by perplexity, with each repair.

    python -m bench.width --root .

The folder is a project whose stages prepare, tokenize and activations have run. Channels go uniformly, those first that
give `down_proj` the least, E[x^2] |w|^2.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import typer
from torch import Tensor, nn

from libprune.collection.calibration import Calibration, set_up
from libprune.collection.stream_axes import Narrowed
from libprune.engine import cost
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked, oriented
from libprune.models.sequences import Sequences
from libprune.models.tokens import read_tokens
from libprune.narrowing.measure import collect_axes
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute
from libprune.repair.repairs import inputs_of, local_repair
from libprune.repair.sequential import SequentialRepair
from libprune.repair.streams import split_batches


def perplexity(run: Calibration, model: nn.Module, plan: Plan, text: Sequences) -> float:
    """Of a model under the mask of a plan."""
    losses = []
    with masked(model, run.architecture, plan), torch.no_grad():
        for batch in text.passes(run.at_once):
            logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            losses.append(-logits.gather(-1, batch.ids[:, 1:, None]).mean(dim=(1, 2)))
    return math.exp(float(torch.cat(losses).mean()))


def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with other weights of these names."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in weights.items():
            other.get_parameter(name).copy_(tensor)
    return other


def sequential(run: Calibration, model: nn.Module, plan: Plan, narrow: Narrowed | None) -> nn.Module:
    """A copy of a model, repaired layer by layer for a plan."""
    other = copy.deepcopy(model)
    batches = split_batches(run.sequences, run.at_once)
    repair = SequentialRepair(other, run.architecture, plan, batches, None, None, 2.0, narrow=narrow)
    for layer in range(run.architecture.layers):
        repair.step(layer)
    outside = [p.name for p in run.architecture.parameters if p.layer is None] if narrow else []
    return with_weights(other, {name: narrow[name] for name in outside} if narrow else {})


def fewer_channels(layout: Layout, run: Calibration, parameters: int) -> Plan:
    """The plan that removes about so many parameters from all MLPs alike."""
    architecture, read = run.architecture, inputs_of(layout, run.architecture, curvature=False)
    units = round(parameters / sum(cost.unit_parameters(architecture, n, "mlp") for n in range(architecture.layers)))
    plan = Plan.dense(architecture)
    for layer in range(architecture.layers):
        (consumer,) = architecture.consumers(layer, "mlp")
        weight = oriented(consumer, run.weights[consumer.weight]).float()
        worth = read(consumer).gram.diagonal() * weight.square().sum(0)
        plan = plan.without((layer, "mlp"), worth.argsort()[:units].numpy())
    return plan


def main(root: Path = Path(), widths: list[int] = [504, 432], windows: int = 16) -> None:  # noqa: B006
    """Print a table in Markdown."""
    layout = Layout(root / "artifacts")
    run = set_up(layout, Compute(dtype="float32"), None)
    text = read_tokens(layout.evaluation_tokens, run.architecture.fingerprint)[0][:windows]
    dense, total = Plan.dense(run.architecture), run.architecture.total_parameters
    print(f"dense: {perplexity(run, run.model, dense, text):.2f}, {len(run.sequences)} sequences", flush=True)
    plain = copy.deepcopy(run.model)
    axes = collect_axes(run, "auto")
    print(f"| plan ({axes.kind}) | parameters | none | local | sequential |\n|---|---|---|---|---|", flush=True)
    for width in widths:
        plan = replace(dense, width=width)
        left = cost.size(run.architecture, plan).total
        ways = [Narrowed(run.weights, run.architecture, axes, width, repair=mends) for mends in (False, True)]
        found = [perplexity(run, with_weights(run.model, way), plan, text) for way in ways]
        found.append(perplexity(run, sequential(run, run.model, plan, ways[1]), plan, text))
        _row(f"width {width}", left / total, found)
        plan = fewer_channels(layout, run, total - left)
        found = [
            perplexity(run, with_weights(plain, way), plan, text)
            for way in ({}, local_repair(layout, run.architecture)(plan))
        ]
        found.append(perplexity(run, sequential(run, plain, plan, None), plan, text))
        _row(f"{plan.kept(0, 'mlp')} channels", cost.size(run.architecture, plan).total / total, found)


def _row(name: str, share: float, found: list[float]) -> None:
    print(f"| {name} | {100 * share:.1f} % | " + " | ".join(f"{value:.1f}" for value in found) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
