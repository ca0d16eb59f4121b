"""How long the integer programme takes on made-up curves, and whether it finds what an exhaustive search finds.

    python -m bench.programme --seeds 3
    python -m bench.programme --small 200

Curves rise by a random power of the share that goes, with noise, and bend at 16 levels. Without `--small` the shapes
are those of large models: 80 layers with 8 groups of heads and 14,336 channels, under four budgets, and 30 layers with
30 numbers of whole layers and 8 widths to choose from. With it, so many small shapes are compared with all their plans.
"""

import itertools
import time
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from libprune.allocation.frames import find
from libprune.allocation.ladders import Ladders, Step
from libprune.allocation.programme import Curves, Limit, Programme
from libprune.engine.architecture import Block
from libprune.engine.cost import Prices, prices
from libprune.pipeline.sections import Allocate, Budgets
from libprune.report.markdown import markdown_table
from tests.support.shapes import Shape

BUDGETS = Budgets(parameters=0.6, total=0.6, cache=0.65, latency=0.62)
TIMES = {"unit": {"attention": 300e-6, "mlp": 1e-6}, "fixed": 1e-4, "outside": 1e-3}


def rising(units: int, levels: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A made-up curve of divergences by units removed, ``[units + 1]``, nats, that bends at some levels."""
    gone = np.unique(np.linspace(0, units, min(levels, units) + 1).round())
    noise = np.exp(rng.normal(0, 0.15, len(gone)))
    lost = 0.05 * rng.lognormal() * np.maximum.accumulate((gone / units) ** rng.uniform(1.0, 2.5) * noise)
    return np.interp(np.arange(units + 1), gone, lost)


def made_up(shape: Shape, multiple: int, levels: int, seed: int) -> tuple[Prices, Ladders, Curves]:
    """Prices of parameters, ladders with channels in multiples, and curves."""
    rng, price = np.random.default_rng(seed), prices(shape.architecture(), "parameters")
    ladders: dict[Block, tuple[Step, ...]] = {}
    curves: dict[Block, NDArray[np.float64]] = {}
    for block, unit in price.unit.items():
        number, size = shape.units[block[1]], multiple if block[1] == "mlp" else 1
        starts = range(0, number - size, size)
        ladders[block] = tuple(Step(tuple(range(at, at + size)), size * unit, 0.0, 0.0) for at in starts)
        curves[block] = rising(number, levels, rng)
    return price, ladders, curves


def large(seeds: int) -> Iterator[tuple[str, ...]]:
    """One row for each case and seed: seconds and gap."""
    tall = Shape(layers=80, kv=8, q=3, d=64, ffn=14336, model=576, gates=2)
    for multiple, seed in itertools.product((64, 1), range(seeds)):
        _, ladders, curves = made_up(tall, multiple, 16, seed)
        params = Allocate(method="search", ratio=None, budgets=BUDGETS, shape="per_layer", channel_multiple=multiple)
        start = time.perf_counter()
        found = find(tall.architecture(), ladders, params, {"levels": curves, "latency": TIMES})
        seconds = time.perf_counter() - start
        yield f"80 layers, 4 budgets, multiples of {multiple}", str(seed), f"{seconds:.1f}", f"{found.solution.gap:.0e}"
    deep = Shape(layers=30, kv=3, q=3, d=64, ffn=1536, model=576, gates=2)
    for seed in range(seeds):
        _, ladders, curves = made_up(deep, 32, 16, seed)
        rng, gone, order = np.random.default_rng(seed), frozenset[Block](), [(frozenset[Block](), 0.0)]
        for layer in rng.permutation(30)[:29].tolist():
            gone |= {(layer, "attention"), (layer, "mlp")}
            order.append((gone, order[-1][1] + 0.02 * len(order)))
        widths = {576 - 32 * number: 0.05 * number**1.5 for number in range(8)}
        params = Allocate(
            method="search", ratio=0.35, shape="per_layer", channel_multiple=32, depth="joint", width="auto"
        )
        start = time.perf_counter()
        found = find(deep.architecture(), ladders, params, {"levels": curves, "depth": order, "width": widths})
        seconds = time.perf_counter() - start
        yield "30 layers, 30 removals × 8 widths, a ratio", str(seed), f"{seconds:.1f}", f"{found.solution.gap:.0e}"


def least(price: Prices, ladders: Ladders, curves: Curves, limits: list[Limit]) -> float:
    """The least loss of all plans within the limits; infinite if there is none."""
    best = np.inf
    blocks = list(ladders)
    for depths in itertools.product(*(range(len(ladders[block]) + 1) for block in blocks)):
        gone = [
            sum(len(step.units) for step in ladders[block][:depth]) for block, depth in zip(blocks, depths, strict=True)
        ]
        removed = sum(number * price.unit[block] for block, number in zip(blocks, gone, strict=True))
        if not any(any(limit.missed(removed)) for limit in limits):
            best = min(best, sum(float(curves[block][number]) for block, number in zip(blocks, gone, strict=True)))
    return best


def compare(number: int) -> int:
    """How many of so many small programmes found the least loss of all plans."""
    right = 0
    for seed in range(number):
        rng = np.random.default_rng(seed)
        shape = Shape(layers=2, kv=2, q=2, d=4, ffn=int(rng.integers(4, 9)), model=8, gates=2)
        price, ladders, curves = made_up(shape, 1, int(rng.integers(2, 9)), seed)
        target = round(float(rng.uniform(0.05, 0.7)) * shape.decoder)
        limits = [Limit("allocate.ratio", price, target)]
        solution = Programme(shape.architecture(), ladders, curves, limits, may_empty=False).solve()
        found = np.inf if solution is None else solution.divergence
        expected = least(price, ladders, curves, limits)
        right += bool(found == expected or np.isclose(found, expected, rtol=1e-6))
    return right


def main(
    seeds: int = 3,
    small: Annotated[int, typer.Option(help="Compare so many small programmes with exhaustive search.")] = 0,
) -> None:
    """Measure the programme."""
    if small:
        print(f"{compare(small)} of {small} programmes found the least loss of all plans")
        return
    print(markdown_table(list(large(seeds)), ("case", "seed", "seconds", "gap")))


if __name__ == "__main__":
    typer.run(main)
