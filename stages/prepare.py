"""prepare: the dense model as a plain Hugging Face folder, and its description."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Load the dense model from its source, describe its axes, and write it as a plain folder."""
    from dataclasses import replace
    from functools import partial

    from libprune.engine.describe import describe
    from libprune.models.folder import write_dense
    from libprune.models.source import load_dense
    from libprune.pipeline.artifacts import write_units
    from libprune.pipeline.atomic import writing
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.statistics.weights import weight_columns

    layout, settings = Layout(artifacts), load_params(params).prepare
    model, tokenizer = load_dense(settings)
    described = describe(model, accept=settings.accept_config)
    fingerprint = write_dense(layout.model, model, tokenizer)
    architecture = replace(described, fingerprint=fingerprint)
    with writing(layout.architecture) as partial_file:
        partial_file.write_text(architecture.to_json())
    columns = partial(weight_columns, architecture, dict(model.named_parameters()))
    write_units(layout.weights, architecture, columns, {"model": fingerprint, "source": settings.model})


app = stage.app(main)
if __name__ == "__main__":
    app()
