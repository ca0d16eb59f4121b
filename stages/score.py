"""score: the global importance table, from cached per-unit sums alone."""

from libprune import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Score every removable unit by the chosen criterion."""
    from libprune.artifacts import Layout, write_table
    from libprune.criteria import find_criterion, join_tables, score_units
    from libprune.params import load_params

    layout, settings = Layout(artifacts), load_params(params).score
    criterion = find_criterion(settings.criterion)
    table, meta = join_tables(layout, criterion, settings)
    scores = score_units(table, settings)
    nature = {"comparable": criterion.comparable, "gradient_orders": dict(criterion.orders)}
    write_table(layout.scores, scores, meta | settings.model_dump() | nature)


app = stage.app(main)
if __name__ == "__main__":
    app()
