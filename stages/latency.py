"""latency: the time of a layer by its width on this machine (forward passes; only for that objective)."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Time layers of several widths and fit a line to each part."""
    import typer

    from libprune.pipeline.artifacts import read_architecture
    from libprune.pipeline.atomic import write_json
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params

    layout, settings = Layout(artifacts), load_params(params)
    architecture = read_architecture(layout)
    if settings.allocate.objective != "latency":
        write_json(layout.latency, {"model": architecture.fingerprint})
        typer.echo(f"allocate.objective is {settings.allocate.objective}: nothing is timed")
        return

    from libprune.models.compute import resolve_device, resolve_dtype
    from libprune.models.folder import load_config, require_positions
    from libprune.statistics.latency import fit_lines, time_layers

    device = resolve_device(settings.compute.device)
    dtype = resolve_dtype(settings.compute.dtype, device)
    section, config = settings.latency, load_config(layout.model)
    require_positions(config, architecture, {"latency.tokens": section.tokens})
    lines = fit_lines(architecture, time_layers(config, architecture, device, dtype, section))
    machine = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    write_json(layout.latency, {"model": architecture.fingerprint, **section.model_dump(), **machine, **lines})
    for part, seconds in lines["unit"].items():
        typer.echo(f"{part}: {1e6 * seconds:.3g} µs a unit, {1e3 * seconds * architecture.units(part):.3g} ms a layer")
    typer.echo(
        f"rest of a layer: {1e3 * lines['fixed']:.3g} ms; the lines miss by {100 * lines['misfit']:.0f} % at most"
    )


app = stage.app(main)
if __name__ == "__main__":
    app()
