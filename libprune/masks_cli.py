"""The `libprune masks` commands: from masks of torch.nn.utils.prune to structure, and back."""

from pathlib import Path
from typing import Annotated

import typer

from libprune import stage

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

MODEL = "A Hugging Face folder, with X_orig and X_mask in its weights, or with zeroed weights."
Model = Annotated[Path, typer.Argument(help=MODEL)]
Masks = Annotated[
    Path | None, typer.Option("--masks", help="A safetensors file of X_mask (and X_orig) for a folder without masks.")
]
Json = Annotated[bool, typer.Option("--json", help="For machines: every unit, numbers unrounded.")]
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
def inspect_masks(model: Model, masks: Masks = None, as_json: Json = False) -> None:
    """Show which units are wholly masked, which partly, and what slicing would save."""
    import json

    from libprune.mask_extraction import extraction
    from libprune.mask_files import read_masked
    from libprune.mask_inspection import as_data, as_text, inspection

    with stage.user_errors():
        found = inspection(extraction(read_masked(model, masks)))
    typer.echo(json.dumps(as_data(found), indent=2) if as_json else as_text(found))


@app.command()
def extract(model: Model, out: Out, masks: Masks = None) -> None:
    """Remove the wholly masked units for real, and prove in a fresh process that the outputs are the same."""
    from libprune.artifacts import writing_folder
    from libprune.errors import LibpruneError
    from libprune.mask_extraction import extraction, write_extraction
    from libprune.mask_files import read_masked
    from libprune.mask_inspection import inspection, require_units
    from libprune.report import how_to_load

    with stage.user_errors():
        if out.exists():
            raise LibpruneError(f"{out} exists; name a folder that does not")
        found = extraction(read_masked(model, masks))
        seen = inspection(found)
        require_units(seen)
        with writing_folder(out) as folder:
            proof = write_extraction(found, folder, model)
    typer.echo(
        f"removed {seen.removable:,} units: {seen.saved_parameters:,} parameters, {100 * seen.saved_share:.1f} % of "
        f"the decoder\nlogits differ from the masked model's by {proof['removal_difference']:.1e} of "
        f"{proof['logit_scale']:.1f}; reloaded in a fresh process by {proof['logit_difference']:.1e}\n"
        f"load:   {how_to_load(str(out), found.shape, found.own.head)}"
    )


@app.command()
def export(source: Source, out: MasksOut, model: Dense = None, orig: Orig = False) -> None:
    """Write a plan as masks for torch.nn.utils.prune, by the names of the dense model's parameters."""
    from libprune.artifacts import writing
    from libprune.mask_export import export_masks

    with stage.user_errors(), writing(out) as partial:
        count = export_masks(source, model or source.parent / "model", partial, orig)
    typer.echo(f"{out}: {count:,} masks")
