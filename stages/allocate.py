"""allocate: which units go, so that the asked share of the parameters does."""

from libprune.pipeline import stage


def main(
    params: stage.ParamsFile = stage.PARAMS,
    artifacts: stage.Root = stage.ROOT,
    metrics: stage.MetricsFolder = stage.METRICS,
) -> None:
    """Turn scores and a budget into a plan."""
    import typer

    from libprune.allocation.decide import decide_layout
    from libprune.pipeline.artifacts import write_table
    from libprune.pipeline.atomic import write_json
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.pipeline.terminal import printable

    layout, settings = Layout(artifacts), load_params(params)
    outcome = decide_layout(layout, settings.allocate, settings.compute, settings.levels)
    write_table(layout.plan, outcome.table, outcome.meta)
    write_json(metrics / "allocation.json", outcome.summary)
    for line in outcome.lines:
        typer.echo(printable(line))


app = stage.app(main)
if __name__ == "__main__":
    app()
