"""levels: the measured divergence of whole levels of single blocks, repaired (forward passes; only for search)."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Measure what it costs to take one block to a level, for every block and level."""
    from libprune.pipeline.artifacts import read_architecture, write_table
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.methods import allocation_reads
    from libprune.pipeline.params import load_params
    from libprune.pipeline.terminal import note
    from libprune.statistics.levels import empty_table, measure_levels, print_levels

    layout, settings = Layout(artifacts), load_params(params)
    architecture = read_architecture(layout)
    if "levels" not in allocation_reads(settings.allocate.method):
        if stage.first_process():
            write_table(layout.levels, empty_table(), {"model": architecture.fingerprint, "levels": 0})
            note(f"allocate.method is {settings.allocate.method}: no level is measured")
        return

    from libprune.repair.repairs import inputs_identity, local_repair

    table = measure_levels(
        layout,
        settings.compute,
        settings.levels,
        lambda: (local_repair(layout, architecture), inputs_identity(layout)),
    )
    if table is not None:
        print_levels(architecture, table)


app = stage.app(main)
if __name__ == "__main__":
    app()
