"""latency: the time of a layer by its width on this machine (forward passes; only where it is a budget)."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Time layers of several widths and fit a line to each part."""
    from libprune.pipeline.artifacts import read_architecture
    from libprune.pipeline.atomic import write_json
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.pipeline.terminal import note, say

    layout, settings = Layout(artifacts), load_params(params)
    architecture = read_architecture(layout)
    if settings.allocate.objective != "latency" and settings.allocate.budgets.latency is None:
        write_json(layout.latency, {"model": architecture.fingerprint})
        note(f"allocate.objective is {settings.allocate.objective}, and no budget is a time: nothing is timed")
        return

    from libprune.statistics.latency import measure_latency

    for line in measure_latency(layout, settings.compute.device, settings.compute.dtype, settings.latency):
        say(line)


app = stage.app(main)
if __name__ == "__main__":
    app()
