"""The `libprune masks` commands: from masks of torch.nn.utils.prune to structure, and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from libprune import stage

if TYPE_CHECKING:
    from libprune.networks.masks import Extraction

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

MODEL = (
    "A Hugging Face folder, with X_orig and X_mask in its weights, or with zeroed weights; of a network its state dict "
    "as a safetensors file."
)
Model = Annotated[Path, typer.Argument(help=MODEL)]
Masks = Annotated[
    Path | None, typer.Option("--masks", help="A safetensors file of X_mask (and X_orig) for a folder without masks.")
]
Json = Annotated[bool, typer.Option("--json", help="For machines: every unit, numbers unrounded.")]
Family = Annotated[Path | None, typer.Option("--family", help="Of a network: its family file.")]
Factory = Annotated[
    str | None,
    typer.Option(
        "--network",
        help="Of a network: package.module:Name of what makes it. Imports and RUNS that code; modules of the current "
        "folder are found.",
    ),
]
Inputs = Annotated[
    Path | None, typer.Option("--inputs", help="Of a network: a safetensors file with a tensor inputs, some samples.")
]
InputShape = Annotated[
    str | None, typer.Option("--input-shape", help="Instead of --inputs: shape of a sample to draw, such as 1,28,28.")
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
    """From masks of torch.nn.utils.prune to structure, and back."""
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

    from libprune.mask_extraction import extraction
    from libprune.mask_files import read_masked
    from libprune.mask_inspection import as_data, as_text, inspection
    from libprune.networks.masks import inspection as of_network

    with stage.user_errors():
        given = _network(model, masks, family, network, inputs, input_shape)
        found = of_network(given) if given else inspection(extraction(read_masked(model, masks)))
    typer.echo(json.dumps(as_data(found), indent=2) if as_json else as_text(found))


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
    """Remove the wholly masked units for real, and prove that the outputs are the same."""
    from libprune.errors import LibpruneError

    with stage.user_errors():
        if out.exists():
            raise LibpruneError(f"{out} exists; name a folder that does not")
        given = _network(model, masks, family, network, inputs, input_shape)
        lines = _extract_network(given, out, str(network)) if given else _extract_model(model, masks, out)
    typer.echo("\n".join(lines))


def _extract_model(model: Path, masks: Path | None, out: Path) -> list[str]:
    from libprune.artifacts import writing_folder
    from libprune.mask_extraction import extraction, write_extraction
    from libprune.mask_files import read_masked
    from libprune.mask_inspection import inspection, removed, require_units
    from libprune.report import how_to_load

    found = extraction(read_masked(model, masks))
    seen = inspection(found)
    require_units(seen)
    with writing_folder(out) as folder:
        proof = write_extraction(found, folder, model)
    return [
        removed(seen),
        f"logits differ from the masked model's by {proof['removal_difference']:.1e} of "
        f"{proof['logit_scale']:.1f}; reloaded in a fresh process by {proof['logit_difference']:.1e}",
        f"load:   {how_to_load(str(out), found.shape, found.own.head)}",
    ]


def _extract_network(found: "Extraction", out: Path, factory: str) -> list[str]:
    from libprune.mask_inspection import removed, require_units
    from libprune.networks.masks import inspection

    seen = inspection(found)
    require_units(seen)
    found.save(out)
    proof = found.proof
    return [
        removed(seen),
        f"outputs differ from the masked network's by {proof['difference']:.1e} of {proof['scale']:.1f}; on inputs "
        f"without order by {proof['noise_difference']:.1e} of {proof['noise_scale']:.1f}",
        f'load:   libprune.networks.load(Path("{out}"), {factory.rpartition(":")[2]}())',
    ]


def _network(
    model: Path, masks: Path | None, family: Path | None, factory: str | None, inputs: Path | None, shape: str | None
) -> "Extraction | None":
    """The network that the options describe; None where none of them is given, for a language model."""
    from libprune.errors import LibpruneError

    if family is None and factory is None and inputs is None and shape is None:
        if model.is_file():
            raise LibpruneError(
                f"{model} is a file. Name a folder of a language model; for a network add --family FILE.yaml, "
                "--network package.module:Name, and --inputs FILE or --input-shape SIZES"
            )
        return None
    if family is None or factory is None or (inputs is None) == (shape is None):
        raise LibpruneError(
            "a network needs --family FILE.yaml, --network package.module:Name, and one of --inputs FILE and "
            "--input-shape SIZES"
        )
    if masks is not None:
        raise LibpruneError(f"leave out --masks {masks}: masks of a network are X_orig and X_mask in its state dict")
    from libprune.networks.masked import drawn_inputs, read_inputs, read_network, require_takes
    from libprune.networks.masks import extraction

    examples = drawn_inputs(str(shape)) if inputs is None else read_inputs(inputs)
    masked = read_network(model, factory)
    require_takes(masked.model, examples)
    return extraction(masked, family, examples)


@app.command()
def export(source: Source, out: MasksOut, model: Dense = None, orig: Orig = False) -> None:
    """Write a plan as masks for torch.nn.utils.prune, by the names of the dense model's parameters."""
    from libprune.artifacts import writing
    from libprune.mask_export import export_masks

    with stage.user_errors(), writing(out) as partial:
        count = export_masks(source, model or source.parent / "model", partial, orig)
    typer.echo(f"{out}: {count:,} masks")
