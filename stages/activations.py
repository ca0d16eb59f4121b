"""activations: one forward pass; moments at every map's input, Gram matrices and histograms at the consumers'."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Collect norms and moments at every map's input, Gram matrices at the consumers', and cosines across blocks."""
    from libprune.collection.calibration import set_up
    from libprune.collection.resumable import collecting, write_artifact
    from libprune.collection.summary import print_units
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.statistics.activations import activation_columns, activation_groups, collect_activations

    layout, settings = Layout(artifacts), load_params(params)
    section = settings.activations
    run = set_up(layout, settings.compute, section.sequences)
    groups = activation_groups(run.architecture, section)
    with collecting(run, "activations", layout.activations, groups, run.at_once, {}) as work:
        collect_activations(run.model, run.architecture, work.passes(), work.accumulator)
        if work.merge():
            tables = write_artifact(run, layout.activations, work.accumulator, activation_columns, {})
            print_units(tables["units"], ("activation_magnitude", "activation_entropy"), layout.activations)


app = stage.app(main)
if __name__ == "__main__":
    app()
