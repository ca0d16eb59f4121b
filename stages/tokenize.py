"""tokenize: calibration and evaluation windows from disjoint documents."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Draw calibration sequences and evaluation windows from the texts and tokenize them."""
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.pipeline.terminal import note, say
    from libprune.texts.tokenize import tokenize_layout

    layout, settings = Layout(artifacts), load_params(params)
    for line in tokenize_layout(layout, settings.tokenize, settings.compute.device, settings.compute.dtype):
        said, _, read = line.partition("; read were ")
        say(said)
        if read:
            note(f"read were {read}")


app = stage.app(main)
if __name__ == "__main__":
    app()
