"""hessian: squared per-sequence gradients or random probes; diagonals by layer and second-order sums by unit."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Estimate the diagonal of the Hessian of every weight that a unit owns."""
    import typer

    from libprune.pipeline.atomic import write_json, writing_folder
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params

    layout, settings = Layout(artifacts), load_params(params)
    section = settings.hessian
    if section.estimator == "none":
        if stage.first_process():
            with writing_folder(layout.hessian) as folder:
                write_json(folder / "nothing.json", {"estimator": "none"})  # DVC warns of empty folders
            typer.echo("hessian.estimator is none: nothing collected")
        return

    from libprune.collection.calibration import set_up
    from libprune.collection.resumable import collecting, write_artifact
    from libprune.collection.summary import print_units
    from libprune.statistics.hessian import (
        collect_probes,
        collect_squared_gradients,
        hessian_columns,
        hessian_groups,
        require_probes_possible,
    )

    run = set_up(layout, settings.compute, section.sequences)
    probing = section.estimator == "hutchinson"
    if probing:
        require_probes_possible(settings.compute, run.world.sharded)
    groups = hessian_groups(run.architecture, run.n_tok, section)
    identity = {"estimator": section.estimator} | ({"probes": section.probes, "seed": section.seed} if probing else {})
    with collecting(run, "hessian", layout.hessian, groups, run.at_once, identity) as work:
        sums, batches = work.accumulator, work.passes()
        if probing:
            collect_probes(run.model, run.architecture, batches, sums, section)
        else:
            collect_squared_gradients(run.model, run.architecture, batches, sums, run.recompute)
        if work.merge():
            tables = write_artifact(run, layout.hessian, sums, hessian_columns, {"estimator": section.estimator})
            print_units(tables["units"], ("fisher", "hessian_trace"), layout.hessian)


app = stage.app(main)
if __name__ == "__main__":
    app()
