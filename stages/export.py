"""export: the final model in the formats of other programs, each tried in the program itself."""

from libprune.pipeline import stage


def main(
    params: stage.ParamsFile = stage.PARAMS,
    artifacts: stage.Root = stage.ROOT,
    metrics: stage.MetricsFolder = stage.METRICS,
) -> None:
    """Write the final model as GGUF, ONNX or OpenVINO, and try it in the real program beside the dense one."""
    from libprune.pipeline.artifacts import write_nothing
    from libprune.pipeline.atomic import write_json, writing_folder
    from libprune.pipeline.digests import sealed
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.pipeline.terminal import note, say

    layout, settings = Layout(artifacts), load_params(params)
    if not settings.export.formats:
        write_nothing(layout.exported, {"formats": []})
        write_json(layout.export, {"files": []})
        write_json(metrics / "export.json", {})
        note("export.formats lists no format: nothing is exported")
        return

    from libprune.export.export import export_layout

    with writing_folder(layout.exported) as folder:
        outcome = export_layout(layout, settings.export, folder)
    write_json(layout.export, sealed(outcome.content()))
    write_json(metrics / "export.json", outcome.metrics())
    for line in outcome.sentences(layout.exported):
        say(line)


app = stage.app(main)
if __name__ == "__main__":
    app()
