"""Which tokens of a model a text needs, and the tokenizer that has no others."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from libprune.engine.architecture import Architecture
from libprune.engine.errors import LibpruneError
from libprune.pipeline.sections import Vocabulary
from libprune.texts.chosen import vocabulary_source
from libprune.texts.source import chat_writer, open_text
from libprune.vocabulary.pieces import Pieces, Rules, pieces_of
from libprune.vocabulary.rows import named_ids, token_axes
from libprune.vocabulary.tokenizer import count_tokens, differing, encoded, framing_ids, reloaded, rules_of, with_ids

_BETWEEN = "\n\n"
"""What stands between documents where windows run over their ends."""
_SEQUENCES, _LENGTH = 4, 16
"""Sequences of the text, and tokens of each, by which the cut is proved."""


@dataclass(frozen=True)
class Choice:
    """Which tokens stay.

    Attributes:
        tokens: the ids of the tokens that stay, ascending; new ids are places in this list.
        rows: those of them that the model has rows for.
        before: the number of rows that the model had.
        given: the tokenizer.json as it was given.
        known: number of tokens that it has.
        tokenizer: the one with the tokens that stay.
        text: the name of the text.
        documents: number of documents that were read.
        proof: token ids of beginnings of the text, each a list, as they are now.
    """

    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    before: int
    given: Rules
    known: int
    tokenizer: PreTrainedTokenizerBase
    text: str
    documents: int
    proof: tuple[tuple[int, ...], ...]

    @cached_property
    def new(self) -> dict[int, int]:
        """The new ids by the old ones."""
        return {old: new for new, old in enumerate(self.tokens)}


def choose(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, architecture: Architecture, params: Vocabulary
) -> Choice:
    """Find the tokens that a text needs, and make the tokenizer that has no others.

    Args:
        model: whose configs name tokens that stay.
        tokenizer: of the model.
        architecture: the description of the model.
        params: the text, and how often it must use a token.

    Raises:
        LibpruneError: if the text cannot be read, or the tokenizer or the model is of a kind that is not known.
    """
    rules = rules_of(tokenizer)
    pieces, given = pieces_of(rules), tokenizer.backend_tokenizer
    size = architecture.sizes[token_axes(architecture)[0]]
    source = vocabulary_source(params)
    documents = list(islice(open_text(source, chat_writer(tokenizer)).documents(), params.documents))
    texts = [*documents, _BETWEEN.join(documents)]
    always = [*params.keep, *_conversations(tokenizer)]
    kept = _needed(given, pieces, texts, always, params.minimum)
    kept |= {token["id"] for token in rules["added_tokens"]} | set(framing_ids(rules))
    kept |= {index for index in named_ids(model) if 0 <= index < size}
    kept = pieces.closed(kept)
    _fill(kept, pieces, size, params.multiple)
    new = {old: place for place, old in enumerate(sorted(kept))}
    trimmed = reloaded(tokenizer, with_ids(rules, pieces, new))
    exact = [*texts, *always] if params.minimum == 1 else always
    if (text := differing(given, trimmed.backend_tokenizer, new, exact)) is not None:
        raise LibpruneError(
            f"the tokenizer without unused tokens cuts the text {text[:60]!r} into other tokens than before. This is a "
            "defect of libprune; please report it, and set prepare.vocabulary to null"
        )
    tokens, rows = tuple(new), tuple(index for index in new if index < size)
    proof = tuple(_beginnings(trimmed.backend_tokenizer, documents, len(rows)))
    return Choice(tokens, rows, size, rules, len(tokenizer), trimmed, source.name, len(documents), proof)


def _needed(given: Tokenizer, pieces: Pieces, texts: list[str], always: list[str], minimum: int) -> set[int]:
    """The tokens that texts use often enough, or others at all, and those that cannot be missing."""
    *documents, joined = texts
    counts = [count_tokens(given, some, pieces.unknown) for some in (documents, [joined], always)]
    used = pieces.base()
    for found, least in zip(counts, (minimum, minimum, 1), strict=True):
        used.update(np.flatnonzero(found.of >= least).tolist())
        used = used.union(*map(pieces.looked_up, found.unknown))
    return used


def _conversations(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Conversations as the chat template writes them, whose own words are not in a text."""
    if tokenizer.chat_template is None:
        return
    write: Callable[[Any], str] = chat_writer(tokenizer)
    for roles in (("system", "user", "assistant"), ("user", "assistant"), ("user",)):
        try:
            yield write([{"role": role, "content": "a"} for role in roles])
        except Exception:
            continue


def _fill(kept: set[int], pieces: Pieces, size: int, multiple: int) -> None:
    """Add the most useful further tokens until the rows that stay are a multiple, as far as there are tokens."""
    rows, more = sum(index < size for index in kept), pieces.more(frozenset(kept))
    while rows % multiple and (index := next(more, None)) is not None:
        kept.add(index)
        rows += index < size


def _beginnings(tokenizer: Tokenizer, documents: Sequence[str], rows: int) -> Iterator[tuple[int, ...]]:
    """The first tokens of some documents, as far as the model has rows for them."""
    several = (encoding.ids for _, encoding in encoded(tokenizer, documents[:_SEQUENCES]))
    known = (tuple(index for index in ids[:_LENGTH] if index < rows) for ids in several)
    return filter(None, known)
