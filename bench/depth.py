"""Which layers go: the joint order against single losses and cosines, and whether rescaling the stream helps.

    python -m bench.depth --text wiki.valid.raw --work /tmp/depth

The first half of the text calibrates, its second half judges. Layers are taken out as a mask; the tests prove that
slicing equals that. Rows go to WORK/depth.jsonl; those that are there are not measured again.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml

from bench.least_loss import _run
from bench.rows import add_row, read_rows
from libprune.collection.calibration import set_up
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked, oriented
from libprune.models.compute import resolve_device, resolve_dtype
from libprune.models.folder import WeightFiles, load_model
from libprune.models.layers import layers_of, replaced
from libprune.models.sequences import Sequences
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.methods import REPAIRS
from libprune.pipeline.sections import Compute, Slice
from libprune.pipeline.shards import GRAM, read_meta, read_tensor
from libprune.repair.least_squares import new_parameters
from libprune.repair.repairs import local_repair
from libprune.repair.rescale import SEQUENCES, Rescaling, behind_gaps, factors_behind
from libprune.report.markdown import markdown_table
from libprune.results.perplexity import estimate_perplexity, estimate_ratio
from libprune.statistics.depth import Joint, plan_without, read_change, removals
from libprune.statistics.divergence import Divergence
from libprune.statistics.losses import Prefix, first_changed
from libprune.statistics.sensitivity import LAYER

MOST, WHOLE, FEWER = 10, 3, 8
"""Layers that go at most, steps that measure all that are left, and how many the later steps measure."""
SHOWN = (1, 2, 4, 6, 8, 10)
"""Numbers of layers that the orders are compared at."""


def collect(work: Path, text: str) -> None:
    """Run the stages that have not run yet."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["tokenize"] |= {"text": text, "calibration_sequences": 136, "calibration_length": 128}
    params["tokenize"] |= {"evaluation_share": 0.5, "evaluation_length": 512, "evaluation_windows": 6}
    params["activations"] |= {"sequences": 16}
    work.mkdir(parents=True, exist_ok=True)
    path = work / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    for stage in ("prepare", "tokenize", "activations"):
        _run(stage, path, work / "artifacts", work / f"{stage}.done")


def measure_order(layout: Layout, path: Path, sequences: int) -> list[dict[str, Any]]:
    """For each step what is removed, and the divergence without each layer that was left.

    It is what the stage depth does, which keeps only what the order needs.
    """
    architecture = read_architecture(layout)
    steps: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    device = resolve_device("auto")
    model = load_model(layout.model, resolve_dtype("auto", device)).to(device)
    found = read_tokens(layout.calibration_tokens, architecture.fingerprint)[0][-sequences:].to(model.device)
    divergence = Divergence(model)
    dense = Prefix(model, architecture, found, sequences, [], divergence)
    joint = Joint(architecture, removals(architecture, "layers"))
    while len(joint.gone) < MOST:
        joint.most = FEWER if len(joint.gone) >= WHOLE else None
        measured = joint.next()
        if len(steps) == len(joint.gone):
            start = time.perf_counter()
            with masked(model, architecture, plan_without(architecture, joint.gone)):
                layers = [layer for layer, _ in measured]
                prefix = Prefix(model, architecture, found, sequences, layers, divergence)
                rows = [prefix.losses_of(plan_without(architecture, [one])).tolist() for one in measured]
            steps.append({"layers": layers, "rows": rows, "seconds": time.perf_counter() - start})
            path.write_text(json.dumps(steps))
            print(f"step {len(steps)}: {steps[-1]['seconds']:.0f} s", flush=True)
        joint.take(measured, np.array(steps[len(joint.gone)]["rows"]))
    assert (dense.losses == 0).all()
    return steps


def orders(layout: Layout, steps: Sequence[Mapping[str, Any]], layers: int) -> dict[str, list[int]]:
    """The layers in the order in which they go, by what decides."""
    means = [np.mean(step["rows"], axis=1) for step in steps]
    origin = read_meta(layout.activations, "activations")
    change = read_change(layout, layers, {"model": origin["model"], "tokens": origin["tokens"]})
    return {
        "joint": [step["layers"][int(mean.argmin())] for step, mean in zip(steps, means, strict=True)],
        "single": np.argsort(means[0], kind="stable")[:MOST].tolist(),
        "cosine": np.argsort(change, kind="stable")[:MOST].tolist(),
    }


class Judge:
    """Perplexity and divergence of the windows under plans and other weights."""

    def __init__(self, layout: Layout, windows: int) -> None:
        self.architecture = read_architecture(layout)
        device = resolve_device("auto")
        self.model = load_model(layout.model, resolve_dtype("auto", device)).to(device)
        found, _ = read_tokens(layout.evaluation_tokens, self.architecture.fingerprint)
        self.windows = found[torch.linspace(0, len(found) - 1, min(windows, len(found))).round().long()]
        self._dense: dict[int, torch.Tensor] = {}
        self._prefix = Prefix(
            self.model, self.architecture, self.windows, 2, range(self.architecture.layers), self._both
        )
        self.dense = self._prefix.losses[:, 0].numpy()

    def _both(self, number: int, batch: Sequences) -> torch.Tensor:
        """Mean-token loss and divergence of each window, ``[batch, 2]``."""
        found = self.model(input_ids=batch.ids, use_cache=False).logits.float().log_softmax(-1)
        dense = self._dense.setdefault(number, found.to(torch.bfloat16)).float()
        loss = -found[:, :-1].gather(-1, batch.ids[:, 1:, None])[..., 0].mean(-1)
        return torch.stack([loss, (dense.exp() * (dense - found)).sum(-1).mean(-1)], -1)

    def __call__(self, plan: Plan, weights: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
        """What a plan does, with other values of some weights."""
        with replaced(self.model, weights or {}), masked(self.model, self.architecture, plan):
            first = 0 if weights else first_changed(plan) or 0
            losses, divergence = self._prefix.losses_from(first).numpy().T
        change = estimate_ratio(self.dense, losses)
        return {
            "perplexity": estimate_perplexity(losses).value,
            "ratio": change.value,
            "ratio_se": change.error,
            "divergence": float(divergence.mean()),
            "divergence_se": float(divergence.std(ddof=1) / len(divergence) ** 0.5),
        }


def stream_norms(model, architecture: Architecture, ids: torch.Tensor) -> torch.Tensor:
    """Mean norm over tokens of the residual stream in front of each layer, ``[layers]``; first tokens left out."""
    norms: list[float] = []

    def keep(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        norms.append(float(x.float().norm(dim=-1)[:, 1:].mean()))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers_of(model, architecture)]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.tensor(norms)


def compensated(
    model, architecture: Architecture, plan: Plan, ids: torch.Tensor, gaps: bool
) -> dict[str, torch.Tensor]:
    """Writers of the stream behind what is gone, divided by how much larger the dense stream is there.

    Scaling the stream from a layer on by alpha is the same as scaling all that is written behind it by 1 / alpha, up to
    the epsilon of the norms: every reader and the final norm divide by the size of the stream.

    Args:
        gaps: measure alpha behind gaps alone and carry it on, as Prune&Comp does; else in front of every layer.
    """
    dense = stream_norms(model, architecture, ids)
    new: dict[str, torch.Tensor] = {}
    scale, taken = 1.0, False
    for layer in range(architecture.layers):
        if layer not in plan.layers:
            taken = True
            continue
        if taken:
            with replaced(model, new), masked(model, architecture, plan):
                ratio = float(stream_norms(model, architecture, ids)[layer] / dense[layer])
            if not gaps:
                scale = ratio
            elif layer - 1 not in plan.layers:
                scale *= ratio / scale
        if scale != 1.0:
            for entry in architecture.maps:
                if entry.layer == layer and entry.output.names == {"model"}:
                    new[entry.weight] = model.get_parameter(entry.weight).detach() * scale
    return new


def narrower(layout: Layout, plan: Plan, share: float) -> Plan:
    """The plan that also removes the same number of channels from every layer left, to a share of the decoder.

    Those go whose outputs have the least mean square.
    """
    architecture, weights, keep = read_architecture(layout), WeightFiles(layout.model), dict(plan.keep)
    dense = cost.size(architecture, Plan.dense(architecture)).decoder
    one = plan.without((plan.layers[0], "mlp"), 0)
    each = len(plan.layers) * (cost.size(architecture, plan).decoder - cost.size(architecture, one).decoder)
    number = round((cost.size(architecture, plan).decoder - (1 - share) * dense) / each)
    for layer in plan.layers:
        (consumer,) = architecture.consumers(layer, "mlp")
        gram = read_tensor(layout.activations, layer, f"{consumer.module}{GRAM}", "activations").diagonal().float()
        score = gram * oriented(consumer, weights[consumer.weight].float()).square().sum(0)
        keep[layer, "mlp"] = keep[layer, "mlp"].copy()
        keep[layer, "mlp"][score.argsort()[:number].numpy()] = False
    return Plan(keep)


def beside_local(judge: Judge, layout: Layout, base: Plan, plan: Plan) -> None:
    """Print what rescaling does to a plan of whole layers and channels, by the lengths that it is measured on."""
    architecture, weights = judge.architecture, {n: p.detach().clone() for n, p in judge.model.named_parameters()}
    run, places = set_up(layout, Compute(), SEQUENCES), behind_gaps(architecture, plan)
    fitted = {n: t.to(weights[n]) for n, t in local_repair(layout, architecture)(plan).items()}
    found = {"no": {}, "dense": factors_behind(run, plan, places), "layers": factors_behind(run, base, places)}
    for name, factors in found.items():
        by = Rescaling(factors).by_name(architecture)
        for repair, new in (("none", {}), ("local", fitted)):
            scaled = {n: by[n] * new.get(n, weights[n]) for n in by if n in weights}
            print(name, repair, {f"{by:.3f}" for by in factors.values()}, judge(plan, new | scaled), flush=True)


def main(
    work: Path = Path("/tmp/depth"),
    text: Path | None = None,
    windows: int = 4,
    selecting: Annotated[int, typer.Option(help="Sequences that the orders are measured on.")] = 4,
    removed: Annotated[list[int], typer.Option(help="Layers out, for the rescaling.")] = [6],  # noqa: B006
    sequences: int = 32,
    narrow: Annotated[bool, typer.Option(help="Rescale four layers out and 35 % in all, beside local.")] = False,
) -> None:
    """Measure orders, then the rescaling."""
    if text is not None:
        collect(work, str(text.resolve()))
    layout, path = Layout(work / "artifacts"), work / "depth.jsonl"
    rows = read_rows(path)
    known = {row["name"]: row for row in rows}
    judge = Judge(layout, windows)
    architecture = judge.architecture

    def measured(name: str, found: Any) -> dict[str, Any]:
        if name not in known:
            start = time.perf_counter()
            known[name] = found() | {"name": name, "seconds": time.perf_counter() - start}
            add_row(path, known[name])
            print(known[name], flush=True)
        return known[name]

    steps = measure_order(layout, work / "order.json", selecting)
    found = orders(layout, steps, architecture.layers)
    for name, order in found.items():
        print(name, order)
    body = []
    for number in SHOWN:
        cells = []
        for order in found.values():
            gone = sorted(order[:number])
            plan = plan_without(architecture, [(layer, LAYER) for layer in gone])
            row = measured(f"without {gone}", lambda plan=plan: judge(plan))
            cells.append(f"{row['divergence']:.3f}, × {row['ratio']:.2f} ± {row['ratio_se']:.2f}")
        body.append((str(number), *cells))
    print(markdown_table(body, ("layers", *found)))

    if narrow:
        base = plan_without(architecture, [(layer, LAYER) for layer in found["joint"][:4]])
        beside_local(judge, layout, base, base)
        beside_local(judge, layout, base, narrower(layout, base, 0.35))
        return
    ids = read_tokens(layout.calibration_tokens, architecture.fingerprint)[0].ids[-4:].to(judge.model.device)
    body = []
    for number in removed:
        plan = plan_without(architecture, [(layer, LAYER) for layer in found["joint"][:number]])
        gone = sorted(found["joint"][:number])
        made = [measured(f"without {gone}", lambda plan=plan: judge(plan))]
        for gaps in (True, False):
            way = "gaps" if gaps else "layers"
            weights = lambda plan=plan, gaps=gaps: compensated(judge.model, architecture, plan, ids, gaps)  # noqa: E731
            made.append(measured(f"{way} without {gone}", lambda plan=plan, w=weights: judge(plan, w())))
        section = Slice(repair="sequential", sequences=sequences)
        repaired: dict[str, torch.Tensor] = {}
        if f"sequential without {gone}" not in known or f"sequential, gaps without {gone}" not in known:
            fits = REPAIRS["sequential"].repair(layout, architecture, plan, Compute(), section)
            repaired = dict(new_parameters(fits))
        made.append(measured(f"sequential without {gone}", lambda plan=plan, w=repaired: judge(plan, w)))

        def after(plan: Plan = plan, w: dict[str, torch.Tensor] = repaired) -> dict[str, Any]:
            with replaced(judge.model, w):
                scaled = compensated(judge.model, architecture, plan, ids, True)
            return judge(plan, w | scaled)

        made.append(measured(f"sequential, gaps without {gone}", after))
        shown = (f"{row['divergence']:.3f}, × {row['ratio']:.3f} ± {row['ratio_se']:.3f}" for row in made)
        body.append((str(number), *shown))
    header = ("layers", "none", "rescaled at gaps", "rescaled everywhere", "sequential", "sequential, then rescaled")
    print(markdown_table(body, header))


if __name__ == "__main__":
    typer.run(main)
