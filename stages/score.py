"""score: the global importance table, from cached per-unit sums alone."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Score every removable unit by the chosen criterion, or by several."""
    import typer

    from libprune.pipeline.artifacts import write_table
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.pipeline.terminal import printable
    from libprune.scoring.score import fusion_lines, score_layout

    layout = Layout(artifacts)
    scores, meta = score_layout(layout, load_params(params).score)
    write_table(layout.scores, scores, meta)
    for line in fusion_lines(meta):
        typer.echo(printable(line))


app = stage.app(main)
if __name__ == "__main__":
    app()
