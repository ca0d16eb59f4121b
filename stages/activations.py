"""activations: one forward pass; input norms of every map and Gram matrices of the consumers."""

from libprune import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Collect norms, means and variances at every map's input and Gram matrices at the consumers'."""
    from functools import partial

    from libprune.activations import activation_columns, collect_activations
    from libprune.artifacts import Layout, write_units, writing_folder
    from libprune.collection import set_up, write_layers
    from libprune.params import load_params

    layout, settings = Layout(artifacts), load_params(params)
    run = set_up(layout, settings.compute, settings.activations.sequences, "activations")
    sums = collect_activations(run.model, run.architecture, run.batches)
    columns = partial(activation_columns, sums, run.architecture, dict(run.model.named_parameters()))
    with writing_folder(layout.activations) as folder:
        write_layers(folder, run.architecture, partial(sums.layer_tensors, run.architecture), run.meta)
        write_units(folder / "units.parquet", run.architecture, columns, run.meta)


app = stage.app(main)
if __name__ == "__main__":
    app()
