"""Second views of a unit's worth, beside all criteria, against the measured loss increase of masking single units.

    python -m bench.second_views --work DIR

DIR/artifacts holds what the collecting stages have made, with `ablation.units` not 0. The views:

* `K-FAC, consumer`: 1/2 sum over a part's consumers of tr(W_u^T G W_u C_uu), the loss of zeroing the unit's columns
  of W where the Hessian of W is the Kronecker product of C = E[x x^T] at its input and G = E[d d^T], d the gradient
  at its output (Martens & Grosse 2015): G whole with `gradients.second_moments: full`, else its diagonal. `obs_fisher`
  is the same with a refit of the others in between.
* `K-FAC, diagonal, all maps`: 1/2 sum over all maps of W_ij^2 E[d_i^2] E[x_j^2] over the unit's own weights.
* `mutual information with the loss`: of a unit's activation (x of a channel, |x| of an attention group's many) and the
  token's loss in nats, both in 8 bins of equal counts, less the bias (8 - 1)^2 / 2N of independent ones (Miller 1955).
* `mutual information with the next token`: the same with the 31 most frequent next tokens and one bin for the rest.

For each row Spearman's rank correlation with the measured increase within each part, with a 95 % interval over
resampled units, and the seconds that its values took from what was cached.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from bench.truth import interval, rows_of, spearman
from libprune.collection.calibration import Calibration, set_up
from libprune.engine.architecture import Architecture, Map
from libprune.engine.errors import LibpruneError
from libprune.engine.surgery import hooked, oriented
from libprune.engine.tables import Columns
from libprune.models.folder import WeightFiles
from libprune.pipeline.artifacts import read_architecture, read_table
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Score
from libprune.pipeline.shards import GRAM, read_tensor
from libprune.report.markdown import markdown_table
from libprune.scoring.criteria import CRITERIA, join_tables, score_units
from libprune.statistics.unit_sums import sum_positions, unit_sums

Values = NDArray[np.float64]
BINS, TOKENS = 8, 31


def kfac_consumer(layout: Layout, architecture: Architecture) -> Values:
    """1/2 tr(W_u^T G W_u C_uu) of every unit, summed over its consumers."""
    weights, blocks = WeightFiles(layout.model), []
    for layer, part in architecture.blocks():
        count = architecture.units(part)
        total = torch.zeros(count, dtype=torch.float64)
        for entry in architecture.consumers(layer, part):
            w = oriented(entry, weights[entry.weight]).double()
            units = entry.input.units(architecture.parts[part].axis, architecture.sizes)
            positions = torch.from_numpy(np.argsort(units, kind="stable")).view(count, -1)
            gram = read_tensor(layout.activations, layer, entry.module + GRAM, "activations")
            own = gram[positions[:, :, None], positions[:, None, :]].double()
            columns, weighed = (t[:, positions].movedim(0, -1) for t in (w, _by_gradients(layout, entry, w)))
            total += ((columns @ weighed.mT) * own).sum((1, 2)) / 2
        blocks.append(total.numpy())
    return np.concatenate(blocks)


def _by_gradients(layout: Layout, entry: Map, w: Tensor) -> Tensor:
    """G W, by the whole G if it was collected."""
    try:
        whole = read_tensor(layout.gradients, entry.layer, f"{entry.module}.output_gradient_gram", "gradients")
    except LibpruneError:
        name = f"{entry.module}.output_gradient_square"
        return read_tensor(layout.gradients, entry.layer, name, "gradients").double()[:, None] * w
    return whole.double() @ w


def kfac_diagonal(layout: Layout, architecture: Architecture) -> Values:
    """1/2 sum of W_ij^2 E[d_i^2] E[x_j^2] over every unit's own weights."""
    weights, blocks = WeightFiles(layout.model), []
    for layer, part in architecture.blocks():
        terms = {}
        for entry in architecture.maps_of(layer, part):
            norm, tokens = (
                read_tensor(layout.activations, layer, f"{entry.module}.input_{name}", "activations").double()
                for name in ("norm_l2", "tokens")
            )
            square = f"{entry.module}.output_gradient_square"
            outer = torch.outer(read_tensor(layout.gradients, layer, square, "gradients").double(), norm**2 / tokens)
            terms[entry.weight] = weights[entry.weight].double().square() * (outer.T if entry.transposed else outer) / 2
        blocks.append(unit_sums(architecture, layer, part, terms, only=terms))
    return np.concatenate(blocks)


def watch(run: Calibration, measured: Columns) -> tuple[Values, Values, NDArray[np.int64]]:
    """The measured units' activations, ``[units, tokens]``, with each token's loss in nats and the next token."""
    rows = _rows_by_consumer(run.architecture, measured)
    seen: dict[int, list[Tensor]] = {}

    def keep(entry: Map, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(*run_shape, -1)[:, :-1].flatten(0, 1).float()
        units = entry.input.units(run.architecture.parts[entry.part].axis, run.architecture.sizes)
        count = run.architecture.units(entry.part)
        values = x if count == len(units) else sum_positions(x.square(), units, count).sqrt()
        for row, unit in rows[entry.module]:
            seen.setdefault(row, []).append(values[:, unit].cpu())

    losses, following = [], []
    with hooked(run.model) as handles, torch.no_grad():
        for entry in run.architecture.maps:
            if entry.module in rows:
                module = run.model.get_submodule(entry.module)
                handles.append(module.register_forward_pre_hook(lambda _, args, entry=entry: keep(entry, args)))
        for batch in run.sequences.to(run.device).passes(run.at_once):
            ids = batch.ids
            run_shape = ids.shape
            logits = run.model(input_ids=ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
            following.append(ids[:, 1:].flatten())
            losses.append(torch.nn.functional.cross_entropy(logits, following[-1], reduction="none"))
    activations = torch.stack([torch.cat(seen[row]) for row in range(len(measured["group_idx"]))])
    return activations.double().numpy(), torch.cat(losses).double().cpu().numpy(), torch.cat(following).cpu().numpy()


def _rows_by_consumer(architecture: Architecture, measured: Columns) -> dict[str, list[tuple[int, int]]]:
    """For the first consumer of each part the rows of the table that it serves, and their units."""
    rows: dict[str, list[tuple[int, int]]] = {}
    keys = zip(*(measured[key].tolist() for key in ("layer_idx", "group_type", "group_idx")), strict=True)
    for row, (layer, part, unit) in enumerate(keys):
        rows.setdefault(architecture.consumers(layer, part)[0].module, []).append((row, unit))
    return rows


def equal_bins(values: Values) -> NDArray[np.int64]:
    """The bin of each value, among bins of equal counts; equal values share one."""
    edges = np.unique(np.quantile(values, np.arange(1, BINS) / BINS))
    return np.searchsorted(edges, values, side="right")


def frequent(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rank of each token among the most frequent, and one number for all others."""
    found, inverse, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    rank = np.empty(len(found), dtype=np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(found))
    return rank[inverse].clip(max=TOKENS)


def mutual_information(one: NDArray[np.int64], two: NDArray[np.int64]) -> float:
    """In nats, from the table of counts, less what independent variables would show on average."""
    table = np.zeros((one.max() + 1, two.max() + 1))
    np.add.at(table, (one, two), 1)
    joint = table / len(one)
    independent = np.outer(joint.sum(1), joint.sum(0))
    some = joint > 0
    bias = (np.count_nonzero(joint.sum(1)) - 1) * (np.count_nonzero(joint.sum(0)) - 1) / (2 * len(one))
    return float((joint[some] * np.log(joint[some] / independent[some])).sum() - bias)


def views(layout: Layout, measured: Columns, sequences: int) -> Iterator[tuple[str, Callable[[], Values]]]:
    """Name and values of each row, of the measured units."""
    architecture = read_architecture(layout)
    rows = rows_of(read_table(layout.weights, "prepare")[0], measured)
    for name, criterion in CRITERIA.items():
        params = Score(criterion=name)

        def scored(criterion=criterion, params=params) -> Values:
            return score_units(join_tables(layout, criterion, params)[0], params)["importance"][rows]

        yield f"`{name}`", scored
    yield "K-FAC, consumer", lambda: kfac_consumer(layout, architecture)[rows]
    yield "K-FAC, diagonal, all maps", lambda: kfac_diagonal(layout, architecture)[rows]

    def information(of_loss: bool) -> Values:
        activations, losses, following = watch(set_up(layout, Compute(), sequences), measured)
        other = equal_bins(losses) if of_loss else frequent(following)
        return np.array([mutual_information(equal_bins(one), other) for one in activations])

    yield "mutual information with the loss", lambda: information(of_loss=True)
    yield "mutual information with the next token", lambda: information(of_loss=False)


def main(
    work: Annotated[Path, typer.Option(help="A project with its artifacts.")] = Path(),
    sequences: Annotated[int, typer.Option(help="Calibration sequences of the mutual information.")] = 64,
) -> None:
    """Print the table."""
    layout = Layout(work / "artifacts")
    measured, meta = read_table(layout.ablation, "ablation")
    if not len(measured["group_idx"]):
        raise SystemExit(f"{layout.ablation} has no units; set ablation.units and run `dvc repro ablation`")
    parts = {part: measured["group_type"] == part for part in dict.fromkeys(measured["group_type"])}
    counts = ", ".join(f"{here.sum()} of {part}" for part, here in parts.items())
    print(f"measured units: {counts}, on {meta['sequences']} x {meta['length']} tokens\n")
    lines = []
    for name, values_of in views(layout, measured, sequences):
        start = time.perf_counter()
        try:
            values = values_of()
        except LibpruneError as error:
            lines.append((name, *["not to be had"] * len(parts), str(error)))
            continue
        seconds = time.perf_counter() - start
        cells = []
        for here in parts.values():
            found, truth = values[here], measured["loss_increase"][here]
            cells.append(interval(lambda i, p=found, m=truth: spearman(p[i], m[i]), len(found)))
        lines.append((name, *cells, f"{seconds:.1f}"))
    print(markdown_table(lines, ("criterion", *parts, "seconds")))


if __name__ == "__main__":
    typer.run(main)
