"""Several texts with shares: what is drawn from each, and in which order their sequences stand."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from libprune.pipeline.sections import MOST_TEXTS, Share, Tokenize
from libprune.texts.chosen import SELF

Places = NDArray[np.int64]
"""Indices of sequences."""
Named = str | tuple[Share, ...]
"""One text, or several with shares, as `tokenize.text` and `recover.text` name them."""


def shares_of(text: Named) -> tuple[Share, ...]:
    """The texts with their shares; one text has all."""
    return text if isinstance(text, tuple) else (Share(text=text, share=1.0),)


def several(section: str) -> str:
    """What is wrong with a list of texts in a section, for a model that tells classes apart."""
    return f"{section}.text lists several texts, but a model that tells classes apart takes one; name one"


def keys_of(share: Share) -> dict[str, Any]:
    """The keys of one of several texts, as those of `tokenize` that say what is read."""
    return share.model_dump(exclude={"share"})


def divided(number: int, shares: Sequence[float]) -> list[int]:
    """A number divided by shares that make 1, so that the parts make the number; but each part is at least 1."""
    ends = np.round(np.cumsum([0, *shares]) * number)
    return np.diff(ends).clip(1).astype(int).tolist()


def parts_of(settings: Tokenize) -> list[Tokenize]:
    """The settings of each text alone: its keys, and how many sequences and windows are drawn from it.

    Where the evaluation text is one of its own, the number of evaluation windows is not divided. Else the windows are
    divided by the shares of the texts that are read. `self` gives windows only where it stands alone, since they would
    say nothing of any text; its number is 0 beside others.
    """
    if isinstance(settings.text, str):
        return [settings]
    texts = settings.text
    counts = divided(settings.calibration_sequences, [one.share for one in texts])
    windows = _windows(settings, texts)
    return [
        settings.model_copy(update=keys_of(one) | {"calibration_sequences": count, "evaluation_windows": number})
        for one, count, number in zip(texts, counts, windows, strict=True)
    ]


def _windows(settings: Tokenize, texts: tuple[Share, ...]) -> list[int]:
    if settings.evaluation_text is not None:
        return [settings.evaluation_windows] * len(texts)
    shares = judging_shares(texts)
    numbers = iter(divided(settings.evaluation_windows, [share for share in shares if share]))
    return [next(numbers) if share else 0 for share in shares]


def judging_shares(texts: Sequence[Share]) -> list[float]:
    """The share of the evaluation windows that each text gives where none judges alone; 0 of `self` beside others."""
    read = [0.0 if one.text == SELF else one.share for one in texts]
    given = read if any(read) else [one.share for one in texts]
    return [share / sum(given) for share in given]


def judging(settings: Tokenize) -> Tokenize:
    """The settings that `evaluation_text` is read by: those of the listed text of this name, or of none of the list."""
    parts = parts_of(settings)
    if len(parts) == 1:
        return parts[0]
    return next(
        (part for part in parts if part.text == settings.evaluation_text),
        settings.model_copy(update={"text": parts[0].text}),  # whose other keys are null
    )


def mixed(counts: Sequence[int], seed: int) -> Places:
    """An order of the sequences of several texts in which every beginning and every end holds the shares.

    The first sequences of a text stay before its later ones. The places of the texts are drawn within even distances,
    so that no regular choice, such as every eighth sequence, falls on one text alone.

    Args:
        counts: number of sequences of each text, at least 1.
        seed: seed of the places.

    Returns:
        Indices ``[sum of counts]`` into the sequences of the first text, then those of the second, and so on. Of the
        first k of N sequences, a text with n of the N has n k / N, up to less than 1 + n / N times the number of texts.
    """
    rng = np.random.default_rng(seed)
    places = [(np.arange(count) + rng.random(count)) / count for count in counts]
    return np.argsort(np.concatenate(places), kind="stable")


def rows_of(order: Places, counts: Sequence[int]) -> list[Places]:
    """Where the sequences of each text stand in an order that `mixed` gives, ascending."""
    ends = np.cumsum([0, *counts])
    return [np.flatnonzero((order >= first) & (order < last)) for first, last in pairwise(ends)]


def named(shares: Sequence[tuple[str, float]]) -> str:
    """The names of texts, each with its share if there are several."""
    if len(shares) == 1:
        return shares[0][0]
    return ", ".join(f"{100 * share:.3g} % {name}" for name, share in shares)


def numbered(name: str, key: str, text: Named | None) -> dict[str, tuple[str, str | None]]:
    """The sources that a key of params.yaml names, by the names of their links, for all texts that it may list.

    Args:
        name: what the names of the links begin with.
        key: the key.
        text: its value.

    Returns:
        By the name of a link, from 1 on, the key and the text; None where there are no more texts.
    """
    texts = [one.text for one in shares_of(text)] if text else []
    return {f"{name}-{place + 1}": (key, texts[place] if place < len(texts) else None) for place in range(MOST_TEXTS)}
