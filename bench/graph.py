"""What the graph of correlations between units, of `score.criterion: cooperative`, takes beside the Gram matrix.

    python -m bench.graph --units 10000

A made-up Gram matrix of so many channels and a consumer of 1024 outputs. Prints seconds of the processor, and by how
much the largest memory of the process grew over the Gram matrix and the weights.
"""

import resource
import time
from typing import Annotated

import numpy as np
import torch
import typer

from libprune.scoring.correlation import unit_graph

ROWS = 250


def peak() -> float:
    """Largest memory of the process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main(units: Annotated[int, typer.Option(help="Channels.")] = 10_000) -> None:
    """Make the graph and print what it took."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, gram, weight = torch.randn(64, units), torch.eye(units), torch.randn(1024, units)
    for start in range(0, units, ROWS):
        rows = slice(start, start + ROWS)
        gram[rows] += x[:, rows].T @ x / len(x)
    before, start_time = peak(), time.process_time()
    graph = unit_graph(gram, torch.zeros(units), weight, np.arange(units), 0.1)
    seconds = time.process_time() - start_time
    print(f"{units} units, Gram matrix {gram.nbytes / 1e6:.0f} MB: {seconds:.1f} s, {peak() - before:.0f} MB more")
    print(f"connection {graph.connection.mean():.4f}, uniqueness {graph.uniqueness.mean():.4f}")


if __name__ == "__main__":
    typer.run(main)
