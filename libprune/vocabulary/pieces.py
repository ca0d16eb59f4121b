"""The pieces of a tokenizer by its kind: which of them a text needs, so that it is cut as before without the others.

All three kinds look for pieces in a fixed order: of merges (BPE), of lengths (WordPiece), of scores (Unigram). What a
text uses comes first in this order, and still does so where pieces go that it does not use.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from libprune.engine.errors import SourceError

Rules = dict[str, Any]
"""The content of a tokenizer.json."""
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""The pieces that stand for single bytes, where characters without a piece are written by their bytes."""


class Pieces:
    """The pieces of a tokenizer of one kind.

    Attributes:
        rules: the tokenizer.
        ids: piece to id.
        whole: whether any text can be written, by bytes.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules, self.model = rules, rules["model"]
        self.ids: Mapping[str, int] = self._ids()
        self.whole = self._writes_bytes()

    @cached_property
    def texts(self) -> dict[int, str]:
        """Id to piece."""
        return {index: piece for piece, index in self.ids.items()}

    def base(self) -> set[int]:
        """The pieces that stay whatever the text is, so that all that could be written can still be written.

        These are the bytes where there are some, else all single characters; and the one for what is unknown. Beside
        bytes those characters stay that stand for something else, such as a space, which their bytes do not.
        """
        single = [piece for piece in self.ids if self._is_single(piece)]
        if self.whole:
            single = [*self._alphabet(), *self._signs(single)]
        return {self.ids[piece] for piece in [*single, self.unknown or ""] if piece in self.ids}

    def _signs(self, characters: Iterable[str]) -> Iterator[str]:
        """The characters that do not stand for themselves in the text that tokens are put together to."""
        decoder = Tokenizer.from_str(json.dumps(self.rules)).decoder
        if decoder is not None and self.model.get("byte_fallback"):
            yield from (one for one in characters if decoder.decode(["a", one, "a"]) != f"a{one}a")

    def closed(self, used: Collection[int]) -> set[int]:
        """The pieces that are used, and those that are needed to come to them."""
        return set(used)

    def looked_up(self, word: str) -> set[int]:
        """The pieces that are found in a word before it is known to be unknown."""
        return set()

    def more(self, kept: Collection[int]) -> Iterator[int]:
        """Further pieces, the most useful first; each needs no others than those that are kept or came before it."""
        return (index for index in sorted(self.texts) if index not in kept)

    def trimmed(self, new: Mapping[int, int]) -> Rules:
        """The `model` of the tokenizer with the kept pieces under new ids, given by the old ones."""
        vocab = {piece: new[index] for piece, index in self.ids.items() if index in new}
        return {**self.model, "vocab": vocab}

    def _ids(self) -> Mapping[str, int]:
        ids: Mapping[str, int] = self.model["vocab"]
        return ids

    def _writes_bytes(self) -> bool:
        return bool(self.model.get("byte_fallback")) and set(_BYTES) <= self.ids.keys()

    def _alphabet(self) -> Collection[str]:
        return _BYTES

    def _is_single(self, piece: str) -> bool:
        return len(piece) == 1

    @property
    def unknown(self) -> str | None:
        """The piece for what is unknown; None if there is none."""
        found: str | None = self.model.get("unk_token")
        return found


class Merged(Pieces):
    """BPE: neighbouring pieces are merged, always the pair that stands first in the list of merges.

    Removed merges are some that never happen on the text. Where a merge happens it is the first in the list that can;
    so it is in a part of this list that still holds it. Hence every state of every word is the same as before.
    """

    def __init__(self, rules: Rules) -> None:
        super().__init__(rules)
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if self.model.get(key):
                raise SourceError(
                    f"prepare.vocabulary: the tokenizer marks parts of words ({key}: {self.model[key]!r}), which is "
                    "not supported for BPE; set it to null"
                )
        merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in self.model["merges"])
        self._merges = [(first, second) for first, second in merges]
        self._ranks = {pair: rank for rank, pair in enumerate(self._merges)}

    def closed(self, used: Collection[int]) -> set[int]:
        """The pieces that are used, and all that they are merged from on the way.

        No merge crosses the ends of a piece before the piece is done, so that the way to it is the same in every word.
        """
        found = set(used)
        for index in used:
            found.update(self._way(self.texts[index]) if index in self.texts else ())
        return found

    def more(self, kept: Collection[int]) -> Iterator[int]:
        """Further pieces in the order of merges, then characters, and what is merged from these."""
        known = set(kept)
        yield from self._results(known)
        for index in sorted(index for piece, index in self.ids.items() if self._is_single(piece)):
            if index not in known:
                known.add(index)
                yield index
        yield from self._results(known)

    def _results(self, known: set[int]) -> Iterator[int]:
        """What known pieces are merged to, in the order of merges; each is known from then on."""
        for first, second in self._merges:
            result = self.ids[first + second]
            if result not in known and {self.ids[first], self.ids[second]} <= known:
                known.add(result)
                yield result

    def trimmed(self, new: Mapping[int, int]) -> Rules:
        """The `model` without merges that lack a part or their result."""

        def stays(piece: str) -> bool:
            return self.ids[piece] in new

        merges = [list(pair) for pair in self._merges if all(map(stays, (*pair, "".join(pair))))]
        return {**super().trimmed(new), "merges": merges}

    def _way(self, piece: str) -> set[int]:
        """The pieces from which one is merged, from single characters or their bytes on.

        One that merges do not lead to is used where it is a whole word (`ignore_merges`), or stands for a byte.
        """
        parts, found = self._characters(piece), set[int]()
        while True:
            found.update(self.ids[part] for part in parts if part in self.ids)
            ranks = [self._ranks.get(pair, len(self._merges)) for pair in pairwise(parts)]
            if min(ranks, default=len(self._merges)) == len(self._merges):
                return found
            place = ranks.index(min(ranks))
            parts = [*parts[:place], parts[place] + parts[place + 1], *parts[place + 2 :]]

    def _characters(self, piece: str) -> list[str]:
        if not self.model.get("byte_fallback"):
            return list(piece)
        known = ([one] if one in self.ids else [_BYTES[byte] for byte in one.encode()] for one in piece)
        return [part for parts in known for part in parts]

    def _writes_bytes(self) -> bool:
        return super()._writes_bytes() or any(step.get("type") == "ByteLevel" for step in steps(self.rules))

    def _alphabet(self) -> Collection[str]:
        return _BYTES if self.model.get("byte_fallback") else ByteLevel.alphabet()


class Longest(Pieces):
    """WordPiece: a word is cut into the longest pieces from its beginning on, or it is unknown as a whole."""

    def looked_up(self, word: str) -> set[int]:
        """The longest pieces from the beginning of a word on, up to where there is none."""
        start, found = 0, set[int]()
        while start < len(word):
            prefix = self.model["continuing_subword_prefix"] if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in self.ids)
            end = next(ends, None)
            if end is None:
                return found
            found.add(self.ids[prefix + word[start:end]])
            start = end
        return found

    def _is_single(self, piece: str) -> bool:
        return len(piece.removeprefix(self.model["continuing_subword_prefix"])) == 1


class Scored(Pieces):
    """Unigram: a text is cut into the pieces whose scores have the largest sum.

    The best cut stays the best where others are no longer possible. What a character without a piece costs depends on
    the lowest score of all pieces, so that the piece with this score stays.
    """

    def base(self) -> set[int]:
        """The pieces that stay whatever the text is, the one with the lowest score among them."""
        scores = [score for _, score in self.model["vocab"]]
        return super().base() | {scores.index(min(scores))}

    def trimmed(self, new: Mapping[int, int]) -> Rules:
        """The `model` with the kept pieces, whose places are their ids."""
        vocab = [entry for index, entry in enumerate(self.model["vocab"]) if index in new]
        unknown = self.model["unk_id"]
        return {**self.model, "vocab": vocab, "unk_id": None if unknown is None else new[unknown]}

    def _ids(self) -> Mapping[str, int]:
        return {piece: index for index, (piece, _) in enumerate(self.model["vocab"])}

    @property
    def unknown(self) -> str | None:
        """The piece for what is unknown; None if there is none."""
        index = self.model["unk_id"]
        return None if index is None else str(self.model["vocab"][index][0])


_KINDS: dict[str, Callable[[Rules], Pieces]] = {"BPE": Merged, "WordPiece": Longest, "Unigram": Scored}


def pieces_of(rules: Rules) -> Pieces:
    """The pieces of a tokenizer.

    Raises:
        SourceError: for a kind that is not known.
    """
    kind = rules["model"].get("type")
    if kind not in _KINDS:
        raise SourceError(
            f"prepare.vocabulary: the tokenizer is of the kind {kind}; rows can go from those of the kinds "
            f"{', '.join(_KINDS)}; set it to null"
        )
    return _KINDS[kind](rules)


def steps(rules: Rules) -> Iterator[Rules]:
    """What a tokenizer does to a text before it is cut into pieces, step by step."""
    for key, several in {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}.items():
        step = rules.get(key) or {}
        yield from step.get(several, [step])
