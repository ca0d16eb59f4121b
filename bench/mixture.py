"""Which experts of a mixture can go: criteria, with and without a refit of the others, beside the dense model.

    python -m examples.mixture /tmp/mixture/model-0 --seed 0    # and model-1 with --seed 1, model-2 with --seed 2
    python -m bench.mixture /tmp/mixture/model-* --work /tmp/mixture/bench
    python -m bench.mixture --work /tmp/mixture/bench --table

Each model is a seed: of its weights, of its calibration text (256 sequences of 128 tokens from the first 85 % of the
documents; gradients on the first 128) and of the criterion `random`. Every layer loses the same number of experts, and
attention stays whole. All are judged on the windows of 128 tokens of the last 15 %, which no model was trained on. Each
setting is measured as the masked and repaired dense model; the tests prove that slicing equals that. Rows go to
WORK/rows.jsonl; those that are there are not measured again.
"""

import math
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml

from bench.least_loss import _run
from bench.rows import add_row, read_rows
from examples.byte_text import NEWS
from examples.mixture import EVALUATION_SHARE
from libprune.allocation.decide import decide
from libprune.allocation.evidence import read_evidence
from libprune.engine import cost
from libprune.engine.plan import Plan
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
from libprune.results.perplexity import estimate_perplexity, estimate_ratio, window_losses
from libprune.results.routing import routing_changes, watched
from libprune.scoring.score import score_layout

CRITERIA = ("reap", "routed_frequency", "unit_fisher", "random")
REMOVED = (2, 4)
"""Experts that each layer loses."""
REPAIR = ("none", "local", "sequential")
SEQUENCES = 128
"""Calibration sequences that the repair is fitted to."""
COMPUTE = Compute(device="cpu", dtype="float32", batch_tokens=2048)


def collect(work: Path, model: Path, seed: int) -> Layout:
    """Run the collecting stages of one seed that have not run yet."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["prepare"] |= {"model": str(model.resolve())}
    params["tokenize"] |= {"text": NEWS, "evaluation_share": EVALUATION_SHARE, "seed": seed}
    params["tokenize"] |= {"calibration_sequences": 256, "calibration_length": 128}
    params["tokenize"] |= {"evaluation_windows": 144, "evaluation_length": 128}
    params["compute"] |= COMPUTE.model_dump()
    root = work / f"seed-{seed}"
    root.mkdir(parents=True, exist_ok=True)
    path = root / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    for stage in ("prepare", "tokenize", "gradients", "activations"):
        _run(stage, path, root / "artifacts", root / f"{stage}.done")
    return Layout(root / "artifacts")


def settings() -> Iterator[tuple[int, str, str]]:
    """Experts to remove, criterion and repair."""
    yield from product(REMOVED, CRITERIA, REPAIR)


def measure(layout: Layout, seed: int, known: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """The rows of one seed that are not known."""
    left = [one for one in settings() if (seed, *one) not in known]
    if not left:
        return
    architecture = read_architecture(layout)
    model = load_model(layout.model, torch.float32)
    windows, _ = read_tokens(layout.evaluation_tokens, architecture.fingerprint)
    whole = Plan.dense(architecture)

    def run() -> tuple[Any, Any]:
        with watched(model, architecture, whole) as choices:
            return window_losses(model, windows, COMPUTE.batch_tokens, "evaluate"), choices

    with masked(model, architecture, whole):  # so that mixtures run alike with and without a mask
        dense, before = run()
    sizes = cost.size(architecture, whole)
    for removed, criterion, repair in left:
        start = time.perf_counter()
        plan = plan_of(layout, criterion, removed, seed)
        fits = REPAIRS[repair].repair(layout, architecture, plan, COMPUTE, Slice(repair=repair, sequences=SEQUENCES))
        seconds = time.perf_counter() - start
        with replaced(model, new_parameters(fits)), masked(model, architecture, plan):
            losses, after = run()
        change, size = estimate_ratio(dense, losses), cost.size(architecture, plan)
        routing = routing_changes(before, {"pruned": after}, architecture, plan)
        assert routing is not None
        yield {
            "seed": seed,
            "removed": removed,
            "criterion": criterion,
            "repair": repair,
            "dense": estimate_perplexity(dense).value,
            "ratio": change.value,
            "ratio_se": change.error,
            "seconds": seconds,
            "total": 1 - size.total / sizes.total,
            "decoder": 1 - size.decoder / sizes.decoder,
            "active": 1 - size.active / sizes.active,
            "removed_weight": routing["removed_weight"],
            "changed": routing["changed"]["pruned"],
            "windows": len(windows),
        }


def plan_of(layout: Layout, criterion: str, removed: int, seed: int) -> Plan:
    """The plan that takes from every layer the same number of experts, those with the lowest scores."""
    architecture = read_architecture(layout)
    scores = Scores(architecture, *score_layout(layout, Score(criterion="unit_fisher", experts=criterion, seed=seed)))
    prices = cost.prices(architecture, "parameters")
    target = sum(removed * price for (_, part), price in prices.unit.items() if part == "experts")
    heads = architecture.units("attention")
    params = Allocate(ratio=target / prices.decoder, method="uniform", min_groups=heads, channel_multiple=1)
    plan = decide(scores, params, read_evidence(layout, scores, params)).plan
    kept = {"attention": {heads}, "experts": {architecture.units("experts") - removed}}
    assert {part: set(plan.counts(part)) for part in kept} == kept
    return plan


def table(rows: list[dict[str, Any]]) -> str:
    """One line a criterion, number and repair: geometric means over seeds, and their range."""
    body = []
    for one in settings():
        own = [row for row in rows if (row["removed"], row["criterion"], row["repair"]) == one]
        if not own:
            continue
        ratios = np.array([row["ratio"] for row in own])
        error = np.mean([row["ratio_se"] / row["ratio"] for row in own])
        mean = math.exp(np.log(ratios).mean())
        shares = (f"{100 * np.mean([row[key] for row in own]):.1f} %" for key in ("removed_weight", "changed"))
        found = f"× {mean:.3f} ± {mean * error:.3f} ({ratios.min():.3f} to {ratios.max():.3f})"
        body.append((str(one[0]), *one[1:], found, *shares, f"{np.mean([row['seconds'] for row in own]):.0f}"))
    header = ("removed", "criterion", "repair", "perplexity / dense", "weight on removed", "tokens changed", "seconds")
    return markdown_table(body, header)


def facts(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Sentences on the seeds and on what was removed."""
    dense = {row["seed"]: row["dense"] for row in rows}
    listed = ", ".join(f"{dense[seed]:.1f}" for seed in sorted(dense))
    yield f"Perplexity per token of the dense models, by seed: {listed}; {rows[0]['windows']} windows."
    for removed in sorted({row["removed"] for row in rows}):
        own = next(row for row in rows if row["removed"] == removed)
        shares = (f"{100 * own[key]:.1f} % of the {name} parameters" for key, name in SHARES.items())
        yield f"{removed} experts of each layer: {', '.join(shares)}."


SHARES = {"total": "model's", "decoder": "layers'", "active": "layers' active"}


def main(
    models: Annotated[list[Path] | None, typer.Argument(help="Folders of examples.mixture, one a seed.")] = None,
    work: Path = Path("/tmp/mixture/bench"),
    show: Annotated[bool, typer.Option("--table", help="Only print what was measured.")] = False,
) -> None:
    """Collect, measure, print."""
    path = work / "rows.jsonl"
    rows = read_rows(path)
    for seed, model in enumerate([] if show else models or []):
        known = {(row["seed"], row["removed"], row["criterion"], row["repair"]) for row in rows}
        for row in measure(collect(work, model, seed), seed, known):
            rows.append(row)
            add_row(path, row)
            print(row, flush=True)
    print("\n".join(facts(rows)), table(rows), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
