"""What it takes to read the weights of a model by the number of its tensors: narrow models of more and more layers.

    python -m bench.many_tensors --work /tmp/tensors

A mixture of experts has tens of thousands of small tensors, so that what is done once a tensor counts. For each model:
the CPU seconds of loading it into memory, of loading it on disk in the type in which it is stored and in another type,
and of reading its tensors one by one, the median of three.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from libprune.models.folder import WeightFiles, load_model
from libprune.report.markdown import markdown_table

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def seconds(measured: Callable[[], object]) -> float:
    """The CPU seconds of a call, the median of three."""
    found = []
    for _ in range(3):
        start = time.process_time()
        measured()
        found.append(time.process_time() - start)
    return statistics.median(found)


def row(work: Path, layers: int) -> tuple[str, ...]:
    """The line of a model of so many layers."""
    folder = work / f"{layers}-layers"
    if not folder.exists():
        config = LlamaConfig(num_hidden_layers=layers, vocab_size=256, **SIZES)
        LlamaForCausalLM(config).save_pretrained(folder)
    weights, scratch = WeightFiles(folder), work / "scratch"
    found = [
        seconds(lambda: load_model(folder, torch.float32)),
        seconds(lambda: load_model(folder, torch.float32, scratch=scratch)),
        seconds(lambda: load_model(folder, torch.bfloat16, scratch=scratch)),
        seconds(lambda: [weights[name] for name in weights]),
    ]
    return f"{len(weights):,}", *(f"{value:.2f}" for value in found)


def main(work: Path = Path("/tmp/tensors"), layers: tuple[int, int, int] = (75, 150, 300)) -> None:
    """Measure, and print a table."""
    work.mkdir(parents=True, exist_ok=True)
    header = ("tensors", "in memory", "on disk", "on disk, another type", "one by one")
    print(markdown_table([row(work, number) for number in layers], header))


if __name__ == "__main__":
    typer.run(main)
