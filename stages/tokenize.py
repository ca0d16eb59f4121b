"""tokenize: calibration and evaluation windows from disjoint documents."""

from libprune.pipeline import stage


def main(params: stage.ParamsFile = stage.PARAMS, artifacts: stage.Root = stage.ROOT) -> None:
    """Draw calibration sequences and evaluation windows from the texts and tokenize them."""
    import typer
    from transformers import AutoTokenizer

    from libprune.models.folder import load_config, require_positions
    from libprune.models.tokens import write_tokens
    from libprune.pipeline.artifacts import read_architecture, require
    from libprune.pipeline.layout import Layout
    from libprune.pipeline.params import load_params
    from libprune.texts.draw import draw_texts
    from libprune.texts.labels import draw_examples
    from libprune.texts.self_text import SelfText

    layout, settings = Layout(artifacts), load_params(params)
    architecture = read_architecture(layout)
    lengths = ("calibration_length", "evaluation_length")
    asked = {f"tokenize.{name}": getattr(settings.tokenize, name) for name in lengths}
    config = load_config(require(layout.model, "prepare"))
    require_positions(config, architecture, asked)
    tokenizer = AutoTokenizer.from_pretrained(layout.model, local_files_only=True)
    writer = SelfText(layout, architecture, tokenizer, settings.compute.device, settings.compute.dtype)
    if architecture.head == "sequence_classification":
        calibration, evaluation = draw_examples(settings.tokenize, tokenizer, config)
    else:
        calibration, evaluation = draw_texts(settings.tokenize, tokenizer, writer.sample, architecture.head)
    texts = (
        ("calibration", layout.calibration_tokens, calibration),
        ("evaluation", layout.evaluation_tokens, evaluation),
    )
    for what, path, drawn in texts:
        write_tokens(path, drawn.sequences, {"model": architecture.fingerprint} | drawn.provenance)
        typer.echo(drawn.sentence(what))
    writer.forget()


app = stage.app(main)
if __name__ == "__main__":
    app()
