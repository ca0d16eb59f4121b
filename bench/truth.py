"""Every criterion against the measured loss increase of masking single units.

    python -m bench.truth --root FOLDER --hessian fisher=artifacts/hessian --hessian hutchinson=OTHER

Reads artifacts/ablation.parquet of a project whose `ablation.units` is not 0, and the per-unit tables of the
collecting stages. For every criterion: Spearman's rank correlation with the measured increase, over all units
and within each part, with 95 % intervals from resampled units; and for those in nats the scale, measured
over predicted loss summed over units. By default the measurement is on other sequences than gradients and
Hessian, and on some of those of the activations.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from libprune.engine.tables import Columns
from libprune.pipeline.artifacts import read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Score
from libprune.report.markdown import markdown_table
from libprune.scoring.criteria import CRITERIA
from libprune.scoring.ranks import spearman

Values = NDArray[np.float64]
RESAMPLES = 2000


def interval(of: Callable[[NDArray[np.int64]], float], count: int) -> str:
    """A statistic of all rows, and its 95 % interval over resampled rows."""
    rng = np.random.default_rng(0)
    samples = [of(rng.integers(count, size=count)) for _ in range(RESAMPLES)]
    low, high = np.quantile(samples, [0.025, 0.975])
    return f"{of(np.arange(count)):.2f} ({low:.2f} to {high:.2f})"


def rows_of(table: Columns, measured: Columns) -> NDArray[np.int64]:
    """The rows of the measured units in a per-unit table."""
    keys = ("layer_idx", "group_type", "group_idx")
    place = {key: i for i, key in enumerate(zip(*(table[k].tolist() for k in keys), strict=True))}
    return np.array([place[key] for key in zip(*(measured[k].tolist() for k in keys), strict=True)])


def predictions(layout: Layout, hessians: dict[str, Path], n_tok: int) -> dict[str, tuple[Values, bool]]:
    """Importance of every unit by every criterion and variant, and whether it is in nats."""
    joined = {}
    for path in (layout.weights, layout.gradients / "units.parquet", layout.activations / "units.parquet"):
        joined |= read_table(path, "gradients")[0]

    def value(name: str, table: Columns, **settings: str) -> tuple[Values, bool]:
        criterion = CRITERIA[name]
        parts = criterion.components(table, Score(criterion=name, **settings))
        return np.sum(list(parts.values()), axis=0), criterion.unit == "nats"

    found = {
        "random": value("random", joined),
        "magnitude, l1": value("magnitude", joined),
        "magnitude, l2": value("magnitude", joined, magnitude_norm="l2"),
        "taylor": value("taylor", joined),
        "taylor_group": value("taylor_group", joined),
        "unit_fisher, sequence": value("unit_fisher", joined),
        "unit_fisher, token": value("unit_fisher", joined, fisher_over="token"),
        "-mask_gradient + unit_fisher": (joined["unit_fisher_sequence"] - joined["mask_gradient"], True),
    }
    found |= {f"wanda, {norm}": value("wanda", joined, wanda_norm=norm) for norm in ("l1", "l2", "mean", "max")}
    kinds = ("magnitude", "variance", "entropy", "frequency", "range")
    found |= {f"activation_{kind}": (joined[f"activation_{kind}"], False) for kind in kinds}
    for estimator, folder in hessians.items():
        table = joined | read_table(folder / "units.parquet", "hessian")[0]
        names = ("fisher", "taylor_2nd", "hessian_trace")
        found |= {f"{name}, H by {estimator}": value(name, table) for name in names}
        if estimator == "fisher":
            sample = table | {key: table[key] / n_tok for key in ("fisher", "hessian_trace")}
            found |= {f"{name}, H by fisher_sample": value(name, sample) for name in names}
    return found


def main(
    root: Annotated[Path, typer.Option(help="A project with its artifacts.")] = Path(),
    hessian: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER of collected Hessians.")] = None,
) -> None:
    """Print the table."""
    layout = Layout(root / "artifacts")
    hessians = {name: Path(folder) for name, _, folder in (item.partition("=") for item in hessian or [])}
    measured, meta = read_table(layout.ablation, "ablation")
    increase, error = measured["loss_increase"], measured["standard_error"]
    rows = rows_of(read_table(layout.weights, "prepare")[0], measured)
    parts = {part: measured["group_type"] == part for part in ("attention", "mlp")}
    print(f"{len(increase)} units on {meta['sequences']} x {meta['length']} tokens, dense loss {meta['loss']:.4f}")
    for part, here in parts.items():
        clear = np.abs(increase[here]) > 2 * error[here]
        mean, median, noise = increase[here].mean(), np.median(increase[here]), np.median(error[here])
        print(
            f"{part}: {here.sum()} units, increase {mean:.2e} on average, median {median:.2e}, its error {noise:.2e};"
        )
        print(f"  {clear.mean():.0%} are beyond twice their error")
    lines = []
    for name, (values, in_nats) in predictions(layout, hessians, meta["length"] - 1).items():
        predicted = np.asarray(values, dtype=np.float64)[rows]
        cells = [name, interval(lambda i, p=predicted: spearman(p[i], increase[i]), len(rows))]
        for here in parts.values():
            p, m = predicted[here], increase[here]
            cells.append(interval(lambda i, p=p, m=m: spearman(p[i], m[i]), len(p)))
        for here in parts.values():
            p, m = predicted[here], increase[here]
            cells.append(interval(lambda i, p=p, m=m: m[i].sum() / p[i].sum(), len(p)) if in_nats else "")
        lines.append(tuple(cells))
    heads = ("criterion", "all units", "attention", "mlp", "measured / predicted, attention", "mlp")
    print(markdown_table(lines, heads))


if __name__ == "__main__":
    typer.run(main)
