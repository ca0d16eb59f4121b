"""What whole plans lose, by the length of the sequences that they are measured on.

    python -m bench.plan_length --work WORK --ratio 0.5

WORK from `bench.least_loss`, with levels measured on 4 sequences of 256 tokens. The plan of each method for the same
target is repaired locally, and its divergence from the dense model measured on the last calibration sequences of 256
and of 1024 tokens, with the difference to `search` over the same sequences.
"""

from pathlib import Path

import typer

from bench.least_loss import Bench
from libprune.models.layers import replaced
from libprune.models.tokens import read_tokens
from libprune.pipeline.sections import Allocate, Score
from libprune.repair.repairs import local_repair
from libprune.report.markdown import markdown_table
from libprune.statistics.divergence import Divergence
from libprune.statistics.losses import Prefix

METHODS = ("search", "functional", "global", "uniform")


def main(work: Path = Path("/tmp/least"), ratio: float = 0.5, tokens: int = 8192) -> None:
    """Measure the plans of all methods at both lengths."""
    bench = Bench(work, windows=2, sequences=0, questions=0)
    repair = local_repair(bench.layout, bench.architecture)
    params = {method: Allocate(ratio=ratio, method=method, channel_multiple=1) for method in METHODS}
    plans = {method: bench.plan(Score(), one)[0] for method, one in params.items()}
    weights = {method: repair(plan) for method, plan in plans.items()}
    rows = []
    for layout in (bench.layout, bench.long):
        found, _ = read_tokens(layout.calibration_tokens, bench.architecture.fingerprint)
        length = found.ids.shape[1]
        sequences = found[slice(len(found) - tokens // length, len(found))]
        at_once = bench.compute.batch_tokens // length
        prefix = Prefix(bench.model, bench.architecture, sequences, at_once, [], Divergence(bench.model))
        losses = {}
        for method, plan in plans.items():
            with replaced(bench.model, weights[method]):
                losses[method] = prefix.losses_of(plan)
            change = losses[method] - losses["search"]
            error = float(change.std() / len(change) ** 0.5)
            difference = f"{float(change.mean()):+.3f} ± {error:.3f}" if method != "search" else ""
            rows.append((f"{len(sequences)} × {length}", method, f"{float(losses[method].mean()):.3f}", difference))
            print(rows[-1], flush=True)
    print(markdown_table(rows, ("sequences", "method", "nats per token", "less that of search")))


if __name__ == "__main__":
    typer.run(main)
