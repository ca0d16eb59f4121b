"""prepare: the dense model as a plain Hugging Face folder, without tokens that no text needs, and its description."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Load the dense model from its source, describe its axes, and write it as a plain folder."""
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.statistics.dense import prepare_layout

    prepare_layout(Layout(artifacts), load_params(params).prepare)


app = stage.app(main)
if __name__ == "__main__":
    app()
