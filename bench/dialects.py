"""Whether transformers 4 computes what transformers 5 does from the folders that libprune writes.

    python -m venv older && older/bin/pip install torch==2.13.0 transformers==4.57.6
    python -m bench.dialects older/bin/python

Tiny random models of every family and of every kind of rotary positions are pruned, uniform and per layer, and loaded
by both environments, in float32. A table says by how much their logits and greedy tokens differ, or how one refuses.
The rows `dense` are of the folder that transformers 5 itself writes of the dense model, for comparison. Attention is
eager in both, since the default of version 4 leaves out Gemma 2's soft cap.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
)

from libprune.report.markdown import markdown_table
from tests.support import tiny
from tests.support.models import FAMILIES, FFN, heads, prune, random_plan, tiny_model, tokens, write_dense

HEADER = ("model", "folder", "largest logit", "largest difference", "same greedy tokens", "token ids and chat")
PROGRAM = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
given, *folders = sys.argv[1:]
transformers.logging.set_verbosity_error()
for line in folders:
    folder, loader, remote = line.split("|")
    out = {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)
        out["tokens"] = [tokenizer("the old cat sees<eos>a<extra>bird").input_ids, chat, tokenizer.eos_token]
    except Exception as error:
        out["tokens"] = f"{type(error).__name__}: {error}"
    try:
        kind = getattr(transformers, loader)
        own = {"trust_remote_code": remote == "remote", "attn_implementation": "eager"}
        model = kind.from_pretrained(folder, **own).float().eval()
        ids = load_file(given)["ids"]
        with torch.no_grad():
            result = {"logits": model(input_ids=ids).logits}
        if loader == "AutoModelForCausalLM":
            result["text"] = model.generate(ids[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)
        save_file(result, folder + "/result.safetensors")
    except Exception as error:
        out["error"] = f"{type(error).__name__}: " + " ".join(str(error).replace(folder, "FOLDER").split())
    print(chr(10) + "@" + json.dumps(out), flush=True)  # behind what transformers asks for remote code
"""


def rope(kind: str, theta: float = 5e4, **further: object) -> dict[str, object]:
    """The value of `rope_parameters` for a kind of rotary positions."""
    return {"rope_type": kind, "rope_theta": theta, **further}


LONG = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0], "original_max_position_embeddings": 8}
SHAPE = {**FFN, **heads(36, 3, 2)}
LINEAR = rope("linear", factor=4.0)
KINDS: dict[str, Callable[[int], PreTrainedModel]] = {
    "llama, theta": tiny_model(LlamaConfig, **SHAPE, rope_parameters=rope("default")),
    "llama, linear": tiny_model(LlamaConfig, **SHAPE, rope_parameters=LINEAR),
    "llama, dynamic": tiny_model(
        LlamaConfig, **SHAPE, rope_parameters=rope("dynamic", factor=4.0), max_position_embeddings=8
    ),
    "llama, yarn": tiny_model(
        LlamaConfig,
        **SHAPE,
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=8),
        max_position_embeddings=32,
    ),
    "llama, longrope": tiny_model(
        LlamaConfig, **SHAPE, rope_parameters=rope("longrope", **LONG), max_position_embeddings=64
    ),
    "qwen3, yarn": tiny_model(
        Qwen3Config,
        **FFN,
        **heads(26, 3, 3, 8),
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=8),
        max_position_embeddings=32,
    ),
    "phi3, theta, share": tiny_model(
        Phi3Config, **FFN, **heads(48, 3, 2), rope_parameters=rope("default", partial_rotary_factor=0.5)
    ),
    "phi3, longrope": tiny_model(
        Phi3Config,
        **SHAPE,
        rope_parameters=rope("longrope", **LONG),
        original_max_position_embeddings=8,
        max_position_embeddings=64,
    ),
    "phi3, longrope with a factor": tiny_model(
        Phi3Config,
        **SHAPE,
        rope_parameters=rope("longrope", **LONG, factor=3.0),
        original_max_position_embeddings=8,
        max_position_embeddings=64,
    ),
    "gemma3, full linear": tiny_model(
        Gemma3TextConfig,
        **FFN,
        **heads(24, 4, 2, 6),
        sliding_window=5,
        sliding_window_pattern=2,
        rope_parameters={"full_attention": LINEAR, "sliding_attention": rope("default", 5e3)},
    ),
    "gemma3, both linear": tiny_model(
        Gemma3TextConfig,
        **FFN,
        **heads(24, 4, 2, 6),
        sliding_window=5,
        sliding_window_pattern=2,
        rope_parameters={"full_attention": LINEAR, "sliding_attention": rope("linear", 5e3, factor=2.0)},
    ),
    "gpt_neox, theta, share, dynamic": tiny_model(
        GPTNeoXConfig,
        **FFN,
        hidden_size=24,
        num_attention_heads=3,
        rope_parameters=rope("dynamic", factor=4.0, partial_rotary_factor=0.5),
        max_position_embeddings=8,
    ),
    "olmo2, linear": tiny_model(Olmo2Config, **SHAPE, rope_parameters=LINEAR),
    "olmo2, yarn": tiny_model(
        Olmo2Config,
        **SHAPE,
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=8),
        max_position_embeddings=32,
    ),
}
"""Rotary positions that no default of a config class can hide."""


def write(name: str, make: Callable[[int], PreTrainedModel], root: Path) -> list[tuple[str, str, Path, str]]:
    """The dense folder of a model, and the pruned ones: name, kind, folder, and the class that loads it."""
    source = root / "dense"
    tiny.write_model(source)
    (source / "model.safetensors").unlink()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"extra_special_tokens": ["<extra>"]}))
    dense = write_dense(make(0), source)
    loader = {
        "causal_lm": "AutoModelForCausalLM",
        "masked_lm": "AutoModelForMaskedLM",
        "sequence_classification": "AutoModelForSequenceClassification",
    }[dense.architecture.head]
    rows = [(name, "dense", source, f"{loader}|stock")]
    for kind, remote in (("uniform", "stock"), ("per_layer", "remote"), ("per_layer", "stock")):
        folder = root / f"{kind}-{remote}"
        folder.mkdir()
        prune(dense, random_plan(dense.architecture, kind), kind != "uniform", folder)
        rows.append((name, kind if remote == "stock" else f"{kind}, its code trusted", folder, f"{loader}|{remote}"))
    return rows


def run(python: str, rows: list[tuple[str, str, Path, str]], given: Path) -> list[dict]:
    """What an environment computes of the folders, in one process."""
    lines = [f"{folder}|{how}" for _, _, folder, how in rows]
    done = subprocess.run(
        [python, "-c", PROGRAM, str(given), *lines],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    found = []
    said = [line.removeprefix("@") for line in done.stdout.splitlines() if line.startswith("@")]
    for line, (_, _, folder, _) in zip(said, rows, strict=True):
        result = folder / "result.safetensors"
        found.append(json.loads(line) | ({"tensors": load_file(result)} if result.exists() else {}))
        result.unlink(missing_ok=True)
    return found


def compare(row: tuple[str, str, Path, str], newer: dict, older: dict) -> tuple[str, ...]:
    """One line of the table."""
    alike = "the same" if newer["tokens"] == older["tokens"] else f"{newer['tokens']}; {older['tokens']}"[:110]
    if "tensors" not in older or "tensors" not in newer:
        both = [f"{name}: {one['error'][:150]}" for name, one in (("5", newer), ("4", older)) if "error" in one]
        return (*row[:2], "", "; ".join(both), "", alike)
    new, old = newer["tensors"], older["tensors"]
    difference = float((new["logits"] - old["logits"]).abs().max())
    same = str(bool(torch.equal(new["text"], old["text"]))).lower() if "text" in new else ""
    return (*row[:2], f"{float(new['logits'].abs().max()):.2f}", f"{difference:.1e}", same, alike)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(scratch, "given.safetensors")
        save_file({"ids": tokens()}, given)
        rows = [
            row
            for name, make in {**FAMILIES, **KINDS}.items()
            for row in write(name, make, Path(scratch, name.replace(" ", "-")))
        ]
        newer, older = (run(python, rows, given) for python in (sys.executable, sys.argv[1]))
        lines = [compare(row, *both) for row, *both in zip(rows, newer, older, strict=True)]
        print(markdown_table(lines, HEADER))


if __name__ == "__main__":
    main()
