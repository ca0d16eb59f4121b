"""Sliced against masked logits, and predicted against actual parameters, for every family and shape.

    python -m bench.equality

Uses the tiny random models of the tests, in float32.
"""

import tempfile
from pathlib import Path

import torch

from libprune.engine import cost
from libprune.engine.surgery import masked
from libprune.report.markdown import markdown_table
from tests.support.models import FAMILIES, PLANS, prune, random_plan, tokens, write_dense

CUSTOM = {"uniform": False, "per_layer": True, "holes": True, "shallow": False}
HEADER = ("family", "plan", "layers", "largest logit", "largest difference", "predicted", "actual")


def row(family: str, kind: str, folder: Path) -> tuple[str, ...]:
    """One line of the table."""
    dense = write_dense(FAMILIES[family](0), folder / "dense")
    (folder / "pruned").mkdir()
    pruned = prune(dense, random_plan(dense.architecture, kind), CUSTOM[kind], folder / "pruned")
    ids = tokens()
    with torch.no_grad():
        sliced = pruned.model(ids).logits
        with masked(dense.model, dense.architecture, pruned.plan):
            expected = dense.model(ids).logits
    predicted = cost.size(dense.architecture, pruned.plan).total
    actual = sum(parameter.numel() for parameter in pruned.model.parameters())
    difference = float((sliced - expected).abs().max())
    return (
        family,
        kind,
        str(len(pruned.plan.layers)),
        f"{float(expected.abs().max()):.2f}",
        f"{difference:.1e}",
        str(predicted),
        str(actual),
    )


def main() -> None:
    rows = []
    for family in FAMILIES:
        for kind in PLANS:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(row(family, kind, Path(folder)))
    print(markdown_table(rows, HEADER))


if __name__ == "__main__":
    main()
