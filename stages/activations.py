"""activations: one forward pass; moments at every map's input, Gram matrices and histograms at the consumers'."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Collect norms and moments at every map's input, Gram matrices at the consumers', and cosines across layers."""
    from libprune.collection.summary import print_units
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.statistics.activations import measure_activations

    layout, settings = Layout(artifacts), load_params(params)
    units = measure_activations(layout, settings.compute, settings.activations)
    if units is not None:
        print_units(units, ("activation_magnitude", "activation_entropy"), layout.activations)


app = stage.app(main)
if __name__ == "__main__":
    app()
