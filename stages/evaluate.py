"""evaluate: perplexity, size and speed of the dense and the pruned model, side by side."""

from libprune import stage


def main(
    params: stage.ParamsFile = stage.PARAMS,
    artifacts: stage.Root = stage.ROOT,
    metrics: stage.Metrics = stage.METRICS,
) -> None:
    """Measure both models on the evaluation windows, and time them alternately."""
    from libprune.artifacts import Layout, write_json
    from libprune.comparison import compare
    from libprune.params import load_params

    settings = load_params(params)
    result = compare(Layout(artifacts), settings.compute, settings.evaluate)
    write_json(metrics / "evaluation.json", result | {"peak_memory_bytes": stage.peak_memory()})


app = stage.app(main)
if __name__ == "__main__":
    app()
