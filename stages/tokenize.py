"""tokenize: calibration and evaluation windows from disjoint documents."""

from libprune import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Draw calibration sequences and evaluation windows from the text and tokenize them."""
    from transformers import AutoTokenizer

    from libprune.artifacts import Layout, read_architecture, require
    from libprune.params import load_params
    from libprune.sources import load_documents, require_other_text
    from libprune.tokens import draw, split_documents, spread, windows, write_tokens

    layout, settings = Layout(artifacts), load_params(params).tokenize
    architecture = read_architecture(layout)
    tokenizer = AutoTokenizer.from_pretrained(require(layout.model, "prepare"), local_files_only=True)
    documents = load_documents(settings.text, settings.config, settings.split, settings.column)
    if settings.evaluation_text is None:
        calibration, evaluation = split_documents(documents, settings.evaluation_share)
    else:
        require_other_text(settings.text, settings.split, settings.evaluation_text, settings.evaluation_split)
        calibration = documents
        evaluation = load_documents(
            settings.evaluation_text, settings.config, settings.evaluation_split, settings.column
        )
    drawn = draw(
        windows(calibration, tokenizer, settings.calibration_length),
        settings.calibration_sequences,
        settings.seed,
        "calibration",
    )
    judged = spread(
        windows(evaluation, tokenizer, settings.evaluation_length), settings.evaluation_windows, "evaluation"
    )
    origin = {"model": architecture.fingerprint, "source": settings.text, "documents": len(calibration)}
    write_tokens(layout.calibration, drawn, origin | {"seed": settings.seed})
    write_tokens(
        layout.evaluation,
        judged,
        origin | {"source": settings.evaluation_text or settings.text, "documents": len(evaluation)},
    )


app = stage.app(main)
if __name__ == "__main__":
    app()
