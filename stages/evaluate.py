"""evaluate: perplexity, size and speed of the dense and the pruned model, side by side."""

from libprune.pipeline import stage


def main(
    params: stage.ParamsFile = stage.PARAMS,
    artifacts: stage.Root = stage.ROOT,
    metrics: stage.MetricsFolder = stage.METRICS,
) -> None:
    """Measure both models on the evaluation windows, and time them alternately."""
    from libprune.pipeline.atomic import write_json, writing
    from libprune.pipeline.digests import sealed
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.results.card import card_text
    from libprune.results.evaluate import evaluate_result, headline_metrics

    layout, settings = Layout(artifacts), load_params(params)
    result = evaluate_result(layout, settings.compute, settings.evaluate)
    memory = {"peak_memory_bytes": stage.peak_memory()}
    write_json(layout.evaluation, sealed(result | memory))
    with writing(layout.model_card) as path:
        path.write_text(card_text(layout.recovered if result["recovered"] else layout.pruned, result))
    write_json(metrics / "evaluation.json", headline_metrics(result) | memory)


app = stage.app(main)
if __name__ == "__main__":
    app()
