"""What a smaller vocabulary costs: a text that is not the one whose tokens stayed is cut into more tokens."""

import json
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from libprune.engine.architecture import Architecture
from libprune.models.sequences import NO_TARGET, Sequences
from libprune.pipeline.artifacts import read_json, same_origin
from libprune.pipeline.layout import Layout


def vocabulary_figures(
    layout: Layout, architecture: Architecture, windows: Sequences, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any] | None:
    """The size of the vocabulary before and after, and the tokens of the evaluation text; None where all tokens stay.

    The text is what the windows say without special tokens, cut anew by both tokenizers.

    Args:
        layout: holds what prepare wrote of the vocabulary.
        architecture: the description of the dense model.
        windows: of the evaluation text.
        tokenizer: of the dense model, without the tokens that went.

    Raises:
        ArtifactError: if the artifact is missing or damaged, or of another model.
    """
    known = read_json(layout.vocabulary, "prepare")
    same_origin(layout.vocabulary, known, {"model": architecture.fingerprint})
    if architecture.trimmed is None:
        return None
    ids = windows.ids
    if windows.targets is not None and windows.targets.ndim == 2:
        ids = torch.where(windows.targets == NO_TARGET, ids, windows.targets)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()]
    given = Tokenizer.from_str(json.dumps(known["tokenizer"]))
    given.no_truncation()  # which its file may ask for
    given.no_padding()
    cut = {
        "before": sum(len(given.encode(text, add_special_tokens=False).ids) for text in texts),
        "after": sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts),
    }
    characters = sum(map(len, texts))
    return {
        **{key: known[key] for key in ("text", "documents", "tokens", "rows", "parameters")},
        "evaluation": {"characters": characters, "tokens": cut},
        "per_1000_characters": {when: 1000 * number / max(1, characters) for when, number in cut.items()},
    }
