"""levels: the measured divergence of whole levels of single blocks, repaired (forward passes; only for search)."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Measure what it costs to take one block to a level, for every block and level."""
    import typer

    from libprune.pipeline.artifacts import read_architecture, read_table, same_origin, write_table
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.methods import allocation_reads
    from libprune.pipeline.params import load_params
    from libprune.statistics.levels import (
        choose_levels,
        empty_table,
        level_plans,
        level_table,
        order_digest,
        print_levels,
        unit_orders,
    )

    layout, settings = Layout(artifacts), load_params(params)
    section, architecture = settings.levels, read_architecture(layout)
    if "levels" not in allocation_reads(settings.allocate.method):
        if stage.first_process():
            write_table(layout.levels, empty_table(), {"model": architecture.fingerprint, "levels": 0})
            typer.echo(f"allocate.method is {settings.allocate.method}: no level is measured")
        return

    from libprune.collection.calibration import require_own_weights, set_up
    from libprune.collection.resumable import collecting
    from libprune.repair.repairs import inputs_identity, local_repair
    from libprune.statistics.divergence import Divergence
    from libprune.statistics.losses import LOSSES, collect_losses, loss_groups

    run = set_up(layout, settings.compute, section.sequences, last=True)
    require_own_weights(run)
    scores, meta = read_table(layout.scores, "score")
    same_origin(layout.scores, meta, {"model": architecture.fingerprint})
    orders = unit_orders(architecture, scores)
    levels = choose_levels(architecture, section.number)
    plans = level_plans(architecture, orders, levels)
    identity = {"order": order_digest(orders), "number": section.number, "sequences": len(run.sequences)}
    identity["inputs"] = inputs_identity(layout)
    groups = loss_groups(run, len(levels))
    repair = local_repair(layout, architecture)
    with collecting(
        run, "levels", layout.levels, groups, 1, identity, len(levels), run.sequences.tokens, ("repair",)
    ) as work:
        collect_losses(run, work, plans, run.first, Divergence(run.model), lambda name: repair(plans[name]))
        if work.merge():
            table = level_table(levels, work.accumulator.finish(0)[LOSSES].numpy())
            write_table(layout.levels, table, run.meta | {"levels": section.number, "order": identity["order"]})
            print_levels(architecture, table)


app = stage.app(main)
if __name__ == "__main__":
    app()
