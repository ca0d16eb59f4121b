"""Query heads or whole groups? The same budget with each as the units of attention, and with both.

    python -m bench.queries --text wiki.valid.raw --work DIR

The first half of the text calibrates (sequences of 256 tokens; gradients on the first half of them), its second half
judges (windows of 512 tokens at even distances). The model is the demo's, the criterion `unit_fisher`, the repair
`local`. `groups` cuts key-value heads with their query heads. `heads` cuts query heads and keeps all groups. `both`
cuts either. A setting with `attention` keeps all channels. Each is measured as the masked and repaired dense model.
Rows go to WORK/queries.jsonl; those that are there are not measured again.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml

from bench.least_loss import Bench, Setting, _link, _run
from libprune.engine import cost
from libprune.engine.architecture import Heads
from libprune.engine.describe import describe
from libprune.models.folder import fingerprint, load_config, load_model, write_dense
from libprune.models.source import load_dense
from libprune.pipeline.artifacts import read_architecture, write_architecture, write_units
from libprune.pipeline.atomic import write_json
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Allocate, Latency, Prepare, Score
from libprune.report.markdown import markdown_table
from libprune.statistics.latency import fit_lines, time_layers

UNITS: dict[str, tuple[Heads, int]] = {"groups": ("groups", 1), "heads": ("queries", 3), "both": ("queries", 1)}
"""By name `prepare.heads`, and the groups that every layer keeps."""
METHODS = ("uniform", "global")
CHANNELS = 1536
LIMITS = {"": {}, ", attention": {"min_channels": CHANNELS}}
"""By what ends the name of a setting, more limits."""


def collect(work: Path, text: Path, sequences: int, length: int) -> None:
    """The statistics for both kinds of units, from one model and text; what does not depend on units is shared."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    tokens = {"calibration_sequences": sequences, "calibration_length": 256, "evaluation_length": length}
    params["tokenize"] |= tokens | {"text": str(text), "evaluation_share": 0.5, "evaluation_windows": 110}
    params["gradients"] |= {"sequences": sequences // 2}
    groups = Layout(work / "groups")
    if not groups.origin.exists():
        model, tokenizer = load_dense(Prepare(**params["prepare"]))
        groups.root.mkdir(parents=True, exist_ok=True)
        write_json(groups.origin, {"model": write_dense(groups.model, model, tokenizer, {})})
    for heads, needed in {"groups": ("tokenize", "gradients", "activations"), "queries": ("gradients",)}.items():
        layout, path = Layout(work / heads), work / f"params_{heads}.yaml"
        layout.root.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(params))
        if heads == "queries":
            _link(groups.root, layout.root, ("model", "origin.json", "tokens", "activations"))
        _describe(layout, heads)
        for stage in needed:
            _run(stage, path, layout.root, work / f"{stage}-{heads}.done")


def _describe(layout: Layout, heads: Heads) -> None:
    """What prepare writes of the units of a model, as far as it is needed here."""
    model = load_model(layout.model, torch.float32)
    architecture = replace(describe(model, heads=heads), fingerprint=fingerprint(layout.model))

    def costs(layer: int, part: str) -> dict[str, Any]:
        return {"cost": np.full(architecture.units(part), cost.unit_parameters(architecture, layer, part))}

    write_architecture(layout, architecture)
    write_units(layout.weights, architecture, costs, {"model": architecture.fingerprint, "source": str(layout.model)})


def measure(benches: dict[str, Bench], name: str, method: str, ratio: float, more: dict[str, Any]) -> dict[str, Any]:
    """One row: what `Bench.measure` gives, with the sizes that are left."""
    heads, floor = UNITS[name]
    bench = benches[heads]
    allocate = {"method": method, "min_groups": floor, "split": "importance", "shape": "per_layer"} | more
    setting: Setting = ({}, allocate, {"repair": "local"})
    plan, _ = bench.plan(Score(), Allocate(ratio=ratio, channel_multiple=1, **allocate))
    left, dense = (cost.size(bench.architecture, p) for p in (plan, plan.dense(bench.architecture)))
    axes = [plan.sizes(bench.architecture, layer) for layer in plan.layers]
    kept = {axis: sum(sizes.get(axis, 0) for sizes in axes) / len(axes) for axis in ("kv", "head", "ffn")}
    if heads == "groups":
        kept["head"] = 3 * kept["kv"]
    row = bench.measure(name, ratio, setting)
    return row | {"method": method, "cache": left.cache / dense.cache, "macs": left.macs / dense.macs, "left": kept}


def table(rows: list[dict[str, Any]]) -> str:
    """One line a setting."""
    header = ("removed", "method", "units", "perplexity / dense", "groups, heads, channels of a layer", "cache", "MACs")
    body = []
    for row in sorted(rows, key=lambda row: (row["limits"], row["ratio_asked"], row["method"], row["setting"])):
        left = ", ".join(f"{row['left'][axis]:.2f}" for axis in ("kv", "head")) + f", {row['left']['ffn']:.0f}"
        found = f"{row['ratio']:.3f} ± {row['ratio_se']:.3f}"
        sizes = f"{100 * row['cache']:.0f} %", f"{100 * row['macs']:.1f} %"
        body.append(
            (f"{100 * row['removed']:.2f} %", row["method"] + row["limits"], row["setting"], found, left, *sizes)
        )
    return markdown_table(body, header)


def timed(layout: Layout) -> dict[str, Any]:
    """The lines fitted to the times of layers with fewer heads, groups and channels, float32."""
    architecture = read_architecture(layout)
    config = load_config(layout.model)
    params = Latency(tokens=512, batch=1, rounds=9)
    return fit_lines(architecture, time_layers(config, architecture, torch.device("cpu"), torch.float32, params))


def main(
    work: Path = Path("/tmp/queries"),
    text: Annotated[Path | None, typer.Option(help="Collect the statistics of this text first.")] = None,
    ratio: list[float] = [0.2, 0.35, 0.5],  # noqa: B006
    alone: Annotated[list[float], typer.Option(help="Shares that go from attention alone.")] = [0.0625, 0.125],  # noqa: B006
    windows: int = 16,
    length: int = 512,
    sequences: int = 64,
    latency: bool = False,
) -> None:
    """Measure all settings."""
    if text is not None:
        collect(work, text, sequences, length)
    if latency:
        print(json.dumps(timed(Layout(work / "queries")), indent=1))
        return
    path = work / "queries.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["setting"], row["method"], row["limits"], row["ratio_asked"]) for row in rows}
    benches = {
        heads: Bench(work, windows, 0, 0, root=work / heads, judged=work / "groups") for heads in ("groups", "queries")
    }
    asked = [
        (limits, share, method) for limits in LIMITS for share in (alone if limits else ratio) for method in METHODS
    ]
    for limits, share, method in asked:
        for name in UNITS:
            if (name, method, limits, share) in done or (limits and method == "uniform"):
                continue
            start = time.perf_counter()
            row = measure(benches, name, method, share, LIMITS[limits]) | {"limits": limits}
            rows.append(row)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            shown = {key: row[key] for key in ("setting", "method", "limits", "removed", "ratio", "ratio_se", "left")}
            print(shown, f"{time.perf_counter() - start:.0f} s", flush=True)
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
