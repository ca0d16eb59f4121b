"""A byte-level recurrent language model, of LSTM units or of LSTM and spiking units: trained in minutes on a CPU, and
pruned.

    python -m examples.recurrent train --out FOLDER
    python -m examples.recurrent compare FOLDER --ratio 0.5

It reads text as UTF-8 bytes, learns the first eight tenths by truncated backpropagation through time in parallel
streams, and keeps the weights of the epoch with the lowest loss on the next tenth. The last tenth is what pruned models
are judged on.
"""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer

from examples.byte_text import BYTES, NEWS, read_bytes, split, streams, unigram_loss
from examples.recurrent_comparison import Calibration, Judge, network_of, results_of, table
from examples.recurrent_training import DROPOUT, Schedule, described, epochs_of, load, save
from libprune.pipeline.stage import quiet, user_errors

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Text = Annotated[str, typer.Option(help="A file, package://NAME/path, or another text that libprune reads.")]


@app.callback()
def main() -> None:
    """A recurrent language model to prune."""


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="The folder to write; of an older one, nothing stays.")],
    text: Text = NEWS,
    snn_ratio: Annotated[float, typer.Option(help="Share of the units of each layer that spike, 0 to 1.")] = 0.0,
    layers: Annotated[int, typer.Option(help="Recurrent layers.")] = 2,
    hidden: Annotated[int, typer.Option(help="Units of each layer.")] = 256,
    embedding: Annotated[int, typer.Option(help="Width of the embedding of a byte.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Streams of text in parallel.")] = 32,
    bptt: Annotated[int, typer.Option(min=1, help="Steps that the gradient goes back.")] = 64,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training part.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the weights and of dropout.")] = 0,
) -> None:
    """Train a model, print both perplexities per byte after every epoch, and write the best weights to a folder."""
    import torch

    from libprune.networks.recurrent import RecurrentLM

    quiet()
    schedule = Schedule(batch, bptt, epochs)
    config: dict[str, Any] = {"vocab": BYTES, "embedding": embedding, "hidden": hidden, "layers": layers}
    config |= {"snn_ratio": snn_ratio, "dropout": DROPOUT}
    with user_errors():
        parts = split(read_bytes(text))
        training, validation = streams(parts.training, batch), streams(parts.validation, batch)
        torch.manual_seed(seed)
        model = RecurrentLM(**config)
        unigram = math.exp(unigram_loss(training, validation))
        best = math.inf
        for number, epoch in enumerate(epochs_of(model, training, validation, schedule), 1):
            typer.echo(f"epoch {number}/{epochs}: {described(epoch)}; unigram {unigram:.2f}")
            if epoch.validation_loss < best:
                best = epoch.validation_loss
                save(model, config, out)
    typer.echo(f"{out}: perplexity per byte {math.exp(best):.2f} in validation, {unigram:.2f} by frequencies alone")


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(help="What train wrote.")],
    text: Text = NEWS,
    ratio: Annotated[float, typer.Option(min=0.01, max=0.99, help="Share of the parameters to remove.")] = 0.5,
    repair: Annotated[Literal["none", "local", "sequential", "block"], typer.Option(help="Of what is left.")] = "none",
    seeds: Annotated[int, typer.Option(min=1, help="Draws of the calibration sequences.")] = 3,
    sequences: Annotated[int, typer.Option(min=8, help="Calibration sequences, from the training part.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Bytes of each.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Streams of the evaluation part in parallel.")] = 64,
    evaluated: Annotated[int, typer.Option(min=2, help="Bytes of the evaluation part, at most.")] = 32768,
) -> None:
    """Prune a trained model by classical and by mixed criteria, and print what each does to the perplexity per byte."""
    quiet()
    with user_errors(), TemporaryDirectory() as work:
        model, parts = load(folder), split(read_bytes(text))
        judge = Judge.of(parts, batch, evaluated)
        perplexity, parameters = math.exp(judge.loss(model)), sum(weight.numel() for weight in model.parameters())
        typer.echo(f"dense: perplexity per byte {perplexity:.3f}, {parameters:,} parameters; ratio {ratio}, {repair}")
        results = []
        for seed in range(seeds):
            samples = Calibration(sequences, length).draw(parts.training, seed)
            network = network_of(model, samples, Path(work) / str(seed))
            results += list(results_of(model, network, judge, ratio, repair, seed))
    typer.echo(table(results))


if __name__ == "__main__":
    app()
