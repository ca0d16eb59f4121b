"""ablation: the measured loss increase of masking single sampled units (forward passes)."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Measure the loss increase of masking single sampled units."""
    from libprune.pipeline.artifacts import read_architecture, write_table
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.pipeline.terminal import note
    from libprune.statistics.ablation import empty_table, measure_ablation, print_ablation

    layout, settings = Layout(artifacts), load_params(params)
    section = settings.ablation
    if section.units == 0:
        if stage.first_process():
            model = read_architecture(layout).fingerprint
            write_table(layout.ablation, empty_table(), {"model": model, "units": 0, "seed": section.seed})
            note("ablation.units is 0: nothing measured")
        return
    measured = measure_ablation(layout, settings.compute, section)
    if measured is not None:
        print_ablation(*measured)


app = stage.app(main)
if __name__ == "__main__":
    app()
