"""gradients: forward and backward; mean gradients by layer, first-order numbers by unit, batch rows by layer."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Collect the mean gradient of every block parameter and how every unit's mask gradient behaves."""
    from functools import partial

    from libprune.collection.calibration import set_up
    from libprune.collection.resumable import RowsOf, collecting, write_artifact
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.statistics.gradients import (
        collect_gradients,
        gradient_columns,
        gradient_groups,
        layer_rows,
        print_gradients,
        tensor_rows,
    )

    layout, settings = Layout(artifacts), load_params(params)
    section = settings.gradients
    run = set_up(layout, settings.compute, section.sequences)
    size, layers = section.batch_sequences, run.architecture.layers
    in_pieces = run.sequences.lengths is not None or run.at_once < size
    groups = gradient_groups(run.architecture, run.n_tok, -(-run.available // size), section, in_pieces)
    identity = {"second_moments": section.second_moments}
    with collecting(run, "gradients", layout.gradients, groups, size, identity) as work:
        sums = work.accumulator
        collect_gradients(run.model, run.architecture, work.batches(), sums, run.at_once, run.recompute)
        if work.merge():
            rows: dict[str, RowsOf] = {
                "layers": partial(layer_rows, batches=-(-len(run.sequences) // size)),
                "tensors": tensor_rows,
            }
            loss = {"loss": float(sums.finish(layers)["loss"])}
            tables = write_artifact(run, layout.gradients, sums, gradient_columns, loss, rows)
            print_gradients(tables["layers"], layout.gradients)


app = stage.app(main)
if __name__ == "__main__":
    app()
