"""hessian: squared per-sequence gradients or random probes; diagonals by layer and second-order sums by unit."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Estimate the diagonal of the Hessian of every weight that a unit owns."""
    from libprune.pipeline.artifacts import write_nothing
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.pipeline.terminal import note

    layout, settings = Layout(artifacts), load_params(params)
    section = settings.hessian
    if section.estimator == "none":
        if stage.first_process():
            write_nothing(layout.hessian, {"estimator": "none"})
            note("hessian.estimator is none: nothing collected")
        return

    from libprune.collection.summary import print_units
    from libprune.statistics.hessian import measure_hessian

    units = measure_hessian(layout, settings.compute, section)
    if units is not None:
        print_units(units, ("fisher", "hessian_trace"), layout.hessian)


app = stage.app(main)
if __name__ == "__main__":
    app()
