"""allocate: which units go, so that the asked share of the parameters does."""

from typing import Any

from libprune.pipeline import stage


def main(
    params: stage.ParamsFile = stage.PARAMS,
    artifacts: stage.Root = stage.ROOT,
    metrics: stage.MetricsFolder = stage.METRICS,
) -> None:
    """Turn scores and a budget into a plan."""
    import typer

    from libprune.allocation.advice import diagnosis, fixed_scores
    from libprune.allocation.allocate import compares, decide, settle_ratio, summary
    from libprune.allocation.block_worth import with_worth
    from libprune.allocation.evidence import read_evidence
    from libprune.pipeline.artifacts import read_architecture, read_table, same_origin, write_table
    from libprune.pipeline.atomic import write_json
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params

    layout, everything = Layout(artifacts), load_params(params)
    settings = everything.allocate
    architecture = read_architecture(layout)
    scores, meta = read_table(layout.scores, "score")
    same_origin(layout.scores, meta, {"model": architecture.fingerprint})
    fixed = fixed_scores(layout, architecture, scores, meta, settings)
    scores = with_worth(layout, architecture, fixed.scores, meta, settings)
    evidence = read_evidence(layout, architecture, scores, meta, settings)
    search = None
    if settings.method == "search" and settings.evaluations:
        from libprune.allocation.search import Search
        from libprune.statistics.levels import order_digest, unit_orders

        order = order_digest(unit_orders(architecture, scores))
        comparable = compares(meta, settings)
        search = Search(layout, architecture, everything.compute, everything.levels, evidence, order, comparable)
    settings = settle_ratio(architecture, scores, settings, evidence)
    decision = decide(architecture, scores, meta, settings, evidence, search)
    found = diagnosis(fixed, architecture, decision.plan, settings, meta["gradient_orders"])
    chosen: dict[str, Any] = {
        "ratio_asked": everything.allocate.ratio,
        "shape": decision.shape,
        "split": decision.split,
        "kept_set_overlap": dict(decision.overlap),
    }
    made = meta | settings.model_dump() | chosen | {"diagnosis": found}
    write_table(layout.plan, scores | {"keep": decision.keep_column}, made)
    result = summary(architecture, decision, settings) | {"diagnosis": found}
    if search is not None and search.found is not None:
        best = search.found
        result |= {"divergence": best.divergence, "divergence_of": dict(best.starts), "trials": best.evaluations}
    write_json(metrics / "allocation.json", result)
    shares = [100 * result[f"{what}share_removed"] for what in ("", "decoder_", "total_")]
    asked = "asked for" if everything.allocate.ratio is not None else "retention allows"
    typer.echo(
        f"{asked} {100 * result['ratio']:.2f} % of the {settings.ratio_of} {settings.objective}, removed "
        "{:.2f} %: {:.2f} % of the decoder's parameters, {:.2f} % of all".format(*shares)
        + f"; shape {decision.shape}"
    )
    for sentence in found["advice"]:
        typer.echo(f"note: {sentence}")


app = stage.app(main)
if __name__ == "__main__":
    app()
