"""The windows of a layout: calibration and evaluation tokens, drawn from the texts for the model to be pruned."""

from collections.abc import Callable
from dataclasses import replace

from transformers import AutoTokenizer

from libprune.engine.errors import ParamsError, SourceError
from libprune.models.embeddings import FEWEST
from libprune.models.folder import load_config, own_model, require_positions
from libprune.models.tokens import require_known, write_tokens
from libprune.pipeline.artifacts import read_architecture
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Tokenize
from libprune.texts.draw import Drawn, draw_texts
from libprune.texts.labels import draw_examples
from libprune.texts.self_text import SelfText
from libprune.texts.shares import parts_of, several


def tokenize_layout(layout: Layout, params: Tokenize, device: str, dtype: str) -> list[str]:
    """Draw calibration sequences and evaluation windows from disjoint documents, and write their tokens.

    The sequences that the repair is fitted to come from the documents of the calibration text.

    Args:
        layout: holds the model and its description; the tokens are written into it.
        params: which texts, and how much of them.
        device: where the model runs if it writes the text itself, as `compute.device`.
        dtype: the type that it computes in then, as `compute.dtype`.

    Returns:
        A sentence for each text that was drawn, and behind it one for each of several that it is mixed from.

    Raises:
        LibpruneError: if the model is missing, a text cannot be read or is too short, or the windows are longer than
            the model's positions.
    """
    architecture = read_architecture(layout)
    config = load_config(own_model(layout, architecture))
    lengths = {name: getattr(params, name) for name in ("calibration_length", "repair_length", "evaluation_length")}
    require_positions(config, architecture, {f"tokenize.{name}": length or 0 for name, length in lengths.items()})
    if architecture.pooling is not None and params.evaluation_windows < FEWEST:
        raise ParamsError(
            f"tokenize.evaluation_windows: {params.evaluation_windows} are too few for embeddings, which are judged by "
            f"the similarities of pairs; take {FEWEST} or more"
        )
    tokenizer = AutoTokenizer.from_pretrained(layout.model, local_files_only=True, trust_remote_code=False)
    writer = SelfText(layout, architecture, tokenizer, device, dtype)

    def draw(settings: Tokenize) -> tuple[Drawn, Drawn]:
        if architecture.head == "sequence_classification":
            return draw_examples(_labelled(settings), tokenizer, config)
        return draw_texts(settings, tokenizer, writer.sample, architecture.head)

    calibration, evaluation = draw(params)
    texts = {"calibration": calibration, "evaluation": evaluation}
    if (asked := params.repaired_on) != (params.calibration_sequences, params.calibration_length):
        texts["repair"] = _for_repair(draw, params, *asked)
    meta, named = {"model": architecture.fingerprint}, dict[str, str]()
    paths = {"calibration": layout.calibration_tokens, "repair": layout.repair_tokens}
    for name, path in (paths | {"evaluation": layout.evaluation_tokens}).items():
        drawn = texts.get(name, calibration)
        sequences = replace(drawn.sequences, pooling=architecture.pooling)
        require_known(sequences, architecture.sizes["vocab"], tokenizer)
        digest = write_tokens(path, sequences, meta | named | drawn.provenance)
        named = named or {"calibration": digest}
    writer.forget()
    return [sentence for name, drawn in texts.items() for sentence in drawn.sentences(name)]


def _for_repair(draw: Callable[[Tokenize], tuple[Drawn, Drawn]], params: Tokenize, number: int, length: int) -> Drawn:
    """Sequences from the documents of the calibration text, in a number and of a length of their own."""
    sizes = {"calibration_sequences": number, "calibration_length": length}
    try:
        return draw(params.model_copy(update=sizes))[0]
    except SourceError as error:
        keys = "tokenize.repair_sequences and tokenize.repair_length"
        raise SourceError(f"{error}; {keys} ask for {number} sequences of {length} tokens") from error


def _labelled(params: Tokenize) -> Tokenize:
    """The params of the one text that a model takes which tells classes apart."""
    first, *others = parts_of(params)
    if others:
        raise SourceError(several("tokenize"))
    return first
