"""hessian: squared per-sequence gradients; diagonals by layer and second-order sums by unit."""

from libprune import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Estimate the diagonal of the Hessian of every weight that a unit owns."""
    from functools import partial

    import typer

    from libprune.artifacts import Layout, write_units, writing_folder
    from libprune.collection import set_up, stored, write_layers
    from libprune.hessian import collect_squared_gradients, hessian_columns
    from libprune.params import load_params

    layout, settings = Layout(artifacts), load_params(params)
    section = settings.hessian
    if section.estimator == "none":
        with writing_folder(layout.hessian):
            typer.echo("hessian.estimator is none: nothing collected")
        return
    run = set_up(layout, settings.compute, section.sequences, "hessian")
    sums = collect_squared_gradients(run.model, run.architecture, run.batches)
    meta = run.meta | {"estimator": section.estimator}
    weights = dict(run.model.named_parameters())
    columns = partial(hessian_columns, sums, run.architecture, weights, run.n_tok, section.estimator)
    with writing_folder(layout.hessian) as folder:
        write_layers(
            folder,
            run.architecture,
            lambda layer: {
                name: stored(sums.diagonal(name, run.n_tok, section.estimator), section.storage_dtype)
                for name in sums.squares
                if name.startswith(f"{run.architecture.layers_path}.{layer}.")
            },
            meta,
        )
        write_units(folder / "units.parquet", run.architecture, columns, meta)


app = stage.app(main)
if __name__ == "__main__":
    app()
