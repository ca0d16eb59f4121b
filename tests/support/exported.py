"""Tiny pruned folders with a tokenizer that llama.cpp has too, for tests of what is exported."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from libprune.engine.architecture import Heads
from libprune.export.formats import Format
from libprune.export.source import Source
from libprune.models.folder import load_model
from libprune.pipeline.processes import FreshPython
from libprune.results.record import Record, read_provenance, write_provenance
from tests.support.models import FAMILIES, TOWERS, VOCAB, plan_of_heads, prune, random_plan, write_dense

_SPACE = "\u0120"
"""How byte-level tokenizers write a space."""


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer that knows small letters, the space and some pairs, in as many tokens as the models."""
    letters = [chr(ord("a") + index) for index in range(26)]
    pairs = [("a", "b"), ("c", "d"), ("e", "f"), ("ab", "cd"), (_SPACE, "a"), (_SPACE, "z"), ("x", "y"), ("m", "n")]
    texts = ["<|endoftext|>", "<pad>", *letters, _SPACE, *("".join(pair) for pair in pairs)]
    assert len(texts) == VOCAB
    vocabulary = {text: index for index, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def write_pruned(
    root: Path, name: str, kind: str, heads: Callable[[int], tuple[int, int]] | None = None
) -> tuple[Source, Source]:
    """A tiny model of a family, dense and pruned by a random plan.

    Args:
        root: a folder; the dense model comes to lie in `dense`, the pruned one in `pruned`.
        name: of `tests.support.models.FAMILIES` or `TOWERS`.
        kind: of plan, one of `tests.support.models.PLANS`.
        heads: the groups that each layer keeps and the query heads in each, in place of the random plan of a kind.
    """
    units: Heads = "queries" if heads else "groups"
    dense = write_dense((FAMILIES | TOWERS)[name](0), root / "dense", heads=units)
    write_tokenizer(dense.folder)
    (root / "pruned").mkdir()
    custom = kind in {"holes", "per_layer"}
    plan = plan_of_heads(dense.architecture, heads) if heads else random_plan(dense.architecture, kind)
    prune(dense, plan, custom, root / "pruned")
    write_provenance(root / "pruned", {})
    shapes = {"dense": "uniform", "pruned": "per_layer" if custom else "uniform"}
    made = {"dense": {}, "pruned": read_provenance(root / "pruned")}
    first, second = (Source(Record(root / n, made[n] | {"plan": {"shape": shape}})) for n, shape in shapes.items())
    return first, second


def texts(number: int = 2, length: int = 24) -> Tensor:
    """Random token ids that the tiny tokenizer can decode, the same in every call."""
    return torch.randint(2, VOCAB, (number, length), generator=torch.Generator().manual_seed(3))


def predicted(source: Source, ids: Tensor) -> Tensor:
    """The logarithms of the probabilities of each next token by the model itself; ``[texts, length, vocab]``."""
    model = load_model(source.folder, torch.float32, trust_remote_code=source.record.remote)
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits.log_softmax(-1)


def run_here(
    folder: Path, ids: Tensor, remote: bool, head: str, disk: Path | None = None, python: FreshPython | None = None
) -> dict[str, Tensor]:
    """The logits of a folder's model in this process, in place of `libprune.results.proof.reload`, which starts one."""
    with torch.no_grad():
        logits: Tensor = load_model(folder, torch.float32, trust_remote_code=remote)(input_ids=ids).logits
    return {"logits": logits}


def distance(form: Format, path: Path, source: Source, ids: Tensor) -> float:
    """Largest difference of a written file's predictions, in its program, to those of the model."""
    with form.open(path, source, 64) as program:
        own = torch.stack([program.predict(row.tolist(), source.config.vocab_size) for row in ids])
    return float((own - predicted(source, ids)[:, -1]).abs().max())
