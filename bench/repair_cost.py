"""What a repair costs: the fit of one map by its width, and a layer of the sequential repair over its forward pass.

    python -m bench.repair_cost --root .

Widths are random problems of the proportions of a Llama's `down_proj` (output = 3/8 of the kept inputs), fitted with
all dampings. The exponent is that of the line through the logarithms of the last three widths.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import typer

from libprune.engine.architecture import Map
from libprune.engine.axes import parse_expr
from libprune.models.compute import resolve_device, resolve_dtype
from libprune.models.folder import load_model
from libprune.models.layers import layers_of, run_layer
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, read_plan
from libprune.pipeline.layout import Layout
from libprune.repair.least_squares import Moments, fit_consumer
from libprune.repair.sequential import SequentialRepair
from libprune.repair.streams import split_batches

WIDTHS = (512, 1024, 2048, 4096)
ANY = Map("map", 0, "mlp", parse_expr("kept"), parse_expr("out"), transposed=False)


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median over rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def fit_seconds(width: int, rounds: int) -> float:
    """Of one map with so many kept inputs, damping chosen."""
    x = torch.randn(2 * width, width, dtype=torch.float64)
    weight = torch.randn(3 * width // 8, width)
    y = x @ weight.double().T
    gram, cross = x.T @ x / len(x), y.T @ x / len(x)
    moments = Moments(gram, cross, float(y.square().sum()) / len(x), len(x))
    kept = torch.ones(width, dtype=torch.bool)
    return seconds(lambda: fit_consumer(ANY, weight, kept, moments, moments, None), rounds)


def layer_ratios(root: Path, sequences: int, layers: int) -> list[float]:
    """Seconds of a layer of the sequential repair over those of the dense block on the same tokens."""
    layout = Layout(root / "artifacts")
    architecture = read_architecture(layout)
    plan, _ = read_plan(layout, architecture)
    device = resolve_device("auto")
    model = load_model(layout.model, resolve_dtype("auto", device)).to(device)
    found = read_tokens(layout.calibration_tokens, architecture.fingerprint, sequences)[0].to(device)
    batches = split_batches(found, max(1, 1024 // found.ids.shape[1]))
    repair, blocks = (
        SequentialRepair(model, architecture, plan, batches, None, 1.0, 2.0),
        layers_of(model, architecture),
    )
    ratios = []
    for layer in range(layers):
        states = list(repair._streams.dense)

        def forward(layer: int = layer, states: list[torch.Tensor] = states) -> None:
            for batch, state in zip(batches, states, strict=True):
                run_layer(model, blocks, layer, batch.ids, state)

        plain = seconds(forward, 3)
        ratios.append(seconds(lambda layer=layer: repair.step(layer), 1) / plain)
    return ratios


def main(root: Path = Path(), sequences: int = 64, layers: int = 6, rounds: int = 3) -> None:
    """Print both."""
    times = [fit_seconds(width, rounds) for width in WIDTHS]
    for width, took in zip(WIDTHS, times, strict=True):
        print(f"{width} inputs: {took:.2f} s")
    exponent = np.polyfit(np.log(WIDTHS[-3:]), np.log(times[-3:]), 1)[0]
    print(f"grows with the width to the power of {exponent:.2f}")
    ratios = layer_ratios(root, sequences, layers)
    print("a layer of the sequential repair over its dense forward pass:", ", ".join(f"{r:.1f}" for r in ratios))


if __name__ == "__main__":
    typer.run(main)
