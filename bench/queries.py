"""Query heads or whole groups? Every uniform shape of the attention, and channels of as many parameters beside it.

    python -m bench.queries --text wiki.valid.txt --work DIR

The demo's model has 3 groups of 3 query heads in each layer. Each of several smaller shapes, so many groups with so
many heads in each, is cut out of all layers; which heads and groups go says `fluctuation`, lowest first. All channels
stay. In two more settings all heads stay, and as many parameters of channels go as of one head in each group, and of
two. The repair is `local`. The first half of the text calibrates, its second half judges (windows at even distances).
Each is measured as the masked and repaired dense model. Rows go to WORK/queries.jsonl; those that are there are not
measured again.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml

from bench.least_loss import Bench, _run
from bench.rows import add_row, read_rows
from libprune.engine import cost
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.engine.tables import split_blocks
from libprune.models.folder import fingerprint, load_model, write_dense
from libprune.models.layers import replaced
from libprune.models.source import load_dense
from libprune.pipeline.artifacts import write_architecture, write_units
from libprune.pipeline.atomic import write_json
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Prepare, Score, Slice
from libprune.repair.least_squares import new_parameters
from libprune.report.markdown import markdown_table
from libprune.results.perplexity import estimate_ratio
from libprune.scoring.score import score_layout

SHAPES = (
    (3, 2, 0),
    (2, 3, 0),
    (3, 1, 0),
    (2, 2, 0),
    (1, 3, 0),
    (2, 1, 0),
    (1, 2, 0),
    (3, 3, 128),
    (3, 3, 256),
)
"""Groups that stay in a layer, heads in each, and channels that go."""


def collect(work: Path, text: Path, sequences: int, length: int) -> None:
    """The dense model, its description with query heads, and the activations on the calibration text."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    tokens = {"calibration_sequences": sequences, "calibration_length": length, "evaluation_length": length}
    params["tokenize"] |= tokens | {"text": str(text), "evaluation_share": 0.5, "evaluation_windows": 110}
    params["prepare"] |= {"heads": "queries"}
    layout, path = Layout(work / "artifacts"), work / "params.yaml"
    layout.root.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(params))
    if not layout.origin.exists():
        write_json(layout.origin, {"model": write_dense(layout.model, *load_dense(Prepare(**params["prepare"])), {})})
    model = load_model(layout.model, torch.float32)
    architecture = replace(describe(model, heads="queries"), fingerprint=fingerprint(layout.model))

    def costs(layer: int, part: str) -> dict[str, Any]:
        return {"cost": np.full(architecture.units(part), cost.unit_parameters(architecture, layer, part))}

    write_architecture(layout, architecture)
    write_units(layout.weights, architecture, costs, {"model": architecture.fingerprint, "source": str(layout.model)})
    for stage in ("tokenize", "activations"):
        _run(stage, path, layout.root, work / f"{stage}.done")


def plan_of(architecture: Architecture, importance: np.ndarray, groups: int, heads: int, channels: int) -> Plan:
    """The lowest heads of each group go, then the lowest groups by what is left of them; the lowest channels."""
    keep = dict(Plan.dense(architecture).keep)
    for (layer, part), values in split_blocks(architecture, importance):
        shape = architecture.parts[part]
        if shape.outer:
            of_group = values.reshape(shape.groups, -1)
            highest = np.argsort(np.argsort(-of_group, axis=1), axis=1) < heads
            stay = np.argsort(np.argsort(-(of_group * highest).sum(1))) < groups
            keep[layer, part] = (highest & stay[:, None]).flatten()
        else:
            keep[layer, part] = np.argsort(np.argsort(values)) >= channels
    return Plan(keep)


def measure(bench: Bench, plan: Plan) -> dict[str, Any]:
    """The perplexity over the dense one's, and what is left of the parameters, the products and the cache."""
    fits = bench._fits(plan, Slice(repair="local"))
    with ExitStack() as stack:
        stack.enter_context(replaced(bench.model, new_parameters(fits)))
        stack.enter_context(masked(bench.model, bench.architecture, plan))
        change = estimate_ratio(bench.dense, bench._losses())
    left, dense = (cost.size(bench.architecture, one) for one in (plan, plan.dense(bench.architecture)))
    sizes = {name: getattr(left, name) / getattr(dense, name) for name in ("decoder", "macs", "cache")}
    return {"ratio": change.value, "ratio_se": change.error} | sizes


def table(rows: list[dict[str, Any]]) -> str:
    """One line a shape, the largest first."""
    header = ("groups × heads", "channels", "removed", "perplexity / dense", "log of it by removed per cent", "cache")
    body = []
    for row in sorted(rows, key=lambda row: -row["decoder"]):
        removed = 100 * (1 - row["decoder"])
        found = f"{row['ratio']:.3f} ± {row['ratio_se']:.3f}"
        body.append(
            (
                f"{row['groups']} × {row['heads']}",
                f"{1536 - row['channels']:,}",
                f"{removed:.2f} %",
                found,
                f"{np.log(row['ratio']) / removed:.4f}",
                f"{100 * row['cache']:.0f} %",
            )
        )
    return markdown_table(body, header)


def main(
    work: Path = Path("/tmp/queries"),
    text: Annotated[Path | None, typer.Option(help="Collect the activations on this text first.")] = None,
    windows: int = 16,
    sequences: int = 64,
    length: int = 256,
) -> None:
    """Measure all shapes."""
    if text is not None:
        collect(work, text, sequences, length)
    path = work / "queries.jsonl"
    rows = read_rows(path)
    done = {(row["groups"], row["heads"], row["channels"]) for row in rows}
    bench = Bench(work, windows, sequences=0, questions=0)
    scores, _ = score_layout(bench.layout, Score(criterion="fluctuation"))
    for shape in SHAPES:
        if shape not in done:
            found = measure(bench, plan_of(bench.architecture, scores["importance"], *shape))
            rows.append(dict(zip(("groups", "heads", "channels"), shape, strict=True)) | found)
            add_row(path, rows[-1])
            print(rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
