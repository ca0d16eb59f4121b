"""recover: the pruned model, trained on what the dense model predicts (forward and backward passes)."""

from libprune.pipeline import stage


def main(
    params: stage.ParamsFile = stage.PARAMS,
    artifacts: stage.Root = stage.ROOT,
    metrics: stage.MetricsFolder = stage.METRICS,
) -> None:
    """Train the pruned model, keep the best step, write it as a folder and prove that it loads."""
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.pipeline.terminal import note, say
    from libprune.recovery.idle import write_figures, write_no_model

    layout, settings = Layout(artifacts), load_params(params)
    if settings.recover.method == "none":
        if stage.first_process():
            write_no_model(layout)
            write_figures(metrics, {}, [])
            note("recover.method is none: the pruned model is not trained")
        return

    from libprune.recovery.recover import recover_layout

    recovery = recover_layout(layout, settings.compute, settings.recover, metrics)
    if recovery is not None:
        for line in recovery.sentences():
            say(line)
        say(f"{layout.recovered} loads in a fresh process without libprune")


app = stage.app(main)
if __name__ == "__main__":
    app()
