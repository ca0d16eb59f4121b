"""Peak memory of the collecting stages against the size of the model.

    python -m bench.memory

For random Llama shapes of three sizes: the peak of each stage's process, with sums in memory and mapped
from disk, less that of a process that only imports the libraries. Beside it what it should be at most: the
model, one layer's sums, and the activations of one batch, taken from a plain pass of the same kind.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig

from libprune.collection.accumulator import state_bytes
from libprune.engine.describe import describe
from libprune.models.sequences import Sequences
from libprune.models.tokens import write_tokens
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Activations, Gradients, Hessian
from libprune.report.markdown import markdown_table
from libprune.statistics.activations import activation_groups
from libprune.statistics.gradients import gradient_groups
from libprune.statistics.hessian import hessian_groups

ROOT = Path(__file__).parents[1]
SHAPES = {"small": (384, 1152, 6), "medium": (640, 1920, 10), "large": (896, 2688, 14)}
SEQUENCES, LENGTH = 16, 128
PLAIN = """
import resource, sys, torch
from libprune.models.folder import load_model
from pathlib import Path
model = load_model(Path("artifacts/model"), torch.float32)
from libprune.models.compute import sequence_losses
from libprune.models.sequences import Sequences
ids = torch.zeros(8, 128, dtype=torch.long)
if sys.argv[1] == "backward":
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda m, a, o: o.requires_grad_(True))
    sequence_losses(model, Sequences(ids)).sum().backward()
elif sys.argv[1] == "forward":
    with torch.no_grad(): model.base_model(input_ids=ids, use_cache=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def prepare(folder: Path, hidden: int, inner: int, layers: int) -> tuple[int, dict[str, list[float]]]:
    """A random model and text; returns bytes of the model, and of all and of one layer's sums by stage."""
    layout = Layout(folder / "artifacts")
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(layout.model)
    architecture = describe(model)
    layout.architecture.write_text(architecture.to_json())
    ids = torch.randint(8192, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    write_tokens(layout.calibration_tokens, Sequences(ids), {"model": architecture.fingerprint})
    groups = {
        "gradients": gradient_groups(architecture, LENGTH - 1, 2, Gradients()),
        "hessian": hessian_groups(architecture, LENGTH - 1, Hessian(estimator="fisher")),
        "activations": activation_groups(architecture, Activations()),
    }
    sums = {name: [state_bytes(group), state_bytes(group[:1])] for name, group in groups.items()}
    return sum(p.numel() for p in model.parameters()) * 4, sums


def output(folder: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def peak(folder: Path, stage: str, sums: str) -> int:
    """Peak bytes of a stage's process, as it prints them."""
    stages = "gradients: {sequences: null}\nhessian: {sequences: null, estimator: fisher}\n"
    settings = f"prepare: {{model: x}}\ntokenize: {{text: x}}\ncompute: {{sums: {sums}, dtype: float32}}\n{stages}"
    (folder / "params.yaml").write_text(settings)
    last = output(folder, sys.executable, "-m", f"stages.{stage}").splitlines()[-1]
    return int(last.split("peak memory ")[1].split(" MB")[0].replace(",", "")) * 10**6


def plain(folder: Path, kind: str) -> int:
    return int(output(folder, sys.executable, "-c", PLAIN, kind).splitlines()[-1])


def main() -> None:
    """Print the table, in MB."""
    lines = []
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            size, sums = prepare(folder, *shape)
            for stage, (whole, layer) in sums.items():
                passes = plain(folder, "forward" if stage == "activations" else "backward")
                measured = [peak(folder, stage, kind) for kind in ("memory", "disk")]
                row = (size, whole, layer, passes, *measured, passes + layer, passes + whole)
                lines.append((name, stage, *(f"{value / 1e6:,.0f}" for value in row)))
    heads = ("model", "stage", "weights", "all sums", "a layer's sums", "plain pass", "peak, memory", "peak, disk")
    print(markdown_table(lines, (*heads, "plain + layer", "plain + all")))


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
