"""gradients: forward and backward; mean gradients by layer, first-order numbers by unit, batch rows by layer."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Collect the mean gradient of every block parameter and how every unit's mask gradient behaves."""
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.statistics.gradients import measure_gradients, print_gradients

    layout, settings = Layout(artifacts), load_params(params)
    rows = measure_gradients(layout, settings.compute, settings.gradients)
    if rows is not None:
        print_gradients(rows, layout.gradients)


app = stage.app(main)
if __name__ == "__main__":
    app()
