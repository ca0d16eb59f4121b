"""The dense model of a layout: loaded from its source, described, written, and its weights summed up by unit."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from libprune.engine.architecture import Architecture
from libprune.engine.describe import describe, require_shared, without_weights
from libprune.engine.errors import ParamsError, SourceError
from libprune.engine.heads import EMBEDDING, Pooling
from libprune.models.families import use_families
from libprune.models.folder import load_model, write_dense
from libprune.models.origin import find_origin
from libprune.models.sentences import pooling_of
from libprune.models.source import find_sentence_files, load_dense, load_dense_config, processor_files, stored_format
from libprune.pipeline.artifacts import write_architecture, write_units
from libprune.pipeline.atomic import write_json
from libprune.pipeline.digests import sealed
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Prepare
from libprune.pipeline.sources import resolve
from libprune.pipeline.terminal import masked, say
from libprune.statistics.weights import weight_columns
from libprune.vocabulary.choose import choose
from libprune.vocabulary.cut import Cut, cut, record


def _require_content(section: Prepare) -> None:
    """Stop if the config of a local folder promises more parameters than its files have bytes, before memory is taken.

    Raises:
        LibpruneError: naming both numbers; or if the config is no model's.
    """
    folder = resolve(section.model)
    if folder is None or folder.is_file():
        return
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    model = without_weights(load_dense_config(section), section.trust_remote_code)
    promised = sum(parameter.numel() for parameter in model.parameters())
    fewest = 2 if stored_format(section) == "mxfp4" else 1  # parameters in a byte
    if 0 < held * fewest < promised:
        raise SourceError(
            f"prepare.model = {section.model!r}: by its config.json it has {promised:,} parameters, but its "
            f".safetensors files have only {held:,} bytes; one of the two is of another model"
        )


def _pooling(section: Prepare, architecture: Architecture) -> tuple[Pooling | None, dict[str, Path]]:
    """How a model without a head makes embeddings, and the files of sentence-transformers; nothing of other models."""
    if architecture.head != EMBEDDING.name:
        if section.pooling is not None:
            raise ParamsError(
                f"prepare.pooling: {section.pooling} is for models without a head, but this one has the head "
                f"{architecture.head}; set it to null"
            )
        return None, {}
    files = find_sentence_files(section)
    pooling, sentence = pooling_of(files, section.pooling)
    say(sentence)
    return pooling, files


def prepare_layout(layout: Layout, section: Prepare) -> None:
    """Load the dense model from its source; write it as a plain folder, its description, origin and per-unit weights.

    Rows of tokens that a text never needs go first, where one is named. What went is written too.

    Args:
        layout: all five are written into it.
        section: the source of the model, and what the user vouches for.

    Raises:
        LibpruneError: if the model cannot be loaded, or is not wholly described by its family.
    """
    use_families(section.families)
    _require_content(section)
    scratch = layout.work
    model, tokenizer = load_dense(section, scratch)
    described = describe(model, accept=section.accept_config, experts=section.experts, heads=section.heads)
    require_shared(described)
    pooling, files = _pooling(section, described)
    trimmed = None
    if section.vocabulary is not None:
        trimmed = cut(model, described, choose(model, tokenizer, described, section.vocabulary))
        tokenizer = trimmed.choice.tokenizer
    written = write_dense(layout.model, model, tokenizer, files | processor_files(section))
    if trimmed is not None:
        model = load_model(layout.model, model.dtype, section.trust_remote_code, scratch=scratch)
        described = _without_rows(model, trimmed, section)
    architecture = replace(described, fingerprint=written, pooling=pooling)
    write_architecture(layout, architecture)
    _write_vocabulary(layout, architecture, trimmed)
    write_json(layout.origin, sealed(asdict(find_origin(section)) | {"model": architecture.fingerprint}))
    columns = partial(weight_columns, architecture, dict(model.named_parameters()))
    write_units(layout.weights, architecture, columns, {"model": architecture.fingerprint, "source": section.model})


def _without_rows(model: PreTrainedModel, trimmed: Cut, section: Prepare) -> Architecture:
    """The description of a model without the rows of unused tokens, proved to compute what it did with them."""
    after = describe(model, accept=section.accept_config, experts=section.experts, heads=section.heads)
    gone, choice = trimmed.prove(model, after), trimmed.choice
    say(
        f"vocabulary: {gone.tokens:,} tokens before, {len(choice.tokenizer):,} now, by {choice.documents:,} documents "
        f"of {masked(choice.text)}; {gone.parameters:,} of {gone.parameters + after.total_parameters:,} parameters went"
    )
    return replace(after, trimmed=gone)


def _write_vocabulary(layout: Layout, architecture: Architecture, trimmed: Cut | None) -> None:
    """Write what went from the vocabulary, or a note that nothing did."""
    what = {"note": NO_VOCABULARY} if trimmed is None else record(trimmed.choice, architecture)
    write_json(layout.vocabulary, sealed(what | {"model": architecture.fingerprint}))


NO_VOCABULARY = "prepare.vocabulary is null: all tokens stay."
