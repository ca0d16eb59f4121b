"""width: axes of the residual stream, and the measured divergence along them (forward passes; for allocate.width)."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Measure what it costs to keep fewer columns of the residual stream."""
    from libprune.narrowing.table import empty_table, print_widths
    from libprune.pipeline.artifacts import read_architecture, write_nothing, write_table
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.pipeline.terminal import note

    layout, settings = Layout(artifacts), load_params(params)
    architecture = read_architecture(layout)
    if settings.allocate.width is None:
        if stage.first_process():
            write_nothing(layout.width_axes, {"width": None})
            write_table(layout.widths, empty_table(), {"model": architecture.fingerprint})
            note("allocate.width is null: the residual stream keeps its width")
        return

    from libprune.narrowing.measure import measure_widths

    table = measure_widths(layout, settings.compute, settings.width, settings.allocate.width)
    if table is not None:
        print_widths(table)


app = stage.app(main)
if __name__ == "__main__":
    app()
