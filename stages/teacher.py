"""teacher: the text that the pruned model is trained on, and what the dense model predicts there (forward passes)."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Draw the text to train on, and store the dense model's predictions if `recover.top_k` asks for them."""
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.pipeline.terminal import note
    from libprune.recovery.idle import write_no_text

    layout, settings = Layout(artifacts), load_params(params)
    if settings.recover.method == "none":
        if stage.first_process():
            write_no_text(layout)
            note("recover.method is none: no text to train on is drawn")
        return

    from libprune.pipeline.sections import Recover
    from libprune.recovery.teacher import teach_layout

    asked = Recover(  # no other key of the section changes the text or what is predicted on it
        teacher=settings.recover.teacher,
        text=settings.recover.text,
        length=settings.recover.length,
        tokens=settings.recover.tokens,
        held_out=settings.recover.held_out,
        temperature=settings.recover.temperature,
        top_k=settings.recover.top_k,
        seed=settings.recover.seed,
    )
    teach_layout(layout, settings.compute, asked, settings.tokenize)


app = stage.app(main)
if __name__ == "__main__":
    app()
