"""Whether a fit of the local repair does better on held-out text if its change of the weights has a lower rank.

    python -m bench.reduced_rank artifacts --sequences 8 --sequences 32 --sequences 256

Reads the artifacts of a run up to the stage allocate, and collects activations of as many sequences as are named in
folders of its own. With little text a fit learns noise, and a change of low rank has fewer numbers to learn. For the
change D of a map's weights and the Gram matrix C of its inputs, the best change of rank r is U_r U_r^T D, where U_r are
the first r left singular vectors of D C^1/2 (Izenman 1975, reduced-rank regression).
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
import yaml
from torch import Tensor

from libprune.engine.surgery import oriented
from libprune.models.folder import WeightFiles
from libprune.pipeline.artifacts import read_architecture, read_plan
from libprune.pipeline.layout import Layout
from libprune.repair.least_squares import dense_problem, fit_consumer, pruned_consumers
from libprune.repair.repairs import inputs_of
from libprune.report.markdown import markdown_table

RANKS = (16, 64, 128, 256)
NEEDED = ("model", "architecture.json", "origin.json", "weights.parquet", "tokens", "plan.parquet")


def collect(artifacts: Path, folder: Path, sequences: int) -> Layout:
    """A layout beside the artifacts with activations of so many sequences."""
    for name in NEEDED:
        (folder / name).symlink_to((artifacts / name).resolve())
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["activations"] |= {"sequences": sequences}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    command = [sys.executable, "-m", "stages.activations", "--params", str(folder / "params.yaml")]
    subprocess.run([*command, "--artifacts", str(folder)], check=True)
    return Layout(folder)


def judge(layout: Layout) -> list[list[float]]:
    """Shares of each map's output that are missed on held-out text: unrepaired, by every rank, and by the whole fit."""
    architecture = read_architecture(layout)
    plan, _ = read_plan(layout, architecture)
    inputs, weights = inputs_of(layout, architecture, curvature=False), WeightFiles(layout.model)
    rows = []
    for consumer, kept in pruned_consumers(architecture, plan):
        weight, known = oriented(consumer, weights[consumer.weight]), inputs(consumer)
        problem, unseen = dense_problem(weight, known, kept, 0.0)
        assert unseen is not None
        fit = fit_consumer(consumer, weight, kept, problem, unseen, None)
        assert fit.weight is not None
        old = weight[:, kept].double()
        change = oriented(consumer, fit.weight)[:, kept].double() - old
        rows.append([unseen.error(old), *(unseen.error(old + lower) for lower in lowered(change, problem.gram))])
        rows[-1].append(unseen.error(old + change))
    return rows


def lowered(change: Tensor, gram: Tensor) -> list[Tensor]:
    """The best changes of each of `RANKS` for inputs with such a Gram matrix."""
    values, vectors = torch.linalg.eigh(gram.double())
    outputs = torch.linalg.svd(change @ vectors * values.clamp(min=0).sqrt(), full_matrices=False).U
    return [outputs[:, :rank] @ (outputs[:, :rank].T @ change) for rank in RANKS]


def main(artifacts: Path, sequences: Annotated[list[int], typer.Option()]) -> None:
    """Compare ranks for each amount of text."""
    cells = []
    for number in sequences:
        with TemporaryDirectory(dir=artifacts.parent) as folder:
            table = np.array(judge(collect(artifacts, Path(folder), number)))
        best = table[:, 1:].argmin(1)
        lower = int((best < len(RANKS)).sum())
        cells.append((str(number), *(f"{100 * share:.2f}" for share in table.mean(0)), f"{lower} of {len(table)}"))
    names = ("sequences", "unrepaired, %", *(f"rank {rank}, %" for rank in RANKS), "whole, %", "maps with a lower rank")
    print(markdown_table(cells, names))


if __name__ == "__main__":
    typer.run(main)
