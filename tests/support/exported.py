"""Tiny pruned folders with a tokenizer that llama.cpp has too, for tests of what is exported."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from libprune.export.source import Source
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Compute, Slice
from libprune.results.prune import prune
from libprune.results.record import Record, read_record
from tests.support.models import VOCAB
from tests.support.sliced import write_collected

_SPACE = "\u0120"
"""How byte-level tokenizers write a space."""


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer that knows small letters, the space and some pairs, in as many tokens as the models."""
    letters = [chr(ord("a") + index) for index in range(26)]
    pairs = [("a", "b"), ("c", "d"), ("e", "f"), ("ab", "cd"), (_SPACE, "a"), (_SPACE, "z"), ("x", "y"), ("m", "n")]
    texts = ["<eos>", "<pad>", *letters, _SPACE, *("".join(pair) for pair in pairs)]
    assert len(texts) == VOCAB
    vocabulary = {text: index for index, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def write_pruned(root: Path, name: str, kind: str) -> tuple[Layout, Source]:
    """A tiny model of a family and its pruned folder, without repair.

    Args:
        root: an existing folder.
        name: of `tests.support.models.FAMILIES`.
        kind: of plan, one of `tests.support.models.PLANS`.
    """
    layout, _ = write_collected(root, name, kind)
    write_tokenizer(layout.model)
    layout.pruned.mkdir()
    prune(layout, layout.pruned, Compute(device="cpu", dtype="float32"), Slice(repair="none"))
    return layout, Source(read_record(layout.pruned))


def dense_source(layout: Layout) -> Source:
    """The dense model of a layout."""
    return Source(Record(layout.model, {"plan": {"shape": "uniform"}}))


def texts(number: int = 2, length: int = 24) -> torch.Tensor:
    """Random token ids that the tiny tokenizer can decode, the same in every call."""
    return torch.randint(2, VOCAB, (number, length), generator=torch.Generator().manual_seed(3))
