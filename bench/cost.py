"""What the collecting stages cost beside the passes themselves, as ratios within one run.

    python -m bench.cost --model FOLDER          a model folder, such as artifacts/model
    python -m bench.cost --shape 1b              a randomly initialised Llama of one billion parameters

Rounds alternate between the kinds, and each ratio is the median over rounds. Sums are in memory, checkpoints
and files are left out: their cost is bounded by time, not by passes.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from libprune.collection.accumulator import Accumulator
from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe
from libprune.models.compute import sequence_losses
from libprune.models.folder import load_model
from libprune.models.sequences import Sequences
from libprune.pipeline.sections import Activations, Gradients, Hessian
from libprune.statistics.activations import activation_groups, collect_activations
from libprune.statistics.gradients import collect_gradients, gradient_groups
from libprune.statistics.hessian import bare_parameters, collect_probes, collect_squared_gradients, hessian_groups

SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
}


def random_model(shape: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=dtype).eval()


def plain_backward(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Forward and backward with gradients of all block parameters, as a training step has them."""
    sequence_losses(model, Sequences(ids)).sum().backward()
    model.zero_grad()


def kinds(model: PreTrainedModel, architecture: Architecture, ids: torch.Tensor) -> dict[str, Callable[[], None]]:
    n_tok = ids.shape[1] - 1
    gradients = Gradients()
    fisher, probes = Hessian(estimator="fisher"), Hessian(estimator="hutchinson")

    def batches() -> list[tuple[int, int, Sequences]]:
        return [(0, 0, Sequences(ids))]

    def one_by_one() -> list[tuple[int, int, Sequences]]:
        return [(number, number, Sequences(ids[number : number + 1])) for number in range(len(ids))]

    squares = one_by_one if bare_parameters(architecture) else batches
    first = Accumulator(gradient_groups(architecture, n_tok, 1, gradients))
    second = Accumulator(hessian_groups(architecture, n_tok, fisher))
    forward = Accumulator(activation_groups(architecture, Activations()))
    inside = {p.name for p in architecture.parameters if p.layer is not None}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in inside)
    no_grad = torch.no_grad()

    def plain_forward() -> None:
        with no_grad:
            model.base_model(input_ids=ids, use_cache=False)

    def forward_with_head() -> None:
        with no_grad:
            sequence_losses(model, Sequences(ids))

    return {
        "forward, without head": plain_forward,
        "forward": forward_with_head,
        "activations": lambda: collect_activations(model, architecture, batches(), forward),
        "forward+backward": lambda: plain_backward(model, ids),
        "gradients": lambda: collect_gradients(model, architecture, batches(), first, len(ids)),
        "hessian, fisher": lambda: collect_squared_gradients(model, architecture, squares(), second),
        "hessian, hutchinson": lambda: collect_probes(
            model, architecture, batches(), Accumulator(hessian_groups(architecture, n_tok, probes)), probes
        ),
    }


BESIDE = {
    "activations": "forward, without head",
    "gradients": "forward+backward",
    "hessian, fisher": "forward+backward",
    "hessian, hutchinson": "forward+backward",
}


def main(
    model: Annotated[Path | None, typer.Option(help="A model folder.")] = None,
    shape: Annotated[str, typer.Option(help="A random model: " + ", ".join(SHAPES))] = "1b",
    sequences: int = 8,
    length: int = 128,
    rounds: int = 5,
    dtype: str = "float32",
    probes: Annotated[bool, typer.Option(help="Time hutchinson too, which needs far more memory.")] = True,
) -> None:
    """Print seconds and ratios."""
    typed = getattr(torch, dtype)
    loaded = load_model(model, typed) if model else random_model(shape, typed)
    architecture = describe(loaded)
    ids = torch.randint(1000, (sequences, length), generator=torch.Generator().manual_seed(0))
    work = kinds(loaded, architecture, ids)
    if not probes:
        del work["hessian, hutchinson"]
    times: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(rounds + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if round_:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    print(f"{architecture.total_parameters:,} parameters, {sequences} x {length} tokens, {dtype}, {rounds} rounds")
    for name, values in times.items():
        beside = BESIDE.get(name)
        ratio = median(a / b for a, b in zip(values, times[beside], strict=True)) if beside else 1.0
        print(f"{name:24} {median(values):8.3f} s" + (f"   {ratio:5.2f} x {beside}" if beside else ""))


if __name__ == "__main__":
    typer.run(main)
