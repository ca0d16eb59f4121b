"""sensitivity: the loss increase of removing each layer, attention and MLP (forward passes; for hgsp and worth)."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Measure what it costs to remove every layer, and each of its blocks alone."""
    from libprune.pipeline.artifacts import read_architecture, write_table
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.methods import allocation_reads
    from libprune.pipeline.params import load_params
    from libprune.pipeline.terminal import note
    from libprune.statistics.sensitivity import empty_table, measure_sensitivity, print_sensitivity

    layout, settings = Layout(artifacts), load_params(params)
    if "sensitivity" not in allocation_reads(settings.allocate.method, settings.allocate.worth):
        if stage.first_process():
            write_table(layout.sensitivity, empty_table(), {"model": read_architecture(layout).fingerprint})
            note(f"allocate.method is {settings.allocate.method}: no layer is measured")
        return
    measured = measure_sensitivity(layout, settings.compute, settings.sensitivity)
    if measured is not None:
        print_sensitivity(*measured)


app = stage.app(main)
if __name__ == "__main__":
    app()
