"""Selection, allocation and repair at equal removed parameters, with the peers' recipes as settings of this pipeline.

    python -m bench.least_loss --text wiki.valid.raw --work /tmp/least --ratio 0.5 "unit_fisher, uniform, sequential"
    python -m bench.least_loss --work /tmp/least --table

The first half of the text calibrates (256 sequences of 256 tokens; gradients on the first 128; levels and search on
the last 4; the sequential repair on `--sequences` of 1024 tokens, as long as it is judged on), its second half judges
(windows of 1024 at even distances). Each setting
is measured as the masked and repaired dense model; the tests prove that slicing equals that. `--questions 300` asks
the first 300 of each task in bench/tasks as well (files in the working folder), of the dense model too. Rows go to
WORK/rows.jsonl; those that are there are not measured again.
"""

import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from transformers import AutoTokenizer

from bench.rows import add_row, read_rows
from libprune.allocation.advice import fixed_scores
from libprune.allocation.block_worth import with_worth
from libprune.allocation.decide import decide
from libprune.allocation.evidence import read_evidence
from libprune.allocation.search import Search
from libprune.engine import cost
from libprune.engine.surgery import masked, oriented
from libprune.engine.tables import Columns
from libprune.models.compute import resolve_device, resolve_dtype
from libprune.models.folder import WeightFiles, load_model
from libprune.models.layers import replaced
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import Scores, read_architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.methods import REPAIRS
from libprune.pipeline.sections import Allocate, Compute, Levels, Score, Slice
from libprune.pipeline.shards import read_tensor
from libprune.pipeline.stage import peak_memory
from libprune.repair.least_squares import Fit, new_parameters
from libprune.report.markdown import markdown_table
from libprune.results.perplexity import estimate_perplexity, estimate_ratio, window_losses
from libprune.results.tasks import zero_shot
from libprune.scoring.score import score_layout
from libprune.statistics.unit_sums import sum_positions

LEVELS = Levels(sequences=4, number=6)
SEARCH = {"method": "search", "evaluations": 8}
TASKS = ("piqa_file", "arc_easy_file")
UNIFORM: dict[str, Any] = {"method": "uniform"}
PRODUCERS: dict[str, Any] = {"repair": "sequential", "producer_steps": 12}
Setting = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
SETTINGS: dict[str, Setting] = {
    "LLM-Pruner: taylor, global in layers 3 to 28, none": (
        {"criterion": "taylor"},
        {"method": "global", "freeze_first": 3, "freeze_last": 2},
        {"repair": "none"},
    ),
    "FLAP: fluctuation, z-scored as there, global, bias": (
        {"criterion": "flap"},
        {"method": "global"},
        {"repair": "bias"},
    ),
    "fluctuation, z-scored by unit, global, bias": (
        {"criterion": "fluctuation", "scaling": "zscore"},
        {"method": "global"},
        {"repair": "bias"},
    ),
    "OBC: obs, uniform in proportion, local": ({"criterion": "obs"}, UNIFORM, {"repair": "local"}),
    "obs_fisher, uniform, local": ({"criterion": "obs_fisher"}, UNIFORM, {"repair": "local"}),
    "fisher_obs, uniform, local": ({"criterion": "fisher_obs"}, UNIFORM, {"repair": "local"}),
    "unit_fisher, uniform, none": ({}, UNIFORM, {"repair": "none"}),
    "unit_fisher, uniform, local": ({}, UNIFORM, {"repair": "local"}),
    "unit_fisher, uniform, local, damping 0.001": ({}, UNIFORM, {"repair": "local", "damping": 1e-3}),
    "unit_fisher, uniform, local, half fisher": ({}, UNIFORM, {"repair": "local", "fisher_share": 0.5}),
    "unit_fisher, uniform, sequential, no drift": ({}, UNIFORM, {"repair": "sequential", "drift": 0.0}),
    "unit_fisher, uniform, sequential": ({}, UNIFORM, {"repair": "sequential"}),
    "unit_fisher, uniform, sequential with producers": ({}, UNIFORM, PRODUCERS),
    "unit_fisher, functional, local": ({}, {"method": "functional"}, {"repair": "local"}),
    "unit_fisher, functional, sequential with producers": ({}, {"method": "functional"}, PRODUCERS),
    "unit_fisher, global, sequential with producers": ({}, {"method": "global"}, PRODUCERS),
    "unit_fisher, global, local": ({}, {"method": "global"}, {"repair": "local"}),
    "unit_fisher, uniform by levels, local": ({}, {"method": "search", "shape": "uniform"}, {"repair": "local"}),
    "unit_fisher, uniform by levels, sequential": (
        {},
        {"method": "search", "shape": "uniform"},
        {"repair": "sequential"},
    ),
    "unit_fisher, uniform by levels, sequential with producers": (
        {},
        {"method": "search", "shape": "uniform"},
        PRODUCERS,
    ),
    "unit_fisher, levels, local": ({}, {"method": "search"}, {"repair": "local"}),
    "unit_fisher, levels, sequential": ({}, {"method": "search"}, {"repair": "sequential"}),
    "unit_fisher, levels, sequential with producers": ({}, {"method": "search"}, PRODUCERS),
    "obs_fisher, levels, local": ({"criterion": "obs_fisher"}, {"method": "search"}, {"repair": "local"}),
    "obs_fisher, levels, sequential": ({"criterion": "obs_fisher"}, {"method": "search"}, {"repair": "sequential"}),
    "unit_fisher, search, local": ({}, SEARCH, {"repair": "local"}),
    "unit_fisher, search, sequential": ({}, SEARCH, {"repair": "sequential"}),
}
"""By name what is set of the score, allocate and slice sections."""


def flap_scores(layout: Layout, params: Score) -> tuple[Columns, dict[str, Any]]:
    """`fluctuation` as FLAP standardises it (lib/prune.py, WIFV, AL-AM): before it averages over a head's columns.

    Those of attention are squared first. What `score.scaling: zscore` does comes after the sum over a unit.
    """
    table, meta = score_layout(layout, params.model_copy(update={"criterion": "fluctuation", "scaling": "zscore"}))
    architecture, weights, found = read_architecture(layout), WeightFiles(layout.model), []
    for layer, part in architecture.blocks():
        (consumer,) = architecture.consumers(layer, part)
        variance = read_tensor(layout.activations, layer, f"{consumer.module}.input_variance", "activations")
        columns = variance.double() * oriented(consumer, weights[consumer.weight]).double().square().sum(0)
        columns = columns.square() if part == "attention" else columns
        units = consumer.input.units(architecture.parts[part].axis, architecture.sizes)
        number = architecture.units(part)
        of_units = sum_positions((columns - columns.mean()) / columns.std(), units, number) * number / len(units)
        found.append(of_units.numpy())
    return table | {"importance": np.concatenate(found), "score": np.concatenate(found)}, meta


SCORERS = {"flap": flap_scores}
"""Criteria of this bench's own."""


@dataclass(frozen=True)
class Calibration:
    """How a text is divided: sequences of 256 tokens, of 1024 for the sequential repair, the criteria with levels."""

    sequences: int
    long: int
    levelled: tuple[str, ...]
    evaluation: dict[str, Any]


WIKI = Calibration(440, 108, ("unit_fisher", "obs_fisher"), {"evaluation_share": 0.5, "evaluation_windows": 110})
NEWS = Calibration(256, 64, (), {"evaluation_share": 0.1, "evaluation_windows": 2})


def collect(work: Path, text: str, calibration: Calibration) -> None:
    """Run the collecting stages that have not run yet, and the levels of some criteria."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["tokenize"] |= {"text": text, "calibration_sequences": calibration.sequences, "calibration_length": 256}
    params["tokenize"] |= {"evaluation_length": 1024} | calibration.evaluation
    params["activations"] |= {"sequences": 256}
    params["levels"] = LEVELS.model_dump()
    params["allocate"] |= {"method": "search"}
    work.mkdir(parents=True, exist_ok=True)
    path = work / "params.yaml"
    path.write_text(yaml.safe_dump(params))
    for stage in ("prepare", "tokenize", "gradients", "activations"):
        _run(stage, path, work / "artifacts", work / f"{stage}.done")
    for criterion in calibration.levelled:
        params["score"] |= {"criterion": criterion}
        path, root = work / f"params_{criterion}.yaml", levelled(work, criterion)
        path.write_text(yaml.safe_dump(params))
        _link(
            work / "artifacts", root, ("model", "architecture.json", "origin.json", "weights.parquet", "tokens", *SUMS)
        )
        for stage in ("score", "levels"):
            _run(stage, path, root, work / f"{stage}-{criterion}.done")
    params["tokenize"] |= {"calibration_sequences": calibration.long, "calibration_length": 1024}
    path = work / "params_long.yaml"
    path.write_text(yaml.safe_dump(params))
    _link(work / "artifacts", work / "long", ("model", "architecture.json"))
    _run("tokenize", path, work / "long", work / "long.done")


SUMS = ("gradients", "activations")


def levelled(work: Path, criterion: str) -> Path:
    """The artifacts with the levels in a criterion's order."""
    return work / f"levels-{criterion}"


def _link(owner: Path, other: Path, names: tuple[str, ...]) -> None:
    other.mkdir(exist_ok=True)
    for name in names:
        if not (other / name).exists():
            (other / name).symlink_to(owner.resolve() / name)


def _run(stage: str, params: Path, artifacts: Path, done: Path) -> None:
    if not done.exists():
        command = [sys.executable, "-m", f"stages.{stage}", "--params", str(params), "--artifacts", str(artifacts)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(said, flush=True)
        done.write_text(said)


class Bench:
    """The dense model and its statistics; `scored` holds those that the scores are made of."""

    def __init__(
        self,
        work: Path,
        windows: int,
        sequences: int,
        questions: int,
        tasks: tuple[str, ...] = TASKS,
        root: Path | None = None,
        judged: Path | None = None,
    ) -> None:
        self.work = work
        self.layout, self.long, self.compute = Layout(root or work / "artifacts"), Layout(work / "long"), Compute()
        self.scored, self._tables = self.layout, {}
        self.sequences, self.questions, self.tasks = sequences, questions, tasks
        self.architecture = read_architecture(self.layout)
        device = resolve_device("auto")
        self.model = load_model(self.layout.model, resolve_dtype("auto", device)).to(device)
        judged_by = Layout(judged or self.layout.root).evaluation_tokens
        found, _ = read_tokens(judged_by, self.architecture.fingerprint)
        self.windows = found[torch.linspace(0, len(found) - 1, min(windows, len(found))).round().long()]
        self.dense, self.dense_tasks = self._losses(), self._tasks()

    def _losses(self):
        return window_losses(self.model, self.windows, self.compute.batch_tokens, "evaluate")

    def _tasks(self) -> dict[str, Any]:
        if not self.questions:
            return {}
        tokenizer = AutoTokenizer.from_pretrained(self.layout.model, local_files_only=True)
        folder = str(Path(__file__).with_name("tasks"))
        return zero_shot(self.model, tokenizer, self.tasks, folder, self.questions, 8)

    def measure(self, name: str, ratio: float, setting: Setting) -> dict[str, Any]:
        """One row."""
        score, allocate, repair = setting
        single = {"ratio": ratio, "channel_multiple": 1}  # equal shares
        sections = Score(**score), Allocate(**single | allocate), Slice(**repair)
        start = time.perf_counter()
        plan, info = self.plan(*sections[:2])
        planned = time.perf_counter()
        fits = self._fits(plan, sections[2])
        repaired = time.perf_counter()
        with ExitStack() as stack:
            stack.enter_context(replaced(self.model, new_parameters(fit for fit in fits if fit.bias is None)))
            stack.enter_context(masked(self.model, self.architecture, plan))
            for fit in fits:
                if fit.bias is not None:
                    hook = self.model.get_submodule(fit.consumer.module).register_forward_hook(_adding(fit.bias))
                    stack.callback(hook.remove)
            losses, tasks = self._losses(), self._tasks()
        found, change = estimate_perplexity(losses), estimate_ratio(self.dense, losses)
        return {
            "setting": name,
            "ratio_asked": ratio,
            "removed": 1 - cost.size(self.architecture, plan).decoder / self.architecture.decoder_parameters,
            "dense": estimate_perplexity(self.dense).value,
            "perplexity": found.value,
            "perplexity_se": found.error,
            "ratio": change.value,
            "ratio_se": change.error,
            "plan_seconds": planned - start,
            "repair_seconds": repaired - planned,
            "peak_memory_bytes": peak_memory(),
            "windows": len(self.windows),
            "tasks": {"dense": self.dense_tasks, "pruned": tasks} if tasks else {},
            "sequences": self.sequences if sections[2].repair == "sequential" else None,
            "kept": [[plan.kept(layer, part) for part in self.architecture.parts] for layer in range(len(plan.layers))],
        } | info

    def scores(self, score: Score):
        """The importance table and its metadata; each is made once."""
        key = f"{self.scored.root} {score.model_dump_json()}"
        if key not in self._tables:
            self._tables[key] = SCORERS.get(score.criterion, score_layout)(self.scored, score)
        return self._tables[key]

    def plan(self, score: Score, allocate: Allocate):
        """The plan of these params, and what else came out."""
        fixed = fixed_scores(self.scored, Scores(self.architecture, *self.scores(score)), allocate)
        measured = Layout(levelled(self.work, score.criterion)) if allocate.method == "search" else self.scored
        evidence = read_evidence(measured, fixed.scores, allocate)
        scores = with_worth(fixed.scores, allocate, evidence)
        search = Search(self.layout, scores, self.compute, LEVELS, evidence) if allocate.evaluations else None
        plan = decide(scores, allocate, evidence, search).plan
        found = search.refined if search else None
        info = {"gradient_ratios": [fixed.ratio, fixed.ratio_after]}
        return plan, info | ({"divergence": {**found.starts, "best": found.divergence}} if found else {})

    def _fits(self, plan, section: Slice) -> list[Fit]:
        if section.repair == "sequential":
            section = section.model_copy(update={"sequences": self.sequences})
            return REPAIRS["sequential"].repair(self.long, self.architecture, plan, self.compute, section)
        return REPAIRS[section.repair].repair(self.layout, self.architecture, plan, self.compute, section)


def _adding(bias):
    return lambda module, args, output: output + bias.to(output.device, output.dtype)


def table(rows: list[dict[str, Any]]) -> str:
    """One line a setting, one column a ratio."""
    ratios = sorted({row["ratio_asked"] for row in rows})
    cells: dict[str, dict[float, str]] = {}
    for row in rows:
        seconds = f"{row['plan_seconds']:.0f} + {row['repair_seconds']:.0f}"
        name = row["setting"] + (f", {row['sequences']} × 1024" if row.get("sequences") else "")
        text = f"{row['perplexity']:,.2f} (× {row['ratio']:.3f} ± {row['ratio_se']:.3f}) {seconds} s"
        cells.setdefault(name, {})[row["ratio_asked"]] = text
    header = ("setting", *(f"{100 * ratio:.0f} %" for ratio in ratios))
    return markdown_table([(name, *(found.get(r, "") for r in ratios)) for name, found in cells.items()], header)


def main(
    settings: Annotated[list[str] | None, typer.Argument(help="Names of SETTINGS; none: all.")] = None,
    work: Path = Path("/tmp/least"),
    text: Path | None = None,
    ratio: list[float] = [0.2, 0.5],  # noqa: B006
    windows: int = 24,
    sequences: int = 32,
    questions: int = 0,
    root: Annotated[Path | None, typer.Option(help="Other statistics than --text collects, without levels.")] = None,
    news: Annotated[bool, typer.Option(help="Calibrate on the demo's news text; the same windows judge.")] = False,
    show: Annotated[bool, typer.Option("--table", help="Only print what was measured.")] = False,
) -> None:
    """Measure settings."""
    judged = work / "artifacts"
    if text is not None:
        collect(work, str(text.resolve()), WIKI)
    if news:
        work = work / "news"
        collect(work, yaml.safe_load(Path("params.yaml").read_text())["tokenize"]["text"], NEWS)
    path = work / "rows.jsonl"
    rows = read_rows(path)
    if not show:
        bench = Bench(work, windows, sequences, questions, root=root, judged=judged)
        done = {(row["setting"], row["ratio_asked"]) for row in rows if row.get("sequences") in (None, sequences)}
        for share in ratio:
            for name in settings or SETTINGS:
                if (name, share) not in done:
                    rows.append(bench.measure(name, share, SETTINGS[name]))
                    add_row(path, rows[-1])
                    print({key: value for key, value in rows[-1].items() if key != "kept"}, flush=True)
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
