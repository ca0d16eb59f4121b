"""Gradients made to vanish: does a fix choose better, and is a layer with small gradients really worth little?

    python -m bench.least_loss --text wiki.valid.raw --work /tmp/least --table    # collects what this reads, no more
    python -m bench.vanishing --work /tmp/least

Two models are made from the dense one. `rescaled`: in all layers but the first eight the norm before a part is divided
by a constant and the maps behind it are multiplied by it, so that the function is the same and the late gradients at
the norms are as many times larger. `faded`: four early layers have their v, o, up and down projections multiplied by a
small number, so that all their gradients vanish; the function changes, as it must. Their gradients are collected on the
first 64 of the same sequences, and plans at 20 % are judged without repair. Rows go to WORK/vanishing.jsonl.
"""

from pathlib import Path
from typing import Any

import torch
import typer
import yaml
from transformers import AutoTokenizer, PreTrainedModel

from bench.hgsp import where
from bench.least_loss import Bench, _run
from bench.rows import add_row, read_rows
from libprune.models.folder import load_model, write_dense
from libprune.pipeline.artifacts import read_architecture, read_table
from libprune.pipeline.layout import Layout
from libprune.report.markdown import markdown_table
from libprune.statistics.gradient_health import gradient_ratio

UNCHANGED, SCALE = 8, 16384.0
FADED, SHRINK = range(1, 5), 1e-3
CRITERIA, FIXES = ("unit_fisher", "taylor"), ("none", "auto")


def rescale(model: PreTrainedModel) -> None:
    """The same function, late layers in other units."""
    behind = {"input_layernorm": ("q", "k", "v"), "post_attention_layernorm": ("gate", "up")}
    for layer in model.model.layers[UNCHANGED:]:
        for norm, names in behind.items():
            getattr(layer, norm).weight.div_(SCALE)
            part = layer.self_attn if norm == "input_layernorm" else layer.mlp
            for name in names:
                getattr(part, f"{name}_proj").weight.mul_(SCALE)


def fade(model: PreTrainedModel) -> None:
    """Early layers that contribute next to nothing."""
    for number in FADED:
        layer = model.model.layers[number]
        for module in (layer.self_attn.v_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            module.weight.mul_(SHRINK)


CHANGES = {"rescaled": rescale, "faded": fade}


def make(work: Path, name: str) -> Path:
    """The changed model with its gradients, on the base model's calibration sequences."""
    root = work / name
    base, layout = Layout(work / "artifacts"), Layout(root)
    if not layout.model.exists():
        model = load_model(base.model, torch.float32)
        with torch.no_grad():
            CHANGES[name](model)
        write_dense(work / f"{name}-source", model, AutoTokenizer.from_pretrained(base.model))
    params: dict[str, Any] = yaml.safe_load((work / "params.yaml").read_text())
    params["prepare"] |= {"model": str((work / f"{name}-source").resolve())}
    params["gradients"] |= {"sequences": 64}
    path = work / f"params_{name}.yaml"
    path.write_text(yaml.safe_dump(params))
    for stage in ("prepare", "tokenize", "gradients"):
        _run(stage, path, root, work / f"{stage}-{name}.done")
    return root


def main(work: Path = Path("/tmp/least"), windows: int = 8) -> None:
    """Measure both models."""
    path = work / "vanishing.jsonl"
    rows = read_rows(path)
    done = {(row["model"], row["criterion"], row["fix"]) for row in rows}
    roots = {"as it is": work / "artifacts", **{name: make(work, name) for name in CHANGES}}
    for name, root in roots.items():
        bench = Bench(work, windows, sequences=0, questions=0, root=root)
        ratio = gradient_ratio(read_table(root / "gradients/layers.parquet", "gradients")[0])
        for criterion in CRITERIA:
            for fix in FIXES:
                if (name, criterion, fix) in done or (name not in CHANGES and fix != "none"):
                    continue
                setting = {"criterion": criterion}, {"method": "global", "gradient_fix": fix}, {"repair": "none"}
                row = bench.measure(f"{criterion}, global, {fix}", 0.2, setting)
                rows.append(row | {"model": name, "criterion": criterion, "fix": fix, "gradient_ratio": ratio})
                add_row(path, rows[-1])
    architecture = read_architecture(Layout(work / "artifacts"))
    units = [architecture.units(part) for part in architecture.parts]
    body = [
        (
            row["model"],
            f"{row['gradient_ratio']:,.0f}",
            f"{row['dense']:.2f}",
            f"{row['criterion']}, fix {row['fix']}",
            f"× {row['ratio']:.3f} ± {row['ratio_se']:.3f}",
            ", ".join("/".join(map(str, row["kept"][layer])) for layer in FADED),
            where(row["kept"], units),
        )
        for row in rows
    ]
    kept = f"kept in layers {FADED[0]} to {FADED[-1]}"
    header = ("model", "gradient ratio", "dense", "criterion", "perplexity / dense", kept, "kept, %, by thirds")
    print(markdown_table(body, header))


if __name__ == "__main__":
    typer.run(main)
