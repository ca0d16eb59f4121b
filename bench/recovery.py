"""What training by the dense model's predictions gives back, and what it gives back without pruning.

    python -m bench.recovery --text wiki.valid.raw --work /tmp/recovery "fast, 20 %, full"
    python -m bench.recovery --work /tmp/recovery --table

The first half of the text calibrates and is trained on (256 sequences of 256 tokens for the statistics, 64 of 512 for
repairs layer by layer; all of its windows of 256 tokens but the last 16, which are held out, for the training). Its
second half judges: `--windows` of 110 windows of 1024 tokens, at even distances. `--other` names a second text that
judges only. `--questions 0` asks no question, `--questions 300` the first 300 of each task in bench/tasks. Rows go to
WORK/rows.jsonl; those that are there are not measured again.
"""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from transformers import AutoTokenizer

from bench.rows import add_row, read_rows
from libprune.engine.plan import Plan
from libprune.models.compute import resolve_device, resolve_dtype
from libprune.models.folder import load_model
from libprune.models.sequences import Sequences
from libprune.models.tokens import read_tokens
from libprune.pipeline.artifacts import read_architecture, write_units
from libprune.pipeline.atomic import writing_folder
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Recover, Slice, Tokenize
from libprune.recovery.curve import Recovery
from libprune.recovery.recover import recover_layout
from libprune.recovery.teacher import teach_layout
from libprune.report.markdown import markdown_table
from libprune.results.perplexity import Losses, estimate_ratio, window_losses
from libprune.results.prune import prune
from libprune.results.tasks import zero_shot
from libprune.texts.chosen import calibration_source
from libprune.texts.source import open_text
from libprune.texts.windows import cut_windows, evenly

TASKS = ("piqa_file", "arc_easy_file")
COLLECTED: tuple[str, ...] = (
    "model",
    "architecture.json",
    "origin.json",
    "weights.parquet",
    "tokens",
    "gradients",
    "hessian",
    "activations",
)
COLLECTED += ("ablation.parquet", "scores.parquet")
COLLECTING = ("prepare", "tokenize", "gradients", "hessian", "activations", "ablation", "score")
CUTTING = ("sensitivity", "levels", "latency", "allocate", "slice")


@dataclass(frozen=True)
class Setting:
    """A pruned model, and how it is trained.

    Attributes:
        preset: preset of the pipeline; None for the dense model, of which nothing is removed.
        ratio: share of the decoder's parameters that is removed.
        recover: the params of the training.
        changes: sections of the params that differ from the preset's.
        cuts: equal cuts that remove the ratio together; an equal part of the tokens is trained on after each.
        draw: seed of the draw of the text that statistics and repairs read.
    """

    preset: str | None
    ratio: float
    recover: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    cuts: int = 1
    draw: int = 0


def _drawing(sequences: int) -> dict[str, dict[str, Any]]:
    """As many sequences of 512 tokens for repairs layer by layer."""
    return {"tokenize": {"repair_sequences": sequences}}


UNTRAINED = {"method": "none"}
EPOCHS = {"tokens": 122_880, "checks": 8}
PER_LAYER: dict[str, dict[str, Any]] = {"allocate": {"method": "functional"}}
IN_32: dict[str, dict[str, Any]] = {"allocate": {"method": "functional", "channel_multiple": 32}}
GLOBAL: dict[str, dict[str, Any]] = {"allocate": {"method": "global"}}
BLOCKS: dict[str, dict[str, Any]] = {"slice": {"repair": "block"}}
PRODUCERS: dict[str, dict[str, Any]] = {"slice": {"repair": "sequential", "producer_steps": 12}}
SETTINGS = {
    "fast, 20 %, full": Setting("fast", 0.2),
    "balanced, 20 %, full": Setting("balanced", 0.2),
    "fast, 20 %, lora": Setting("fast", 0.2, {"method": "lora"}),
    "fast, 35 %, full": Setting("fast", 0.35),
    "fast, 50 %, full": Setting("fast", 0.5),
    "balanced, 50 %, full": Setting("balanced", 0.5),
    "fast, 50 %, lora": Setting("fast", 0.5, {"method": "lora"}),
    "fast, 20 %, lora, learning rate 2e-3": Setting("fast", 0.2, {"method": "lora", "learning_rate": 2e-3}),
    "fast, 20 %, full, learning rate 5e-5": Setting("fast", 0.2, {"learning_rate": 5e-5}),
    "fast, 20 %, full, learning rate 2e-4": Setting("fast", 0.2, {"learning_rate": 2e-4}),
    "fast, 20 %, full, 123k tokens": Setting("fast", 0.2, EPOCHS),
    "balanced, 20 %, full, 123k tokens": Setting("balanced", 0.2, EPOCHS),
    "fast, 50 %, full, 123k tokens": Setting("fast", 0.5, EPOCHS),
    "balanced, 50 %, full, 123k tokens": Setting("balanced", 0.5, EPOCHS),
    "fast, 20 %, full, seed 1": Setting("fast", 0.2, {"seed": 1}),
    "fast, 20 %, full, seed 2": Setting("fast", 0.2, {"seed": 2}),
    "fast, 20 %, cross-entropy": Setting("fast", 0.2, {"cross_entropy": 1.0}),
    "fast, 20 %, half cross-entropy": Setting("fast", 0.2, {"cross_entropy": 0.5}),
    "fast, 20 %, hidden states": Setting("fast", 0.2, {"hidden_states": 1.0}),
    "fast, 20 %, top 64 predictions": Setting("fast", 0.2, {"top_k": 64}),
    "fast, 20 %, sequences of 1024": Setting("fast", 0.2, {"length": 1024, "held_out": 4}),
    "balanced, 20 %, sequences of 1024, 123k tokens": Setting(
        "balanced", 0.2, EPOCHS | {"length": 1024, "held_out": 4}
    ),
    "fast, 20 %, 512 tokens a step": Setting("fast", 0.2, {"batch_tokens": 512}),
    "dense, cross-entropy": Setting(None, 0.0, {"cross_entropy": 1.0}),
    "functional, local, 20 %, full": Setting("fast", 0.2, {}, PER_LAYER),
    "functional, local, 50 %, full": Setting("fast", 0.5, {}, PER_LAYER),
    "functional in multiples of 32, local, 20 %, full": Setting("fast", 0.2, {}, IN_32),
    "block, 20 %, full": Setting("fast", 0.2, {}, BLOCKS),
    "block, 50 %, full": Setting("fast", 0.5, {}, BLOCKS),
    "functional in multiples of 32, block, 20 %, full": Setting("fast", 0.2, {}, IN_32 | BLOCKS),
    "functional in multiples of 32, block, 20 %, full, seed 1": Setting("fast", 0.2, {"seed": 1}, IN_32 | BLOCKS),
    "functional in multiples of 32, block, 20 %, full, seed 2": Setting("fast", 0.2, {"seed": 2}, IN_32 | BLOCKS),
    "functional, block, 50 %, full": Setting("fast", 0.5, {}, PER_LAYER | BLOCKS),
    "producers, 20 %, full": Setting("fast", 0.2, {}, PRODUCERS),
    "functional, producers, 50 %, full": Setting("fast", 0.5, {}, PER_LAYER | PRODUCERS),
    "functional, producers, 50 %, full, seed 1": Setting("fast", 0.5, {"seed": 1}, PER_LAYER | PRODUCERS),
    "functional, producers, 50 %, full, seed 2": Setting("fast", 0.5, {"seed": 2}, PER_LAYER | PRODUCERS),
    "functional, producers of 65k tokens, 50 %, full": Setting("fast", 0.5, {}, PER_LAYER | PRODUCERS | _drawing(128)),
    "functional, producers of 110k tokens, 50 %, full": Setting("fast", 0.5, {}, PER_LAYER | PRODUCERS | _drawing(215)),
    "block of 16k tokens, 20 %, full": Setting("fast", 0.2, {}, BLOCKS | _drawing(32)),
    "block of 110k tokens, 20 %, full": Setting("fast", 0.2, {}, BLOCKS | _drawing(215)),
    "global, block, 20 %, full": Setting("fast", 0.2, {}, GLOBAL | BLOCKS),
    "global, block of 110k tokens, 20 %, full": Setting("fast", 0.2, {}, GLOBAL | BLOCKS | _drawing(215)),
    "functional in multiples of 32, block of 65k tokens, 20 %, full": Setting(
        "fast", 0.2, {}, IN_32 | BLOCKS | _drawing(128)
    ),
    "functional in multiples of 32, block of 110k tokens, 20 %, full": Setting(
        "fast", 0.2, {}, IN_32 | BLOCKS | _drawing(215)
    ),
    "functional, block of 110k tokens, 50 %, full": Setting("fast", 0.5, {}, PER_LAYER | BLOCKS | _drawing(215)),
    "functional in multiples of 32, block, 20 %, draw 1": Setting("fast", 0.2, UNTRAINED, IN_32 | BLOCKS, draw=1),
    "functional in multiples of 32, block, 20 %, draw 2": Setting("fast", 0.2, UNTRAINED, IN_32 | BLOCKS, draw=2),
    "functional, producers, 50 %, draw 1": Setting("fast", 0.5, UNTRAINED, PER_LAYER | PRODUCERS, draw=1),
    "functional, producers, 50 %, draw 2": Setting("fast", 0.5, UNTRAINED, PER_LAYER | PRODUCERS, draw=2),
    "wanda, local, 20 %, full": Setting("fast", 0.2, {}, {"score": {"criterion": "wanda"}}),
    "magnitude, local, 20 %, full": Setting("fast", 0.2, {}, {"score": {"criterion": "magnitude"}}),
    "random, local, 20 %, full": Setting("fast", 0.2, {}, {"score": {"criterion": "random"}}),
    "fast, 50 %, full, two cuts": Setting("fast", 0.5, cuts=2),
    "fast, 50 %, full, three cuts": Setting("fast", 0.5, cuts=3),
}


def run(stage: str, params: dict[str, Any], root: Path) -> None:
    """Run a stage on a layout, once."""
    done = root.parent / f"{root.name}.{stage}.done"
    if done.exists():
        return
    root.mkdir(parents=True, exist_ok=True)
    path = root.parent / f"{root.name}.yaml"
    path.write_text(yaml.safe_dump(params))
    command = [sys.executable, "-m", f"stages.{stage}", "--params", str(path), "--artifacts", str(root)]
    command += ["--metrics", str(root.parent / f"{root.name}.metrics")] if stage in ("allocate", "slice") else []
    subprocess.run(command, check=True)
    done.touch()


Text = str | list[dict[str, Any]]
"""A text as `tokenize.text` names it, or several with shares."""


def base_params(text: Text, draw: int = 0) -> dict[str, Any]:
    """The params of the repository with the bench's text, and a seed of its draw."""
    params: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text())
    params["tokenize"] |= {"text": text, "calibration_sequences": 256, "calibration_length": 256}
    params["tokenize"] |= {"evaluation_length": 1024, "evaluation_share": 0.5}
    params["tokenize"] |= {"evaluation_windows": 110 if isinstance(text, str) else 48}
    params["tokenize"] |= {"repair_sequences": 64, "repair_length": 512, "seed": draw}
    return params


def pruned_layout(work: Path, text: Text, setting: Setting) -> tuple[Layout, dict[str, Any]]:
    """The layout of a pruned model, and its params; each is made once."""
    drawn = f"-draw-{setting.draw}" if setting.draw else ""
    params, base = base_params(text, setting.draw), work / f"base{drawn}"
    for stage in COLLECTING:
        run(stage, params, base)
    changed = "-".join(str(value) for section in setting.changes.values() for value in section.values())
    root = work / f"{setting.preset or 'dense'}-{round(100 * setting.ratio)}{'-' + changed if changed else ''}{drawn}"
    root.mkdir(exist_ok=True)
    own = {"tokenize": "tokens", "score": "scores.parquet"}
    own = {stage: name for stage, name in own.items() if stage in setting.changes}
    for name in COLLECTED:
        if not (root / name).exists() and name not in own.values():
            (root / name).symlink_to((base / name).resolve())
    if setting.preset is None:
        _write_dense(Layout(root))
        return Layout(root), params
    params |= {"preset": setting.preset, "allocate": params["allocate"] | {"ratio": setting.ratio}}
    for section, changes in setting.changes.items():
        params[section] = params[section] | changes
    for stage in (*own, *CUTTING):
        run(stage, params, root)
    return Layout(root), params


def cut_again(work: Path, text: str, setting: Setting, recover: Recover) -> tuple[Layout, dict[str, Any]]:
    """The layout of the last of several cuts, and its params; the model was trained after each of the others."""
    model, ratio = work / "base" / "model", 1 - (1 - setting.ratio) ** (1 / setting.cuts)
    for number in range(1, setting.cuts + 1):
        params = base_params(text)
        params |= {"preset": setting.preset, "allocate": params["allocate"] | {"ratio": ratio}}
        params["prepare"] |= {"model": str(model.resolve())}
        root = work / f"{setting.preset}-{round(100 * setting.ratio)}-cut-{number}-of-{setting.cuts}"
        for stage in (*COLLECTING, *CUTTING):
            run(stage, params, root)
        layout = Layout(root)
        if number < setting.cuts and not layout.recovered.exists():
            train(layout, params, recover)
        model = layout.recovered
    return layout, params


def train(layout: Layout, params: dict[str, Any], recover: Recover) -> Recovery:
    """Train the pruned model of a layout."""
    teach_layout(layout, Compute(), recover, Tokenize(**params["tokenize"]))
    recovery = recover_layout(layout, Compute(), recover)
    assert recovery is not None
    return recovery


def _write_dense(layout: Layout) -> None:
    """A plan that removes nothing, and the folder that it leaves."""
    if layout.pruned.exists():
        return
    architecture = read_architecture(layout)
    plan = Plan.dense(architecture)
    meta = {"model": architecture.fingerprint, "shape": "uniform", "criterion": "none", "method": "none"}
    write_units(layout.plan, architecture, lambda *block: {"keep": plan.keep[block]}, meta)
    with writing_folder(layout.pruned) as folder:
        prune(layout, folder, Compute(), Slice(repair="none"))


class Judge:
    """Losses and answers of models; those of models that do not change are measured once."""

    def __init__(self, work: Path, layout: Layout, windows: int, other: str, questions: int) -> None:
        self._work, self._layout, self._questions = work, layout, questions
        self._device = resolve_device("auto")
        self._dtype = resolve_dtype("auto", self._device)
        architecture = read_architecture(layout)
        stored, _ = read_tokens(layout.evaluation_tokens, architecture.fingerprint)
        self._texts = {"own": stored[torch.from_numpy(evenly(len(stored), min(windows, len(stored))))]}
        if other:
            self._texts["other"] = self._windows_of(other, windows)
        self._known: dict[Path, dict[str, Any]] = {}

    def _windows_of(self, text: str, number: int) -> Sequences:
        documents = list(open_text(calibration_source(Tokenize(text=text))).documents())
        tokenizer = AutoTokenizer.from_pretrained(self._layout.model, local_files_only=True)
        cut = cut_windows(documents, tokenizer, 1024, "joined").ids
        return Sequences(torch.from_numpy(cut[evenly(len(cut), min(number, len(cut)))]))

    def measure(self, folder: Path, keep: bool) -> dict[str, Any]:
        """Losses of each window by text, and the accuracy of each task."""
        if folder in self._known:
            return self._known[folder]
        model = load_model(folder, self._dtype, trust_remote_code=True).to(self._device)
        found: dict[str, Any] = {
            name: window_losses(model, windows, 1024, folder.name) for name, windows in self._texts.items()
        }
        if self._questions:
            tokenizer = AutoTokenizer.from_pretrained(self._layout.model, local_files_only=True)
            tasks = str(Path(__file__).with_name("tasks"))
            found["tasks"] = zero_shot(model, tokenizer, TASKS, tasks, self._questions, 8)
        if keep:
            self._known[folder] = found
        return found

    def rows(self, folders: dict[str, Path]) -> dict[str, Any]:
        """The figures of the named models beside those of the dense model."""
        dense = self.measure(self._layout.model, True)
        figures: dict[str, Any] = {"windows": {name: len(windows) for name, windows in self._texts.items()}}
        for name, folder in folders.items():
            found = self.measure(folder, name == "before")
            figures[name] = {text: _ratio(dense[text], found[text]) for text in self._texts}
            if self._questions:
                figures[name]["tasks"] = found["tasks"]
        return figures | ({"tasks": dense["tasks"]} if self._questions else {})


def _ratio(dense: Losses, losses: Losses) -> dict[str, float]:
    found = estimate_ratio(dense, losses)
    return {"ratio": found.value, "se": found.error}


def measure(
    work: Path, text: str, name: str, tokens: int | None, judge_of: dict[str, Judge], **judging: Any
) -> dict[str, Any]:
    """One row: the model before and after training; `tokens` take the place of those of the setting."""
    setting, more = SETTINGS[name], {} if tokens is None else {"tokens": tokens}
    recover = Recover(**({"method": "full"} | setting.recover | more))
    dense, params = pruned_layout(work, text, Setting(None, 0.0))
    if setting.cuts == 1:
        source, params = pruned_layout(work, text, setting)
    else:
        part = recover.tokens // setting.cuts // recover.batch_tokens * recover.batch_tokens
        recover = recover.model_copy(update={"tokens": part, "teacher": str(dense.model.resolve())})
        source, params = cut_again(work, text, setting, recover)
    layout, folders, learned = Layout(work / "run" / "artifacts"), {"before": source.pruned}, {}
    if recover.method != "none":
        _link_to(source, layout)
        start = time.perf_counter()
        learned = train(layout, params, recover).metrics() | {"seconds": time.perf_counter() - start}
        folders["after"] = layout.recovered
    judge = judge_of.setdefault("judge", Judge(work, dense, **judging))
    return {"setting": name, "asked_tokens": tokens, **learned, **judge.rows(folders)}


def _link_to(source: Layout, layout: Layout) -> None:
    """A new layout with links to what a training reads of another."""
    shutil.rmtree(layout.root.parent, ignore_errors=True)
    (layout.root / "tokens").mkdir(parents=True)
    tokens_of = [f"tokens/{text}.parquet" for text in ("calibration", "repair", "evaluation")]
    for path in ("model", "architecture.json", "pruned", "plan.parquet", *tokens_of):
        (layout.root / path).symlink_to((source.root / path).resolve())


def table(rows: list[dict[str, Any]]) -> str:
    """One line a setting."""
    cells = []
    for row in rows:
        before, after = (
            [
                f"× {row[name][text]['ratio']:.3f} ± {row[name][text]['se']:.3f}" if name in row else ""
                for text in row["windows"]
            ]
            for name in ("before", "after")
        )
        pairs = [cell for pair in zip(before, after, strict=True) for cell in pair]
        training = ("", "", "")
        if "after" in row:
            held = f"{row['held_out_before']:.4f} → {row['held_out_after']:.4f}"
            training = (f"{row['tokens']:,}", f"{row['seconds']:.0f}", held)
        cells.append((row["setting"], *training, *pairs))
    texts = rows[0]["windows"] if rows else {}
    header = (
        "setting",
        "tokens",
        "s",
        "held out",
        *(f"{name}, {text}" for text in texts for name in ("before", "after")),
    )
    return markdown_table(cells, header)


def main(
    settings: Annotated[list[str] | None, typer.Argument(help="Names of SETTINGS; none: all.")] = None,
    work: Path = Path("/tmp/recovery"),
    text: Path | None = None,
    other: Annotated[str, typer.Option(help="Another text that judges, as tokenize.text names one.")] = "",
    windows: int = 24,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on, instead of those of the settings.")] = None,
    questions: int = 0,
    show: Annotated[bool, typer.Option("--table", help="Only print what was measured.")] = False,
) -> None:
    """Measure settings."""
    if questions and find_spec("lm_eval") is None:
        raise typer.BadParameter("--questions needs lm-evaluation-harness: pip install 'libprune[tasks]'")
    path = work / "rows.jsonl"
    rows = read_rows(path)
    if text is not None and not show:
        judges: dict[str, Judge] = {}
        done = {(row["setting"], row["asked_tokens"]) for row in rows}
        for name in settings or SETTINGS:
            if (name, tokens) not in done:
                judging = {"windows": windows, "other": other, "questions": questions}
                rows.append(measure(work, str(text.resolve()), name, tokens, judges, **judging))
                add_row(path, rows[-1])
                print(rows[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
