"""How seconds and bytes of each stage grow with the model: shapes of three sizes with random weights.

    python -m bench.scaling WORK
    python -m bench.scaling WORK --table

Each stage is a process of its own, with one thread, as DVC starts it. Counted are its CPU seconds, less those of a
process that only imports what the stage imports; its peak memory; and the bytes that it writes. CPU seconds hardly
depend on what else the machine does. The text is short, and equally long for all sizes: calibration 4 sequences of 128
tokens, evaluation 2 windows of 128. The repair has a fixed damping, which solves one system for each map.

The exponent of a column is the slope of a straight line through the logarithms, against the parameters of all layers.
Beside it stand the slopes from each size to the next, which differ where the line bends. Rows go to WORK/rows.jsonl;
those that are there are not measured again.
"""

import os
import subprocess
import sys
from math import log
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.gpu import write_words
from bench.rows import add_row, read_rows
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.layout import Layout
from libprune.report.markdown import markdown_table

ROOT = Path(__file__).parents[1]
SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 49_152),
    "0.5B": (896, 4864, 24, 14, 2, 151_936),
    "1B": (2048, 8192, 16, 32, 8, 128_256),
}
"""By name the sizes of Llamas: hidden, channels, layers, heads, groups, tokens: as SmolLM2, Qwen2.5, Llama 3.2."""
_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
STAGES = ("prepare", "tokenize", "gradients", "activations", "score", "allocate", "slice", "recover", "evaluate")
_WRITES = {
    "prepare": "model",
    "tokenize": "tokens",
    "gradients": "gradients",
    "activations": "activations",
    "score": "scores.parquet",
    "allocate": "plan.parquet",
    "slice": "pruned",
    "recover": "recovered",
    "evaluate": "evaluation.json",
}
IMPORTS = "import libprune.statistics.gradients, libprune.results.evaluate"
_SETTINGS: dict[str, dict[str, Any]] = {
    "tokenize": {"calibration_sequences": 4, "calibration_length": 128}
    | {"evaluation_windows": 2, "evaluation_length": 128},
    "compute": {"device": "cpu", "batch_tokens": 512, "dtype": "bfloat16"},
    "gradients": {"sequences": 4, "batch_sequences": 4},
    "allocate": {"method": "uniform"},
    "slice": {"repair": "local", "damping": 1e-3},
    "recover": {"method": "none"},
    "evaluate": {"prompt_tokens": 64, "decode_tokens": 8, "rounds": 1, "continuations": 0},
}


def write_project(folder: Path, name: str) -> None:
    """A model with random weights in bfloat16, a text, and params."""
    *sizes, vocab = SHAPES[name]
    torch.manual_seed(0)
    more = {"vocab_size": vocab, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1}
    config = LlamaConfig(**dict(zip(_KEYS, sizes, strict=True)), **more, pad_token_id=1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    write_words(folder, 8 * 1024)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, values in _SETTINGS.items():
        params[section] |= values
    params["prepare"]["model"], params["tokenize"]["text"] = str(folder / "model"), str(folder / "text.txt")
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def run(folder: Path, command: list[str]) -> tuple[float, int]:
    """CPU seconds of a process with one thread, and the most bytes that it or one that it starts holds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log.txt").open("a") as log_file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=log_file, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} has failed; see {folder / 'log.txt'}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def written(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def measure(work: Path, name: str) -> None:
    """The rows of a size that are not there yet."""
    known = {(row["model"], row["stage"]) for row in read_rows(work / "rows.jsonl")}
    folder = work / name
    if not (folder / "params.yaml").exists():
        words = "import sys, pathlib, bench.scaling as s; s.write_project(pathlib.Path(sys.argv[1]), sys.argv[2])"
        folder.mkdir(parents=True)
        run(folder, ["-c", words, str(folder), name])  # a process that had held the model would hand its peak on
    for stage in ("imports", *STAGES):
        if (name, stage) in known:
            continue
        command = ["-c", IMPORTS] if stage == "imports" else ["-m", f"stages.{stage}"]
        seconds, peak = run(folder, command)
        layers = 0 if stage == "imports" else read_architecture(Layout(folder / "artifacts")).decoder_parameters
        size = written(folder / "artifacts" / _WRITES[stage]) if stage in _WRITES else 0
        row = {"model": name, "stage": stage, "seconds": seconds, "peak": peak, "written": size, "layers": layers}
        add_row(work / "rows.jsonl", row)
        print(row, flush=True)


def exponents(sizes: list[float], values: list[float]) -> str:
    """The slope of the logarithms, and in brackets from each size to the next."""
    if len(sizes) < 2 or min(values) <= 0:
        return ""
    x, y = [log(size) for size in sizes], [log(value) for value in values]
    steps = ", ".join(f"{step:.2f}" for step in np.diff(y) / np.diff(x))
    return f"{np.polyfit(x, y, 1)[0]:.2f} ({steps})"


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each stage: CPU seconds, peak and written bytes of the measured sizes, each with its exponents."""
    found = {(row["model"], row["stage"]): row for row in rows}
    names = [name for name in SHAPES if any(model == name for model, _ in found)]
    lines = []
    for stage in STAGES:
        own = {name: found[name, stage] for name in names if (name, stage) in found}
        layers = [row["layers"] for row in own.values()]
        starts = {name: found[name, "imports"]["seconds"] for name in own}
        columns = [{name: max(row["seconds"] - starts[name], 0.0) for name, row in own.items()}]
        columns += [{name: row[key] / 1e9 for name, row in own.items()} for key in ("peak", "written")]
        cells = list[str]()
        for values in columns:
            cells += [", ".join(f"{values[name]:.3g}" if name in values else "-" for name in names)]
            cells += [exponents(layers, list(values.values()))]
        lines.append((stage, *cells))
    head = ("CPU seconds", "exponent", "peak, GB", "exponent", "written, GB", "exponent")
    return markdown_table(lines, (f"stage; {', '.join(names)}", *head))


def main(
    work: Annotated[Path, typer.Argument(help="A folder; 1B takes some 12 GB of memory and 15 GB of disk.")],
    sizes: Annotated[str, typer.Option(help="By comma: " + ", ".join(SHAPES))] = ",".join(SHAPES),
    show: Annotated[bool, typer.Option("--table", help="Only print what was measured.")] = False,
) -> None:
    """Measure, and print the table."""
    for name in [] if show else sizes.split(","):
        measure(work, name)
    print(table(read_rows(work / "rows.jsonl")))


if __name__ == "__main__":
    typer.run(main)
