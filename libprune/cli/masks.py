"""The `libprune masks` commands: from masks of torch.nn.utils.prune to structure, and back."""

from pathlib import Path
from typing import Annotated

import typer

from libprune.engine.errors import printable
from libprune.pipeline import stage

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

MODEL = (
    "A Hugging Face folder, with X_orig and X_mask in its weights, or with zeroed weights; for a network, its state "
    "dict as a safetensors file."
)
Model = Annotated[Path, typer.Argument(help=MODEL)]
Masks = Annotated[
    Path | None, typer.Option("--masks", help="A safetensors file of X_mask (and X_orig) for a folder without masks.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: every unit, numbers unrounded.")]
Family = Annotated[Path | None, typer.Option("--family", help="The family file of a network.")]
Factory = Annotated[
    str | None,
    typer.Option(
        "--network",
        help="package.module:Name of the callable that makes a network. Imports and RUNS that code, from the current "
        "folder too.",
    ),
]
Inputs = Annotated[
    Path | None,
    typer.Option("--inputs", help="A safetensors file with a tensor named inputs: some samples for a network."),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        "--input-shape", help="Instead of --inputs: the shape of one sample, such as 1,28,28; samples are drawn."
    ),
]
Out = Annotated[Path, typer.Argument(help="The folder for the smaller model; must not exist.")]
Source = Annotated[Path, typer.Argument(help="A pruned folder, or a plan.parquet.")]
MasksOut = Annotated[Path, typer.Argument(help="The safetensors file to write.")]
Dense = Annotated[
    Path | None, typer.Option("--model", help="The dense model's folder; if not given, model beside SOURCE.")
]
Orig = Annotated[bool, typer.Option("--orig", help="Write the dense weights as X_orig, too.")]


@app.callback()
def main() -> None:
    """Turn masks of torch.nn.utils.prune into smaller matrices, and plans into masks."""
    stage.quiet()


@app.command("inspect")
def inspect_masks(
    model: Model,
    masks: Masks = None,
    family: Family = None,
    network: Factory = None,
    inputs: Inputs = None,
    input_shape: InputShape = None,
    as_json: Json = False,
) -> None:
    """Show which units are wholly masked, which partly, and what slicing would save."""
    import json

    from libprune.masks.inspection import as_data, as_text, inspection
    from libprune.masks.options import extraction_of

    with stage.user_errors():
        seen = inspection(extraction_of(model, masks, family, network, inputs, input_shape))
    typer.echo(json.dumps(as_data(seen), indent=2) if as_json else printable(as_text(seen)))


@app.command()
def extract(
    model: Model,
    out: Out,
    masks: Masks = None,
    family: Family = None,
    network: Factory = None,
    inputs: Inputs = None,
    input_shape: InputShape = None,
) -> None:
    """Remove the wholly masked units from the weights, and prove that the outputs are the same."""
    from libprune.engine.errors import LibpruneError
    from libprune.masks.options import extraction_of, save

    with stage.user_errors():
        if out.exists():
            raise LibpruneError(f"{out} exists; name a folder that does not")
        lines = save(extraction_of(model, masks, family, network, inputs, input_shape), out, model, network)
    typer.echo(printable("\n".join(lines)))


@app.command()
def export(source: Source, out: MasksOut, model: Dense = None, orig: Orig = False) -> None:
    """Write a plan as masks for torch.nn.utils.prune, by the names of the dense model's parameters."""
    from libprune.masks.export import export_masks
    from libprune.pipeline.atomic import writing

    with stage.user_errors(), writing(out) as partial:
        count = export_masks(source, model or source.parent / "model", partial, orig)
    typer.echo(f"{out}: {count:,} masks")
