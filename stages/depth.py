"""depth: the order in which whole layers or parts go, by divergence (forward passes; for joint and cosine)."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Put whole layers or parts into the order in which they go, and measure the model without them."""
    from libprune.pipeline.artifacts import read_architecture, write_table
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.pipeline.sections import ORDERS
    from libprune.pipeline.terminal import note
    from libprune.statistics.depth import empty_table, measure_depth, print_depth

    layout, settings = Layout(artifacts), load_params(params)
    kind, frozen = settings.allocate.depth, (settings.allocate.freeze_first, settings.allocate.freeze_last)
    if kind not in ORDERS:
        if stage.first_process():
            write_table(layout.depth, empty_table(), {"model": read_architecture(layout).fingerprint})
            note(f"allocate.depth is {kind}: no layer is measured")
        return
    table = measure_depth(layout, settings.compute, settings.depth, kind, frozen)
    if table is not None:
        print_depth(table)


app = stage.app(main)
if __name__ == "__main__":
    app()
