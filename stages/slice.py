"""slice: the pruned model as a Hugging Face folder, repaired, and proved to load."""

from libprune.pipeline import stage


def main(
    params: stage.ParamsFile = stage.PARAMS,
    artifacts: stage.Root = stage.ROOT,
    metrics: stage.MetricsFolder = stage.METRICS,
) -> None:
    """Repair, slice and write the pruned model, reload it in a fresh process and compare its logits."""
    from libprune.pipeline.atomic import write_json, writing_folder
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.pipeline.processes import fresh_python
    from libprune.pipeline.terminal import say

    layout, settings = Layout(artifacts), load_params(params)
    with fresh_python() as python, writing_folder(layout.pruned) as folder:
        from libprune.repair.repairs import discard_fits, print_fits
        from libprune.results.prune import prune

        result, fits = prune(layout, folder, settings.compute, settings.slice, python)
    print_fits(fits)
    write_json(metrics / "slice.json", result)
    discard_fits(layout)
    say(
        f"{layout.pruned} loads in a fresh process without libprune; logits differ from the masked dense model's "
        f"by {result['logit_difference']:.1e} of {result['logit_scale']:.1f}"
    )


app = stage.app(main)
if __name__ == "__main__":
    app()
