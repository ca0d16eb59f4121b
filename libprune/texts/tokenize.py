"""The windows of a layout: calibration and evaluation tokens, drawn from the texts for the model to be pruned."""

from dataclasses import replace

from transformers import AutoTokenizer

from libprune.engine.errors import ParamsError, SourceError
from libprune.models.embeddings import FEWEST
from libprune.models.folder import load_config, own_model, require_positions
from libprune.models.tokens import require_known, write_tokens
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Tokenize
from libprune.texts.draw import draw_texts
from libprune.texts.labels import draw_examples
from libprune.texts.self_text import SelfText
from libprune.texts.shares import parts_of, several


def tokenize_layout(layout: Layout, params: Tokenize, device: str, dtype: str) -> list[str]:
    """Draw calibration sequences and evaluation windows from disjoint documents, and write their tokens.

    Args:
        layout: holds the model and its description; the tokens are written into it.
        params: which texts, and how much of them.
        device: where the model runs if it writes the text itself, as `compute.device`.
        dtype: the type that it computes in then, as `compute.dtype`.

    Returns:
        A sentence for each of the two texts, and behind it one for each of several that it is mixed from.

    Raises:
        LibpruneError: if the model is missing, a text cannot be read or is too short, or the windows are longer than
            the model's positions.
    """
    architecture = read_architecture(layout)
    config = load_config(own_model(layout, architecture))
    lengths = ("calibration_length", "evaluation_length")
    require_positions(config, architecture, {f"tokenize.{name}": getattr(params, name) for name in lengths})
    if architecture.pooling is not None and params.evaluation_windows < FEWEST:
        raise ParamsError(
            f"tokenize.evaluation_windows: {params.evaluation_windows} are too few for embeddings, which are judged by "
            f"the similarities of pairs; take {FEWEST} or more"
        )
    tokenizer = AutoTokenizer.from_pretrained(layout.model, local_files_only=True, trust_remote_code=False)
    writer = SelfText(layout, architecture, tokenizer, device, dtype)
    if architecture.head == "sequence_classification":
        calibration, evaluation = draw_examples(_labelled(params), tokenizer, config)
    else:
        calibration, evaluation = draw_texts(params, tokenizer, writer.sample, architecture.head)
    calibration, evaluation = (
        replace(drawn, sequences=replace(drawn.sequences, pooling=architecture.pooling))
        for drawn in (calibration, evaluation)
    )
    for drawn in (calibration, evaluation):
        require_known(drawn.sequences, architecture.sizes["vocab"], tokenizer)
    meta = {"model": architecture.fingerprint}
    tokens = write_tokens(layout.calibration_tokens, calibration.sequences, meta | calibration.provenance)
    beside = {"calibration": tokens}
    write_tokens(layout.evaluation_tokens, evaluation.sequences, meta | beside | evaluation.provenance)
    writer.forget()
    return [*calibration.sentences("calibration"), *evaluation.sentences("evaluation")]


def _labelled(params: Tokenize) -> Tokenize:
    """The params of the one text that a model takes which tells classes apart."""
    first, *others = parts_of(params)
    if others:
        raise SourceError(several("tokenize"))
    return first
