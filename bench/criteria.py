"""Perplexity of every criterion, allocation and repair, at equal removed parameters.

    python bench/criteria.py --text wiki.valid.raw --work /tmp/bench

Collects the statistics once, then measures each setting as the masked and repaired dense model (the
tests prove that slicing equals masking). The first half of the text calibrates, the second half
judges. Rows are appended to WORK/criteria.jsonl, and rows that are there are not measured again.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from libprune import allocation, criteria
from libprune.artifacts import Layout, read_architecture
from libprune.checkpoint import WeightFiles, load_model
from libprune.compute import resolve_device, resolve_dtype
from libprune.errors import LibpruneError
from libprune.evaluation import perplexity, perplexity_ratio, window_losses
from libprune.markdown import markdown_table
from libprune.params import Params
from libprune.repair import repair_local
from libprune.sections import Allocate, Score
from libprune.shards import read_tensor
from libprune.surgery import masked
from libprune.tokens import read_tokens

COLLECTING = ("prepare", "tokenize", "gradients", "hessian", "activations")
SCORES = {
    "random": {"criterion": "random"},
    "magnitude": {"criterion": "magnitude"},
    "magnitude, rank": {"criterion": "magnitude", "scaling": "rank"},
    "wanda": {"criterion": "wanda"},
    "wanda, zscore": {"criterion": "wanda", "scaling": "zscore"},
    "wanda, rank": {"criterion": "wanda", "scaling": "rank"},
    "taylor": {"criterion": "taylor"},
    "taylor_2nd": {"criterion": "taylor_2nd"},
    "fisher": {"criterion": "fisher"},
    "unit_fisher": {"criterion": "unit_fisher"},
    "unit_fisher, token": {"criterion": "unit_fisher", "fisher_over": "token"},
}
ALLOCATIONS = {
    "global": {"method": "global"},
    "global, by importance": {"method": "global", "rank_by": "importance"},
    "uniform": {"method": "uniform", "split": "importance"},
    "uniform, proportional": {"method": "uniform", "split": "proportional"},
}


def collect(work: Path, text: Path, windows: int, length: int) -> tuple[Params, Layout]:
    """Run the collecting stages that have not run yet."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["tokenize"] |= {"text": str(text.resolve()), "evaluation_share": 0.5}
    params["tokenize"] |= {"evaluation_windows": windows, "evaluation_length": length}
    work.mkdir(parents=True, exist_ok=True)
    path = work / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    layout = Layout(work / "artifacts")
    for stage in COLLECTING:
        done = work / f"{stage}.done"
        if not done.exists():
            command = [sys.executable, "-m", f"stages.{stage}", "--params", str(path), "--artifacts", str(layout.root)]
            subprocess.run(command, check=True)
            done.touch()
    return Params.model_validate(params), layout


class Bench:
    """The dense model and its statistics, ready to measure settings."""

    def __init__(self, params: Params, layout: Layout) -> None:
        self.layout, self.params = layout, params
        self.architecture = read_architecture(layout)
        device = resolve_device("auto")
        self.model = load_model(layout.model, resolve_dtype("auto", device)).to(device)
        self.weights = WeightFiles(layout.model)
        self.windows, _ = read_tokens(layout.evaluation, self.architecture.fingerprint)
        self.dense = self.losses("dense")

    def losses(self, label: str):
        return window_losses(self.model, self.windows, 2048, label)

    def plan(self, score: dict, allocate: dict, ratio: float):
        chosen = Score(**score)
        table, _ = criteria.join_tables(self.layout, criteria.find_criterion(chosen.criterion))
        scores = criteria.score_units(table, chosen)
        return allocation.allocate(self.architecture, scores, Allocate(ratio=ratio, **allocate))

    def measure(self, plan, repair: str) -> dict:
        start = time.perf_counter()
        repaired = self._repaired(plan) if repair == "local" else {}
        seconds = time.perf_counter() - start
        originals = {name: self.model.get_parameter(name).detach().clone() for name in repaired}
        self._put(repaired)
        with masked(self.model, self.architecture, plan):
            losses = self.losses(repair)
        self._put(originals)
        found, ratio = perplexity(losses), perplexity_ratio(self.dense, losses)
        return {
            "perplexity": found.value,
            "se": found.error,
            "ratio": ratio.value,
            "ratio_se": ratio.error,
            "repair_s": seconds,
        }

    def _repaired(self, plan):
        def gram(consumer):
            return read_tensor(self.layout.activations, consumer.layer, f"{consumer.module}.input_gram", "activations")

        return repair_local(self.architecture, plan, self.weights.__getitem__, gram, self.params.slice.damping)

    def _put(self, weights) -> None:
        with torch.no_grad():
            for name, tensor in weights.items():
                self.model.get_parameter(name).copy_(tensor)


def removed_share(architecture, plan) -> float:
    from libprune import cost

    return 1 - cost.size(architecture, plan).decoder / architecture.decoder_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--scores", nargs="+", default=list(SCORES), choices=list(SCORES))
    parser.add_argument("--allocations", nargs="+", default=["global", "uniform"], choices=list(ALLOCATIONS))
    options = parser.parse_args()

    bench = Bench(*collect(options.work, options.text, options.windows, options.length))
    path = options.work / "criteria.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(r["score"], r["allocation"], r["ratio_asked"], r["repair"]) for r in rows}
    print(f"dense {perplexity(bench.dense)}")
    settings = itertools.product(options.ratios, options.allocations, options.scores)
    for ratio, allocate, score in settings:
        try:
            plan = bench.plan(SCORES[score], ALLOCATIONS[allocate], ratio)
        except LibpruneError as error:
            print(f"{score}, {allocate}, {ratio}: {error}")
            continue
        for repair in ("none", "local"):
            key = (score, allocate, ratio, repair)
            if key in done:
                continue
            row = dict(zip(("score", "allocation", "ratio_asked", "repair"), key, strict=True))
            row |= {"removed": removed_share(bench.architecture, plan)} | bench.measure(plan, repair)
            row |= {"kept_layer_0": [plan.kept(0, part) for part in bench.architecture.parts]}
            rows.append(row)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    print(table(rows))


def table(rows: list[dict]) -> str:
    """One line a criterion and allocation, one column a ratio and repair."""
    columns = sorted({(r["ratio_asked"], r["repair"]) for r in rows}, key=lambda c: (c[0], c[1] != "none"))
    lines: dict[tuple[str, str], dict] = {}
    for row in rows:
        cell = f"{row['perplexity']:,.2f} (× {row['ratio']:.2f} ± {row['ratio_se']:.2f})"
        lines.setdefault((row["score"], row["allocation"]), {})[row["ratio_asked"], row["repair"]] = cell
    header = ("criterion", "allocation", *(f"{100 * ratio:.0f} %, {repair}" for ratio, repair in columns))
    return markdown_table([(*key, *(cells.get(c, "") for c in columns)) for key, cells in lines.items()], header)


if __name__ == "__main__":
    main()
