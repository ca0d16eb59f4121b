"""A tokenizer with fewer tokens: its file written anew, and the tokens of texts counted."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from libprune.engine.errors import SourceError
from libprune.pipeline.atomic import scratch_folder
from libprune.texts.windows import pieces as parts_of
from libprune.vocabulary.pieces import Pieces, Rules

_AT_ONCE = 1 << 20
"""Characters that are tokenized at once."""
_FILE = "tokenizer.json"
_OPTIONS = ("truncation", "padding")
"""What each call of a tokenizer sets anew."""


def rules_of(tokenizer: PreTrainedTokenizerBase) -> Rules:
    """The content of the tokenizer.json of a tokenizer.

    Raises:
        SourceError: if it has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise SourceError(
            f"prepare.vocabulary: the tokenizer is a {type(tokenizer).__name__}, which has no {_FILE}; set it to null, "
            "or save the model with a fast tokenizer"
        )
    rules: Rules = json.loads(backend.to_str())
    return rules


def with_ids(rules: Rules, pieces: Pieces, new: Mapping[int, int]) -> Rules:
    """The content of the tokenizer.json with the kept tokens alone.

    Args:
        rules: the given one.
        pieces: its pieces.
        new: the new ids of the kept tokens by the old ones, in the same order; all added tokens are among them.

    Raises:
        SourceError: for a post-processor of a kind that is not known, which may hold ids.
    """
    added = [{**token, "id": new[token["id"]]} for token in rules["added_tokens"]]
    padding = rules.get("padding")
    return {
        **rules,
        "added_tokens": added,
        "padding": padding and {**padding, "pad_id": new[padding["pad_id"]]},
        "post_processor": _processor(rules.get("post_processor"), new),
        "model": pieces.trimmed(new),
    }


def _processor(step: Rules | None, new: Mapping[int, int]) -> Rules | None:
    """What is done to the tokens of a text, with new ids."""
    if step is None or step["type"] == "ByteLevel":
        return step
    if step["type"] == "Sequence":
        return {**step, "processors": [_processor(one, new) for one in step["processors"]]}
    if step["type"] == "TemplateProcessing":
        special = {
            name: {**token, "ids": [new[index] for index in token["ids"]]}
            for name, token in step["special_tokens"].items()
        }
        return {**step, "special_tokens": special}
    if step["type"] in {"BertProcessing", "RobertaProcessing"}:
        return {**step, **{side: [step[side][0], new[step[side][1]]] for side in ("sep", "cls")}}
    raise SourceError(f"prepare.vocabulary: the tokenizer has a post-processor {step['type']}, which may hold ids")


def framing_ids(rules: Rules) -> Iterator[int]:
    """The tokens that stand around texts or fill them up, which need not be added tokens nor occur in a text."""
    step = rules.get("post_processor") or {}
    for one in step.get("processors", [step]):
        for token in one.get("special_tokens", {}).values():
            yield from token["ids"]
        yield from (one[side][1] for side in ("sep", "cls") if side in one)
    if rules.get("padding"):
        yield rules["padding"]["pad_id"]


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that gives all tokens of a text and no others, whatever length its file asks for."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def reloaded(tokenizer: PreTrainedTokenizerBase, rules: Rules) -> PreTrainedTokenizerBase:
    """A tokenizer of transformers with another tokenizer.json, and all other files of the given one.

    Raises:
        SourceError: if what transformers makes of it is another one.
    """
    with scratch_folder() as folder:
        tokenizer.save_pretrained(folder)
        (folder / _FILE).write_text(json.dumps(rules, ensure_ascii=False))
        for path in folder.iterdir():  # of the given vocabulary
            if path.name in {"vocab.json", "merges.txt", "vocab.txt"} or path.suffix == ".model":
                path.unlink()
        made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    wanted, found = json.loads(Tokenizer.from_str(json.dumps(rules)).to_str()), rules_of(made)
    if other := [key for key in wanted if key not in _OPTIONS and wanted[key] != found.get(key)]:
        raise SourceError(
            f"prepare.vocabulary: transformers makes of a {_FILE} with fewer tokens a {type(made).__name__} with "
            f"another {' and '.join(other)}; set it to null"
        )
    return made


def encoded(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[str, Encoding]]:
    """Texts in parts, each with its tokens, but without those that stand around a text."""
    tokenizer, group, size = plain(tokenizer), list[str](), 0
    for part in (part for text in texts for part in parts_of(text)):
        group.append(part)
        size += len(part)
        if size >= _AT_ONCE:
            yield from zip(group, tokenizer.encode_batch(group, add_special_tokens=False), strict=True)
            group, size = [], 0
    yield from zip(group, tokenizer.encode_batch(group, add_special_tokens=False), strict=True)


@dataclass
class Counts:
    """How often tokens occur in texts.

    Attributes:
        of: by id, ``[largest id + 1]``.
        unknown: the words that are unknown, as they are looked up.
    """

    of: NDArray[np.int64]
    unknown: set[str]


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str], unknown: str | None) -> Counts:
    """Count the tokens of texts.

    Args:
        tokenizer: cuts the texts.
        texts: each by itself.
        unknown: the token for what is unknown.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True)
    counts = Counts(np.zeros(1 + max(ids.values()), dtype=np.int64), set())
    nothing = -1 if unknown is None else ids.get(unknown, -1)
    for text, one in encoded(tokenizer, texts):
        found = np.array(one.ids, dtype=np.int64)
        counts.of += np.bincount(found, minlength=len(counts.of))
        for place in np.flatnonzero(found == nothing):
            start, end = one.offsets[place]
            word = text[start:end]
            counts.unknown.add(tokenizer.normalizer.normalize_str(word) if tokenizer.normalizer else word)
    return counts


def differing(given: Tokenizer, trimmed: Tokenizer, new: Mapping[int, int], texts: Iterable[str]) -> str | None:
    """The first part of texts whose tokens are others than before; None if there is none."""
    texts = list(texts)
    for (text, before), (_, after) in zip(encoded(given, texts), encoded(trimmed, texts), strict=True):
        if [new.get(index) for index in before.ids] != after.ids:
            return text
    return None
