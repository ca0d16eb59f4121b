"""ablation: the measured loss increase of masking single sampled units (forward passes)."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Measure the loss increase of masking single sampled units."""
    import typer

    from libprune.pipeline.artifacts import read_architecture, write_table
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.statistics.ablation import ablation_table, empty_table, print_ablation, sample_units, unit_plans

    layout, settings = Layout(artifacts), load_params(params)
    section = settings.ablation
    if section.units == 0:
        if stage.first_process():
            model = read_architecture(layout).fingerprint
            write_table(layout.ablation, empty_table(), {"model": model, "units": 0, "seed": section.seed})
            typer.echo("ablation.units is 0: nothing measured")
        return

    from libprune.collection.calibration import set_up
    from libprune.collection.resumable import collecting
    from libprune.statistics.losses import LOSSES, collect_losses, loss_groups

    run = set_up(layout, settings.compute, section.sequences, last=True)
    units = sample_units(run.architecture, section.units, section.seed)
    if run.world.first and len(units) < section.units:
        typer.echo(f"ablation.units is {section.units}, the model has {len(units)} units: all are measured")
    groups = loss_groups(run, len(units))
    identity = {"units": len(units), "seed": section.seed, "sequences": len(run.sequences)}
    with collecting(run, "ablation", layout.ablation, groups, 1, identity, len(units), run.sequences.tokens) as work:
        dense = collect_losses(run, work, unit_plans(run.architecture, units), run.first).numpy()
        if work.merge():
            table = ablation_table(units, work.accumulator.finish(0)[LOSSES].numpy(), dense)
            loss = float(dense.mean())
            write_table(layout.ablation, table, run.meta | {"units": len(units), "seed": section.seed, "loss": loss})
            print_ablation(table, loss)


app = stage.app(main)
if __name__ == "__main__":
    app()
