"""sensitivity: the loss increase of removing each layer, attention and MLP (forward passes; for hgsp and worth)."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Measure what it costs to remove every layer, and each of its blocks alone."""
    import typer

    from libprune.pipeline.artifacts import read_architecture, write_table
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.methods import allocation_reads
    from libprune.pipeline.params import load_params
    from libprune.statistics.sensitivity import (
        empty_table,
        print_sensitivity,
        removal_plans,
        removals,
        sensitivity_table,
    )

    layout, settings = Layout(artifacts), load_params(params)
    if "sensitivity" not in allocation_reads(settings.allocate.method, settings.allocate.worth):
        if stage.first_process():
            write_table(layout.sensitivity, empty_table(), {"model": read_architecture(layout).fingerprint})
            typer.echo(f"allocate.method is {settings.allocate.method}: no layer is measured")
        return

    from libprune.collection.calibration import set_up
    from libprune.collection.resumable import collecting
    from libprune.statistics.losses import LOSSES, collect_losses, loss_groups

    run = set_up(layout, settings.compute, settings.sensitivity.sequences, last=True)
    plans, measured = removal_plans(run.architecture), removals(run.architecture)
    groups = loss_groups(run, len(plans))
    identity = {"sequences": len(run.sequences)}
    with collecting(
        run, "sensitivity", layout.sensitivity, groups, 1, identity, len(plans), run.sequences.tokens
    ) as work:
        dense = collect_losses(run, work, plans, run.first).numpy()
        if work.merge():
            table = sensitivity_table(measured, work.accumulator.finish(0)[LOSSES].numpy(), dense)
            loss = float(dense.mean())
            write_table(layout.sensitivity, table, run.meta | {"loss": loss})
            print_sensitivity(table, loss)


app = stage.app(main)
if __name__ == "__main__":
    app()
