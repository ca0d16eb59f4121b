"""gradients: one backward pass; mean gradients by layer and first-order sums by unit."""

from libprune import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Collect the mean gradient of every block parameter and the squared mask gradient of every unit."""
    from functools import partial

    from libprune.artifacts import Layout, write_units, writing_folder
    from libprune.collection import block_parameters, set_up, stored, write_layers
    from libprune.gradients import collect_gradients, gradient_columns
    from libprune.params import load_params

    layout, settings = Layout(artifacts), load_params(params)
    section = settings.gradients
    run = set_up(layout, settings.compute, section.sequences, "gradients")
    sums = collect_gradients(run.model, run.architecture, run.batches)
    meta = run.meta | {"loss": sums.loss / sums.sequences}
    columns = partial(gradient_columns, sums, run.architecture, dict(run.model.named_parameters()), run.n_tok)
    with writing_folder(layout.gradients) as folder:
        write_layers(
            folder,
            run.architecture,
            lambda layer: {
                name: stored(sums.mean_gradient(name), section.storage_dtype)
                for name in block_parameters(run.architecture, layer)
            },
            meta,
        )
        write_units(folder / "units.parquet", run.architecture, columns, meta)


app = stage.app(main)
if __name__ == "__main__":
    app()
