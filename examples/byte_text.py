"""Text as UTF-8 bytes: its three parts, the streams that a recurrent network reads, and a floor by frequencies."""

import math
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from libprune.engine.errors import SourceError

if TYPE_CHECKING:
    from torch import Tensor

NEWS = "package://gensim/test/test_data/lee_background.cor"
"""Short news texts, 0.35 MB, that ship in the package gensim."""
BYTES = 256
"""How many different ones there are."""
_SHARE = 0.1
"""Of validation, and of evaluation."""


class Parts(NamedTuple):
    """Three pieces of a text, one after the other, ``[bytes]`` each."""

    training: "Tensor"
    """The first eight tenths: weights are learned, and pruning is calibrated, on it."""
    validation: "Tensor"
    """The next tenth: the epoch is chosen by it."""
    evaluation: "Tensor"
    """The last tenth: nothing is learned from it or chosen by it."""


def read_bytes(text: str) -> "Tensor":
    """The bytes ``[bytes]`` of all documents of a text, joined by newlines.

    Raises:
        SourceError: if it cannot be read.
    """
    import torch

    from libprune.pipeline.sections import Tokenize
    from libprune.texts.chosen import calibration_source
    from libprune.texts.source import open_text

    joined = "\n".join(open_text(calibration_source(Tokenize(text=text))).documents())
    return torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8).long()


def split(ids: "Tensor") -> Parts:
    """The parts of a text ``[bytes]``."""
    size = round(_SHARE * len(ids))
    return Parts(*ids.split([len(ids) - 2 * size, size, size]))


def streams(ids: "Tensor", batch: int) -> "Tensor":
    """A piece of a text cut into equal pieces, ``[batch, bytes]``; what is left over at the end is dropped.

    Raises:
        SourceError: if it is too short for so many, of two bytes each at least.
    """
    length = len(ids) // batch
    if length < 2:
        raise SourceError(
            f"a part of the text has {len(ids):,} bytes, too few for {batch} streams; give a text of some "
            f"{math.ceil(2 * batch / _SHARE):,} bytes or more, or a smaller --batch"
        )
    return ids[: batch * length].view(batch, length)


def unigram_loss(training: "Tensor", validation: "Tensor") -> float:
    """The loss, in nats a byte, of the bytes' frequencies in training with one added to each count.

    Of validation the bytes count that a model is asked for: all but the first of each stream.
    """
    counts, asked = Counter(training.flatten().tolist()), validation[:, 1:].flatten().tolist()
    total = training.numel() + BYTES
    return -sum(math.log((counts[byte] + 1) / total) for byte in asked) / len(asked)
