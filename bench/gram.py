"""What the precision of a Gram matrix does to the repair: excess output error against a float64 truth.

    python -m bench.gram --root FOLDER

Captures the inputs of `down_proj` in a few layers of artifacts/model on calibration text, forms the Gram
matrix in several ways, refits the weights on four fifths of the channels by each, and measures the refit's
squared output error on the float64 Gram matrix. The table has that error over the error of the refit by
float64 itself; 1.000 means that nothing was lost.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from libprune.collection.records import Gram
from libprune.models.folder import load_model
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.layout import Layout
from libprune.repair.least_squares import Moments, solve
from libprune.report.markdown import markdown_table

BATCH = 1024


def captured(model: torch.nn.Module, modules: list[str], ids: Tensor) -> dict[str, Tensor]:
    """Inputs ``[tokens, width]`` of modules in the model's own precision."""
    table: dict[str, list[Tensor]] = {name: [] for name in modules}
    for name in modules:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: table[name].append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in ids.split(8):
            model.base_model(input_ids=batch, use_cache=False)
    return {name: torch.cat(rows) for name, rows in table.items()}


def collected(x: Tensor) -> Tensor:
    """As the activations stage does it."""
    statistic = Gram(x.shape[1])
    state = statistic.init()
    for batch in x.split(BATCH):
        statistic.update(state, batch)
    return statistic.finish(state)[""]


def rounded_batches(x: Tensor) -> Tensor:
    """bfloat16 products rounded to bfloat16 for every batch, as a plain 16-bit matrix product gives them."""
    low = x.bfloat16()
    return sum((b.T @ b).float() for b in low.split(BATCH)) / len(x)


def refit(weight: Tensor, gram: Tensor, kept: Tensor, damping: float) -> Tensor:
    """The weights that are fitted to the kept inputs, zero elsewhere; a ValueError if this damping is too little."""
    found, used = solve(Moments.of_dense(weight, gram, kept), weight[:, kept], damping)
    if used != damping:
        raise ValueError("not positive definite")
    whole = torch.zeros_like(weight, dtype=torch.float64)
    whole[:, kept] = found
    return whole


def error(weight: Tensor, repaired: Tensor, truth: Tensor) -> float:
    """Mean squared output error of the refit, tr((W - W') C (W - W')^T)."""
    gap = weight.double() - repaired.double()
    return float(((gap @ truth) * gap).sum())


def main(
    root: Annotated[Path, typer.Option(help="A project with its artifacts.")] = Path(), sequences: int = 64
) -> None:
    """Print the table."""
    layout = Layout(root / "artifacts")
    architecture = read_architecture(layout)
    ids = read_tokens(layout.calibration_tokens, architecture.fingerprint, sequences)[0].ids
    last = architecture.layers - 1
    modules = [architecture.consumers(layer, "mlp")[0].module for layer in (0, last // 2, last)]
    model = load_model(layout.model, torch.float32)
    inputs = captured(model, modules, ids)
    weights = {name: model.get_submodule(name).weight.detach() for name in modules}
    lines = []
    for name in modules:
        x, weight = inputs[name].double(), weights[name]
        truth = x.T @ x / len(x)
        single = collected(inputs[name])
        ways = {
            "float32": single,
            "float32, stored in bfloat16": single.bfloat16().float(),
            "bfloat16 inputs, exact products, float32 sums": collected(inputs[name].bfloat16()),
            "bfloat16 inputs, results rounded to bfloat16": rounded_batches(inputs[name]),
        }
        importance = truth.diagonal() * weight.double().square().sum(0)
        kept = importance > importance.quantile(0.2)
        for damping in (1e-2, 1e-3, 1e-5):
            best = error(weight, refit(weight, truth, kept, damping), truth)
            for way, gram in ways.items():
                try:
                    found = error(weight, refit(weight, gram, kept, damping), truth)
                    lines.append((name, f"{damping:g}", way, f"{found / best:.4f}"))
                except ValueError:
                    lines.append((name, f"{damping:g}", way, "not positive definite"))
    print(f"{len(ids)} x {ids.shape[1]} tokens")
    print(markdown_table(lines, ("consumer", "damping", "Gram matrix", "error / error by float64")))


if __name__ == "__main__":
    typer.run(main)
